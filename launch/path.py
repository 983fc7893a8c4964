"""Print the paths of files in the package for other commands: accelerate's configurations, Slurm's scripts.

usage: powertrain path [NAME]

Without a name, it prints all of them.

examples:
  accelerate launch --config_file $(powertrain path zero1) $(which powertrain) train +experiment=moe_1b
  sbatch --nodes=2 $(powertrain path train.sbatch) +experiment=powermoe_3b
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from powertrain.launch.parser import verb_parser
from powertrain.train.cli import guard
from powertrain.train.errors import ConfigError

FILES = [
    *sorted((Path(__file__).parent / "accelerate").glob("*.yaml")),
    *sorted((Path(__file__).parent / "slurm").glob("*.sbatch")),
]


def main(arguments: list[str] | None = None) -> None:
    """Print a path, or all of them."""
    parser = verb_parser("path", __doc__)
    parser.add_argument("name", nargs="?", help=argparse.SUPPRESS)
    sys.exit(guard(lambda: _path(parser.parse_args(arguments).name)))


def _path(name: str | None) -> int:
    found = [path for path in FILES if name in (None, path.stem, path.name)]
    if not found:
        names = ", ".join(path.stem if path.suffix == ".yaml" else path.name for path in FILES)
        raise ConfigError(f"There is no file '{name}'; there are {names}.")
    print(*found, sep="\n")
    return 0


if __name__ == "__main__":
    main()
