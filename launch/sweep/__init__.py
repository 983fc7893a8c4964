"""Train small models over batch × rate × horizon × model, all or a lean choice: a ledger that `fit` makes a law.

usage: powertrain sweep +sweep=NAME [KEY=VALUE …] [--pilot | --slurm | --dry-run]

examples:
  powertrain sweep +sweep=lean                      # minutes: the trials that tell most for their tokens
  powertrain sweep +sweep=tiny                      # minutes: a small grid on Python's own standard library
  powertrain sweep +sweep=tiny --dry-run            # which trials, how many tokens; trains nothing
  powertrain sweep +sweep=tiny --pilot              # the shortest horizon, then hours and the error of b
  powertrain sweep +sweep=tiny --slurm              # the same workers as a job array
  powertrain sweep --config-dir mine +sweep=mine    # mine/sweep/mine.yaml

Stopped or killed, the same command goes on: a trial that is in the ledger is not run again, one that had begun goes on
from its checkpoint. RUN.FOLDER/NAME/ holds the ledger and a folder for each trial, which is an ordinary run.
"""

from __future__ import annotations

import argparse
import sys

from powertrain.launch.parser import verb_parser
from powertrain.train.cli import guard


def main(arguments: list[str] | None = None) -> None:
    """Run the sweep, or be one of its workers."""
    parser = verb_parser("sweep", __doc__)
    parser.add_argument(
        "--pilot", action="store_true", help="train the shortest horizon, then predict hours and the error of b"
    )
    parser.add_argument("--slurm", action="store_true", help="let `sbatch --array` run sweep.jobs workers")
    parser.add_argument("--dry-run", action="store_true", help="say what would be trained")
    # One of the processes that train: of the controller with this process number, or 0 for one of a job array.
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    sys.exit(guard(lambda: _sweep(*parser.parse_known_args(arguments))))


def _sweep(options: argparse.Namespace, overrides: list[str]) -> int:
    if options.worker is None:
        from powertrain.launch.sweep.control import control

        return control(overrides, options)
    from powertrain.launch.sweep.worker import work

    try:
        return work(overrides, options)
    except KeyboardInterrupt:  # the controller says what there is to say
        return 130
