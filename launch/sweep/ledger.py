"""The ledger of a sweep: a JSON object a line, one for each trial that has ended."""

from __future__ import annotations

import codecs
import json
from pathlib import Path
from typing import Any

from powertrain.schedulers.cells import is_number
from powertrain.train.errors import ConfigError


def ledger_lines(path: Path) -> list[tuple[int, bytes, Any]]:
    """(number, text, JSON) of every line that is not blank, with the error in place of JSON where it is none."""
    lines: list[tuple[int, bytes, Any]] = []
    raw = path.read_bytes() if path.exists() else b""
    for number, text in enumerate(raw.removeprefix(codecs.BOM_UTF8).splitlines(keepends=True), 1):
        if text.strip():
            try:
                lines.append((number, text, json.loads(text.decode(errors="replace"))))
            except (ValueError, RecursionError) as error:
                lines.append((number, text, error))
    return lines


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of any ledger, for a fit or a report.

    Raises:
        ConfigError: no such file, or a line that is no JSON object.
    """
    if not path.is_file():
        raise ConfigError(f"There is no ledger {path}. A sweep leaves one in RUN.FOLDER/NAME/ledger.jsonl.")
    lines = []
    for number, text, line in ledger_lines(path):
        if isinstance(line, Exception):
            why = "nested too deep" if isinstance(line, RecursionError) else str(line).partition(";")[0]
            raise ConfigError(f"{path}, line {number}, is not JSON ({why}): repair or delete that line.") from line
        if not isinstance(line, dict):
            raise ConfigError(
                f"{path}, line {number}, is not a JSON object but {text.decode(errors='replace')[:60]!r}."
            )
        lines.append(line)
    return lines


def results(path: Path) -> dict[str, dict[str, Any]]:
    """Name → line of the trials of a sweep's own ledger."""
    return {line["trial"]: line for _, _, line in ledger_lines(path) if result_of(line)}


def result_of(line: Any) -> dict[str, Any] | None:
    """The line if it is one of a trial that has ended; None for what no sweep has written."""
    if not isinstance(line, dict) or not isinstance(line.get("trial"), str) or "loss" not in line:
        return None
    return line if line["loss"] is None or is_number(line["loss"]) else None
