"""Continue a prompt with an exported model, loaded by Transformers alone.

usage: powertrain generate MODEL PROMPT [--max-new-tokens N] [--seed N]

examples:
  powertrain generate runs/quickstart/model "def read_lines(path):"
  powertrain generate runs/quickstart "import os" --max-new-tokens 100 --seed 1
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from powertrain.launch.parser import verb_parser
from powertrain.train.cli import guard
from powertrain.train.errors import ConfigError
from powertrain.train.imports import heavy_imports


def main(arguments: list[str] | None = None) -> None:
    """Print the prompt and what follows: greedily, or sampled when there is a seed."""
    parser = verb_parser("generate", __doc__)
    parser.add_argument("model", type=Path, help="a model folder, or the folder of a run")
    parser.add_argument("prompt")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--seed", type=int, help="sample with this seed; default: the likeliest token each time")
    sys.exit(guard(lambda: _generate(parser.parse_args(arguments))))


def _generate(options: argparse.Namespace) -> int:
    folder = model_folder(options.model)
    if options.max_new_tokens < 1 or not 0 <= (options.seed or 0) < 2**63:
        raise ConfigError("--max-new-tokens is at least 1, and --seed a number from 0 that fits 63 bits.")
    if not options.prompt:
        raise ConfigError("The prompt is empty; give at least one character to continue.")

    with heavy_imports():
        from powertrain.train.export import generate, warn_if_outdated

    warn_if_outdated(folder)
    print(generate(folder, options.prompt, options.max_new_tokens, options.seed))
    return 0


def model_folder(given: Path) -> Path:
    """A model folder, or the one in a run's.

    Raises:
        ConfigError: it is neither.
    """
    for folder in (given, given / "model"):
        if (folder / "config.json").is_file():
            return folder
    hint = f" `powertrain export {given}` makes one." if (given / "checkpoints").is_dir() else ""
    raise ConfigError(f"{given} is neither a model folder nor the folder of a run that has one in model/.{hint}")


if __name__ == "__main__":
    main()
