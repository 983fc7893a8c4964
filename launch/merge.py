"""Merge checkpoints of a run into one model, the mean of their weights, without training. The run is not changed.

usage: powertrain merge RUN --last K | --steps S S … [--weights SHAPE] [--evaluate] --out FOLDER

examples:
  powertrain merge runs/trunk --last 4 --out runs/trunk-merged
  powertrain merge runs/trunk --steps 60 70 80 90 --weights sqrt --evaluate --out runs/trunk-sqrt

The model is written as a Hugging Face folder. docs/averages.md says how --weights SHAPE acts as a decay.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from powertrain.launch.export import export_loaded
from powertrain.launch.parser import verb_parser
from powertrain.schedulers.decay import SHAPES
from powertrain.train.cli import guard
from powertrain.train.compose import load
from powertrain.train.config import Config
from powertrain.train.errors import ConfigError
from powertrain.train.imports import heavy_imports

if TYPE_CHECKING:
    from powertrain.train.loss import LanguageModelLoss
    from powertrain.train.state import State

UNIFORM = "uniform"


def main(arguments: list[str] | None = None) -> None:
    """Write the merged model; with --evaluate, print its validation loss."""
    parser = verb_parser("merge", __doc__)
    parser.add_argument("run", type=Path, help="the folder of a run")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--last", type=int, metavar="K", help="merge its K newest checkpoints")
    which.add_argument("--steps", type=int, nargs="+", metavar="S", help="merge the checkpoints of these steps")
    parser.add_argument(
        "--weights",
        choices=(UNIFORM, *SHAPES),
        default=UNIFORM,
        help="uniform (default), or the shape of a decay that the merge acts as, from its first checkpoint on",
    )
    parser.add_argument("--evaluate", action="store_true", help="print the validation loss too, as the run measures it")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="where to; must not exist")
    sys.exit(guard(lambda: _merge(parser.parse_args(arguments))))


def merge_weights(shape: str, tokens: Sequence[int]) -> list[float]:
    """The weight of each checkpoint in a merge that acts as a decay.

    Call the checkpoints θ_1 … θ_K and what was trained between two of them u_j = θ_j − θ_(j−1). Then θ_i is θ_1 plus
    u_2 … u_i, and in Σ w_i θ_i, with weights that sum to 1, u_j appears once in each θ_i with i ≥ j:

        Σ w_i θ_i = θ_1 + Σ_j f_j u_j  with  f_j = w_j + … + w_K.

    So a merge is θ_1 plus all later updates, each scaled down, later ones more. A decay scales learning rates so; but
    here the gradients are those of the run without a decay (WSM, arXiv 2507.17634). Read backwards it gives the
    weights of a decay f that falls from f_1 = 1 to f_(K+1) = 0: w_i = f_i − f_(i+1).

    Here f_i = s(x_i), where s is a shape of `Decay` and x_i = (1 − 1/K)(n_i − n_1)/(n_K − n_1) for a checkpoint after
    n_i tokens. The decay begins at the first checkpoint and ends one mean interval after the last one, so the update of
    the last one still counts. With evenly spaced checkpoints x_i = (i − 1)/K: "linear" then has w_i = 1/K, the same as
    "uniform", the plain mean. "exponential" and "sqrt" (1 − √x) fall faster in the beginning, so they give early
    checkpoints more weight.

    Args:
        tokens: n_i, increasing, two or more.
    """
    count = len(tokens)
    if shape == UNIFORM:
        return [1 / count] * count
    passed = [(1 - 1 / count) * (n - tokens[0]) / (tokens[-1] - tokens[0]) for n in tokens]
    factors = [*(SHAPES[shape](x, 1 - x) for x in passed), 0.0]
    return [factor - following for factor, following in itertools.pairwise(factors)]


def _merge(options: argparse.Namespace) -> int:
    run, out = options.run, options.out
    config = load(run / "config.yaml")
    if out.exists() or out.is_symlink():
        raise ConfigError(f"--out {out} exists, and a merge replaces nothing: name a folder that does not exist.")
    chosen = _chosen(run / "checkpoints", options.last, options.steps)
    _check_same_model(config, run, chosen)

    from powertrain.train import checkpoint
    from powertrain.train.export import facts_of
    from powertrain.train.loss import LanguageModelLoss
    from powertrain.train.model import granite
    from powertrain.train.run import summary

    states = [checkpoint.load_state(path) for path in chosen]
    weights = merge_weights(options.weights, [state.tokens for state in states])
    loss = LanguageModelLoss(granite.build(config))
    checkpoint.load_weights(dict(zip(chosen, weights, strict=True)), loss.model)
    lines = _evaluations(config, run, chosen[-1], states[-1], loss) if options.evaluate else []
    record = {
        "run": config.run.name,
        "shape": options.weights,
        "steps": [state.step for state in states],
        "tokens": [state.tokens for state in states],
        "weights": weights,
        "evaluations": lines,
    }
    shares = ", ".join(f"{state.step:,} ({weight:.4f})" for state, weight in zip(states, weights, strict=True))
    merged = f"checkpoints of steps {shares}, --weights {options.weights}"
    facts = {**facts_of(states[-1], lines), "merged from": merged}
    difference = export_loaded(config, loss, run / "tokenizer", out, facts, record)
    print(f"{run}, {merged} → {out} (logits within {difference:.1e} of the trainer's)")
    if lines:
        print(summary(lines, []))
    return 0


def _chosen(checkpoints: Path, last: int | None, steps: list[int] | None) -> list[Path]:
    """The verified checkpoints, oldest first.

    Raises:
        ConfigError: there are fewer than asked for, or than two, or one is not valid.
    """
    with heavy_imports():
        from powertrain.train import checkpoint

    if steps is None:
        found = checkpoint.available(checkpoints)
        steps = [checkpoint.step_of(path) for path in found]
        if last is None or not 2 <= last <= len(steps):
            raise ConfigError(
                f"--last is {last}, and {checkpoints} has checkpoints of steps {steps}: --last has to be 2 or more, "
                "and no more than there are. checkpoint.keep is how many a run keeps."
            )
        steps = steps[-last:]
    if len(steps) < 2 or len({*steps}) < len(steps):
        raise ConfigError(f"--steps is {' '.join(map(str, steps))}: a merge takes two or more steps, each once.")
    return [checkpoint.at_step(checkpoints, step) for step in sorted(steps)]


def _check_same_model(config: Config, run: Path, chosen: list[Path]) -> None:
    """Check that each checkpoint has the model and tokenizer of the run.

    Raises:
        ConfigError: one has not.
    """
    from powertrain.data.tokenizer import load_tokenizer
    from powertrain.train.checkpoint import read_state
    from powertrain.train.model.granite import transformers_config
    from powertrain.train.resume import TOKENIZER, tokenizer_fingerprint

    def model(config: Config) -> dict[str, Any]:
        return {**transformers_config(config).to_dict(), "precision": config.precision}

    ours = model(config)
    fingerprint = tokenizer_fingerprint(load_tokenizer(run / "tokenizer"))
    for path in chosen:
        theirs = model(load(path / "config.yaml"))
        names = [name for name in sorted({*ours, *theirs}) if ours.get(name) != theirs.get(name)]
        if names:
            differing = ", ".join(f"{name} {theirs.get(name)}, not {ours.get(name)}" for name in names)
            raise ConfigError(
                f"{path} is of another model than {run / 'config.yaml'}: {differing}. Only checkpoints of one model "
                "can be merged: leave that step out."
            )
        if read_state(path)["data_fingerprint"].get(TOKENIZER, fingerprint) != fingerprint:
            raise ConfigError(
                f"{path} was trained with another tokenizer than that in {run / 'tokenizer'}, so its weights do not "
                "fit that one. Leave that step out."
            )


def _evaluations(
    config: Config, run: Path, newest: Path, state: State, loss: LanguageModelLoss
) -> list[dict[str, Any]]:
    """Lines as evals.jsonl has them, of the model in `loss`, which stays on the CPU.

    Raises:
        ConfigError: a corpus is not the one that the checkpoints were trained on, or none has a validation split.
    """
    from powertrain.data.tokenizer import load_tokenizer
    from powertrain.train.assemble import prepare_data
    from powertrain.train.engine import Engine
    from powertrain.train.evaluate import Validation
    from powertrain.train.model import mup
    from powertrain.train.resume import check_fingerprints

    config = copy.deepcopy(config)
    config.tracker.log_with, config.engine.expect, config.engine.torch_compile = [], None, False
    config.data.tokenizer.path = str(run / "tokenizer")
    engine = Engine(config)
    prepared = prepare_data(config, engine, print)
    check_fingerprints(newest, prepared.fingerprints, prepared.train)
    validation = Validation(config, prepared, load_tokenizer(run / "tokenizer"))
    if not validation.corpora:
        raise ConfigError(f"--evaluate: no corpus of {run} has a validation split that a sequence fits in.")
    engine.prepare(loss, mup.table(config))
    lines = validation.evaluate(engine, state)
    loss.to("cpu")
    return lines


if __name__ == "__main__":
    main()
