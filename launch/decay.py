"""Branch a decay off a checkpoint of a run: the learning rate falls from its value there. The run is not changed.

usage: powertrain decay RUN --at STEP --tokens N [options] [KEY=VALUE …]
       accelerate launch $(which powertrain) decay RUN --at STEP --tokens N …

KEY=VALUE changes settings of the parent's configuration, such as data.corpora.books.path=… or batch.micro_sequences=2.

examples:
  powertrain decay runs/quickstart --at 200 --tokens 200_000
  powertrain decay runs/quickstart --at 200 --tokens 200_000 --shape linear --name quickstart-linear
  powertrain decay runs/mine --at 5000 --tokens 10_000_000 --mixture web=0.7,books=0.3
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from powertrain.launch.parser import verb_parser
from powertrain.schedulers import WITH_DECAY
from powertrain.schedulers.decay import SHAPES
from powertrain.train.cli import leave, run_training
from powertrain.train.compose import load
from powertrain.train.config import Config
from powertrain.train.errors import ConfigError


def main(arguments: list[str] | None = None) -> None:
    """Train the branch."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = verb_parser("decay", __doc__)
    parser.add_argument("run", type=Path, help="the folder of the run to branch off")
    parser.add_argument("--at", type=int, required=True, help="step of one of its checkpoints")
    parser.add_argument("--tokens", type=int, required=True, help="length of the decay")
    parser.add_argument("--shape", choices=SHAPES, default="exponential")
    parser.add_argument("--floor", type=float, default=0.0, help="learning rate at the end, over that at the start")
    parser.add_argument("--mixture", help="weights of the corpora during the decay: NAME=WEIGHT,…; default: as before")
    parser.add_argument("--name", help="of the new run, beside its parent; default: PARENT-decay-STEP-TOKENS")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    leave(lambda: run_training(branch(parser.parse_intermixed_args(arguments)), "decay", arguments))


def branch(options: argparse.Namespace) -> Config:
    """The configuration of the branch.

    Raises:
        ConfigError: there is no such checkpoint, it lies in warmup or in a decay, or a setting is invalid.
    """
    from powertrain.train import checkpoint

    name = options.name or f"{options.run.resolve().name}-decay-{options.at}-{options.tokens}"
    own = options.run.resolve().parent / name
    place = {"run.name": name, "run.folder": str(own.parent)}
    if checkpoint.available(own / "checkpoints"):  # it has begun, and no longer needs its parent
        begun = load(own / "config.yaml", place, options.overrides)
        _check_same(begun, options, own)
        return begun
    if not (options.run / "config.yaml").is_file():
        raise ConfigError(f"{options.run} is not the folder of a run: it has no config.yaml.")
    checkpoints = options.run / "checkpoints"
    chosen = checkpoint.at_step(checkpoints, options.at)
    parent = load(chosen / "config.yaml")
    n = checkpoint.load_state(chosen).tokens
    if parent.schedule["name"] not in WITH_DECAY:
        raise ConfigError(
            f"{options.run} was trained with the schedule '{parent.schedule['name']}', which has no decay to branch; "
            f"{' and '.join(WITH_DECAY)} have one."
        )
    phase = parent.make_schedule().phase(n)
    if phase != "trunk":
        steps = [step for step in map(checkpoint.step_of, checkpoint.available(checkpoints)) if step != options.at]
        raise ConfigError(
            f"Step {options.at} of {options.run} lies in its {phase}: a decay branches off the trunk. "
            f"{f'Its other checkpoints are of steps {steps}.' if steps else 'It has no other checkpoint.'}"
        )
    if options.tokens <= 0:
        raise ConfigError(f"--tokens is {options.tokens}; a decay takes at least one token.")
    begins = parent.trained(n)
    changed: dict[str, Any] = {
        **place,
        "run.resume": str(chosen.resolve()),
        "run.tokens": begins + options.tokens,
        "schedule.decay": {
            "start": n,
            "tokens": options.tokens,
            "shape": options.shape,
            "floor": options.floor,
        },
        "data.mixture": parent.stages()[0][1],  # explicit, so that a corpus added later does not join it
        "data.tokenizer.path": str((options.run / "tokenizer").resolve()),
    }
    if options.mixture:
        earlier = [
            {"from_tokens": stage.from_tokens, "mixture": stage.mixture}
            for stage in parent.data.stages
            if stage.from_tokens < begins
        ]
        changed["data.stages"] = [*earlier, {"from_tokens": begins, "mixture": _weights(options.mixture)}]
    return load(chosen / "config.yaml", changed, options.overrides)


def _check_same(begun: Config, options: argparse.Namespace, own: Path) -> None:
    """Raises ConfigError unless the options are those that the branch was begun with."""
    decay = begun.schedule["decay"]
    was = {name: decay[name] for name in ("tokens", "shape", "floor")}
    asked = {name: getattr(options, name) for name in was}
    was["at"], asked["at"] = Path(begun.run.resume).name, f"step-{options.at:08d}"
    if options.mixture:
        was["mixture"], asked["mixture"] = begun.stages()[-1][1], _weights(options.mixture)
    if was != asked:
        differing = ", ".join(f"{name} {was[name]}, not {asked[name]}" for name in was if was[name] != asked[name])
        raise ConfigError(f"{own} holds a branch with {differing}. Give the new one a --name of its own.")


def _weights(text: str) -> dict[str, float]:
    try:
        return {name: float(weight) for name, weight in (part.split("=") for part in text.split(","))}
    except ValueError as error:
        raise ConfigError(f"--mixture is '{text}'; it is written NAME=WEIGHT,NAME=WEIGHT.") from error


if __name__ == "__main__":
    main()
