"""Where files of the package lie that are given to other commands: accelerate's configurations, Slurm's scripts.

usage: powertrain path [NAME]

Without a name, all of them.

examples:
  accelerate launch --config_file $(powertrain path zero1) $(which powertrain) train +experiment=moe_1b
  sbatch --nodes=2 $(powertrain path train.sbatch) +experiment=powermoe_3b
"""

from __future__ import annotations

import sys
from pathlib import Path

from powertrain.train.cli import guard
from powertrain.train.errors import ConfigError

FILES = [
    *sorted((Path(__file__).parent / "accelerate").glob("*.yaml")),
    *sorted((Path(__file__).parent / "slurm").glob("*.sbatch")),
]


def main(arguments: list[str] | None = None) -> None:
    """Print a path, or all of them."""
    arguments = sys.argv[1:] if arguments is None else arguments
    sys.exit(guard(lambda: _path(arguments)))


def _path(arguments: list[str]) -> int:
    if "--help" in arguments or "-h" in arguments:
        print(__doc__)
        return 0
    found = [path for path in FILES if not arguments or arguments in ([path.stem], [path.name])]
    if not found:
        names = ", ".join(path.stem if path.suffix == ".yaml" else path.name for path in FILES)
        raise ConfigError(f"There is no file '{' '.join(arguments)}'; there are {names}.")
    print(*found, sep="\n")
    return 0


if __name__ == "__main__":
    main()
