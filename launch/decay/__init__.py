"""Branch a decay off a checkpoint of a run: the learning rate falls from its value there. The run is not changed.

usage: powertrain decay RUN --at STEP --tokens N [options] [KEY=VALUE …]
       accelerate launch $(which powertrain) decay RUN --at STEP --tokens N …
       powertrain decay RUN --at STEP --tokens N --predict

The decay is a run of its own, in a folder beside the run's, and ends with a model. The same command resumes it.
--predict trains nothing: it predicts the loss at the end from finished decays of the run. KEY=VALUE changes settings of
the run's configuration for the decay, such as data.corpora.books.path=… or batch.micro_sequences=2. docs/decay.md has
more.

examples:
  powertrain decay runs/quickstart --at 200 --tokens 200_000
  powertrain decay runs/quickstart --at 200 --tokens 200_000 --shape linear --name quickstart-linear
  powertrain decay runs/base --at 100 --tokens 60_000 --predict    # from two finished decays or more
  powertrain decay runs/mine --at 5000 --tokens 10_000_000 --mixture web=0.7,books=0.3
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console

from powertrain.launch.decay.predict import prediction
from powertrain.launch.parser import verb_parser
from powertrain.schedulers.decay import SHAPES
from powertrain.train.branch import begun, check_same, origin
from powertrain.train.cli import guard, leave, run_training
from powertrain.train.config import Config
from powertrain.train.errors import ConfigError


def main(arguments: list[str] | None = None) -> None:
    """Train the decay, or predict its loss."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = verb_parser("decay", __doc__)
    parser.add_argument("run", type=Path, help="the folder of the run to branch off")
    parser.add_argument("--at", type=int, required=True, help="step of one of its checkpoints")
    parser.add_argument("--tokens", type=int, required=True, help="length of the decay")
    parser.add_argument("--shape", choices=SHAPES, default="exponential", help="default: exponential")
    parser.add_argument(
        "--floor", type=float, default=0.0, help="learning rate at the end, as a share of that at the start; default: 0"
    )
    parser.add_argument("--mixture", help="weights of the corpora during the decay: NAME=WEIGHT,…; default: as before")
    parser.add_argument(
        "--name", help="of the new run, whose folder is beside the parent's; default: RUN-decay-STEP-TOKENS"
    )
    parser.add_argument(
        "--predict", action="store_true", help="train nothing; predict the loss from finished decays of this run"
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    options = parser.parse_intermixed_args(arguments)
    if options.predict:
        sys.exit(guard(lambda: _predict(options)))
    leave(lambda: run_training(branch(options), "decay", arguments))


def _predict(options: argparse.Namespace) -> int:
    given = [name for name in ("--name", "--mixture") if getattr(options, name.strip("-"))] + options.overrides
    if given:
        raise ConfigError(
            f"--predict trains nothing and takes the settings of the run as they are: leave {', '.join(given)} out."
        )
    _check_length(options.tokens)
    console = Console(width=None if sys.stdout.isatty() else 100, highlight=False, markup=False)
    prediction(options.run, options.at, options.tokens, options.shape, options.floor, console)
    return 0


def _check_length(tokens: int) -> None:
    if tokens <= 0:
        raise ConfigError(f"--tokens is {tokens}; it is the length of the decay, and has to be above 0.")


def branch(options: argparse.Namespace) -> Config:
    """The configuration of the branch.

    Raises:
        ConfigError: there is no such checkpoint, it lies in warmup or in a decay, or a setting is invalid.
    """
    name = options.name or f"{options.run.resolve().name}-decay-{options.at}-{options.tokens}"
    own = options.run.resolve().parent / name
    if (there := begun(own, options.overrides)) is not None:
        _check_same(there, options, own)
        return there
    at = origin(options.run, options.at, "decay")
    _check_length(options.tokens)
    decay = {"start": at.tokens, "tokens": options.tokens, "shape": options.shape, "floor": options.floor}
    changed = at.settings(own, decay, options.tokens)
    if options.mixture:
        earlier = [
            {"from_tokens": stage.from_tokens, "mixture": stage.mixture}
            for stage in at.config.data.stages
            if stage.from_tokens < at.trained
        ]
        changed["data.stages"] = [*earlier, {"from_tokens": at.trained, "mixture": _weights(options.mixture)}]
    return at.branch(changed, options.overrides)


def _check_same(there: Config, options: argparse.Namespace, own: Path) -> None:
    """Check that the branch was begun with these options.

    Raises:
        ConfigError: one differs.
    """
    decay = there.make_schedule().decay
    was = {name: getattr(decay, name) for name in ("tokens", "shape", "floor")}
    asked = {name: getattr(options, name) for name in was}
    was["checkpoint"], asked["checkpoint"] = Path(there.run.resume).name, f"step-{options.at:08d}"
    if options.mixture:
        was["mixture"], asked["mixture"] = there.stages()[-1][1], _weights(options.mixture)
    check_same(own, was, asked)


def _weights(text: str) -> dict[str, float]:
    try:
        return {name: float(weight) for name, weight in (part.split("=") for part in text.split(","))}
    except ValueError as error:
        raise ConfigError(f"--mixture is '{text}'; it is written NAME=WEIGHT,NAME=WEIGHT.") from error


if __name__ == "__main__":
    main()
