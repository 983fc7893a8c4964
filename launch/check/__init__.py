"""See that a configuration does what it should.

usage: powertrain check mup|coordinates|batch [+experiment=NAME] [KEY=VALUE …]
       powertrain check run RUN [--steps N]

  mup          each tensor's role, standard deviation asked and measured, rate multiplier, weight decay
  coordinates  train a few steps at four widths; no part of the model may change more, or less, as it gets wider
  batch        one batch split in three ways must give the same gradients, the balance loss included
  run          files as in their manifests, and the last steps trained again give the same losses

Exit status: 0 as it should be, 1 not.

examples:
  powertrain check mup +experiment=powermoe_3b
  powertrain check coordinates mup.rule=fan_in --plot coordinates.png
  powertrain check batch
  powertrain check run runs/quickstart
"""

from __future__ import annotations

import importlib
import sys

from powertrain.train.cli import guard
from powertrain.train.config import ConfigError

CHECKS = ("mup", "coordinates", "batch", "run")
# What a check needs of a run that is not described: any budget, any batch.
_UNDESCRIBED = ["run.tokens=2_000_000_000", "batch.sequences=8"]


def main(arguments: list[str] | None = None) -> None:
    """Run the check named by the first argument."""
    arguments = sys.argv[1:] if arguments is None else arguments
    sys.exit(guard(lambda: _check(arguments)))


def _check(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("--help", "-h"):
        print(__doc__)
        return 0 if arguments else 2
    name, *rest = arguments
    if name not in CHECKS:
        raise ConfigError(f"There is no check '{name}'; there are {', '.join(CHECKS)}.")
    status: int = importlib.import_module(f"{__name__}.{name}").main(rest)
    return status


def described(overrides: list[str]) -> list[str]:
    """The overrides, with a budget and a batch when no experiment brings them."""
    return overrides if any("experiment=" in each for each in overrides) else [*_UNDESCRIBED, *overrides]
