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

import argparse
import importlib
import sys

from powertrain.launch.parser import verb_parser
from powertrain.train.cli import guard

CHECKS = ("mup", "coordinates", "batch", "run")
# What a check needs of a run that is not described: any budget, any batch.
_UNDESCRIBED = ["run.tokens=2_000_000_000", "batch.sequences=8"]


def main(arguments: list[str] | None = None) -> None:
    """Run the check named by the first argument."""
    parser = verb_parser("check", __doc__)
    parser.add_argument("name", choices=CHECKS, metavar="|".join(CHECKS), help=argparse.SUPPRESS)
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    sys.exit(guard(lambda: importlib.import_module(f"{__name__}.{options.name}").main(options.arguments)))


def described(overrides: list[str]) -> list[str]:
    """The overrides, with a budget and a batch when no experiment brings them."""
    return overrides if any("experiment=" in each for each in overrides) else [*_UNDESCRIBED, *overrides]
