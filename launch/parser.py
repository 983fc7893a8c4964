"""The command line of a verb."""

from __future__ import annotations

import argparse


def verb_parser(name: str, doc: str | None) -> argparse.ArgumentParser:
    """A parser whose --help is the docstring `doc`, followed by the options.

    Hydra's overrides, --config-dir among them, are what `parse_known_args` leaves for `train.cli.composed`.
    """
    return argparse.ArgumentParser(
        prog=f"powertrain {name}",
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage=argparse.SUPPRESS,
    )
