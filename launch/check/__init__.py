"""Verify a configuration, or a run.

usage: powertrain check mup|coordinates|batch [+experiment=NAME] [KEY=VALUE …]
       powertrain check run RUN [--steps N]

  mup          each tensor's role, expected and measured standard deviation, learning-rate multiplier, weight decay
  coordinates  train a few steps at four widths; no part of the model may change more, or less, as it gets wider
  batch        one batch split in three ways must give the same gradients, including those of the balance loss
  run          files match their manifests, and replaying the last steps gives the same losses

Exit status: 0 passed, 1 failed, 2 bad usage.

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
# Without an experiment a check needs some budget and some batch; neither changes what it finds.
_UNDESCRIBED = ["run.tokens=2_000_000_000", "batch.sequences=8"]


def main(arguments: list[str] | None = None) -> None:
    """Run the check named by the first argument."""
    parser = verb_parser("check", __doc__)
    parser.add_argument("name", choices=CHECKS, metavar="|".join(CHECKS), help=argparse.SUPPRESS)
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    sys.exit(guard(lambda: _check(options.name, options.arguments)))


def _check(name: str, arguments: list[str]) -> int:
    status: int = importlib.import_module(f"{__name__}.{name}").main(arguments)
    return status


def described(overrides: list[str]) -> list[str]:
    """The overrides, with a budget and a batch unless an experiment has them."""
    return overrides if any("experiment=" in each for each in overrides) else [*_UNDESCRIBED, *overrides]
