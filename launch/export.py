"""Write a checkpoint of a run as a Hugging Face folder, with its tokenizer and a model card, and check its logits.

usage: powertrain export RUN [--step N] [--average] [--out FOLDER]

examples:
  powertrain export runs/quickstart
  powertrain export runs/quickstart --step 200 --out /models/quickstart-200
  powertrain export runs/quickstart --average

docs/export.md describes the folder, and its conversion for llama.cpp.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from powertrain.launch.parser import verb_parser
from powertrain.train.cli import guard
from powertrain.train.compose import load
from powertrain.train.config import Config
from powertrain.train.errors import ConfigError
from powertrain.train.imports import heavy_imports

if TYPE_CHECKING:
    from powertrain.train.loss import LanguageModelLoss


def main(arguments: list[str] | None = None) -> None:
    """Export the newest valid checkpoint, or that of a step."""
    parser = verb_parser("export", __doc__)
    parser.add_argument("run", type=Path, help="the folder of a run")
    parser.add_argument("--step", type=int, help="the checkpoint's step; default: the newest")
    parser.add_argument("--average", action="store_true", help="the running average of the weights (average.window)")
    parser.add_argument(
        "--out", type=Path, help="where to; default: RUN/model, RUN/model-STEP with --step; …-average with --average"
    )
    sys.exit(guard(lambda: _export(parser.parse_args(arguments))))


def _export(options: argparse.Namespace) -> int:
    run, step, out = options.run, options.step, options.out
    config = load(run / "config.yaml")

    with heavy_imports():
        from powertrain.train import checkpoint
        from powertrain.train.export import check_target, facts_of
        from powertrain.train.loss import LanguageModelLoss
        from powertrain.train.model import granite
        from powertrain.train.state import AVERAGE
        from powertrain.train.track import read_lines

    checkpoints = run / "checkpoints"
    chosen = checkpoint.newest_valid(checkpoints) if step is None else checkpoint.at_step(checkpoints, step)
    if chosen is None:
        raise ConfigError(
            f"{checkpoints} holds no checkpoint. A run writes them, and a sweep keeps those of the "
            "longest horizon of each trunk."
        )
    loss = LanguageModelLoss(granite.build(config))
    window = checkpoint.average_window(chosen) if options.average else None
    if options.average and window is None:
        raise ConfigError(f"{chosen} has no running average: it was saved by a run without average.window.")
    checkpoint.load_weights({chosen: 1.0}, loss.model, "weights" if window is None else AVERAGE)
    state = checkpoint.load_state(chosen)
    folder = out or run / f"model{'' if step is None else f'-{step}'}{'' if window is None else '-average'}"
    if out is not None and ".." in out.parts:
        raise ConfigError(f"--out is {out}, which goes through '..'; give the plain path of the model folder.")
    check_target(folder)
    facts = facts_of(state, (line for line in read_lines(run / "evals.jsonl") if line["step"] == state.step), window)
    difference = export_loaded(config, loss, run / "tokenizer", folder, facts)
    print(f"{chosen} → {folder} (logits within {difference:.1e} of the trainer's)")
    return 0


def export_loaded(
    config: Config,
    loss: LanguageModelLoss,
    tokenizer_folder: Path,
    folder: Path,
    facts: dict[str, Any],
    merge: dict[str, Any] | None = None,
) -> float:
    """Export the float32 model in `loss`, which is on the CPU and not in an engine.

    Args:
        facts: and further ones as `train.export.export` takes them.

    Returns:
        The largest difference of a logit.
    """
    import torch

    from powertrain.train.export import export, in_working_precision
    from powertrain.train.loss import logits_of
    from powertrain.train.optim import BFloat16Weights

    length = min(64, config.data.sequence_length)
    probe = torch.arange(2 * length).reshape(2, length) % config.model.vocab_size
    trained = BFloat16Weights(loss) if config.precision == "bf16" else loss
    weights = {name: in_working_precision(config, tensor) for name, tensor in loss.model.named_parameters()}
    return export(config, weights, logits_of(trained, probe), probe, tokenizer_folder, folder, facts, merge)


if __name__ == "__main__":
    main()
