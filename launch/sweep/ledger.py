"""The ledger of a sweep: a JSON object a line, one for each trial that has ended."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from powertrain.schedulers.cells import MOST


def result_of(line: Any) -> dict[str, Any] | None:
    """The line of a trial that has ended; None for what no sweep has written."""
    if not isinstance(line, dict) or not isinstance(line.get("trial"), str) or "loss" not in line:
        return None
    loss = line["loss"]
    known = loss is None or (isinstance(loss, (int, float)) and not isinstance(loss, bool) and abs(loss) < MOST)
    return line if known else None


def ledger_lines(path: Path) -> list[tuple[bytes, Any]]:
    """The lines of a ledger as they stand, with the JSON of each, None where it is none; without one cut short."""
    lines = []
    for text in path.read_bytes().splitlines(keepends=True) if path.exists() else ():
        try:
            lines.append((text.strip(), json.loads(text.decode(errors="replace"))))
        except (ValueError, RecursionError):
            if text.endswith(b"\n") and text.strip():
                lines.append((text.strip(), None))
    return lines


def read_ledger(path: Path) -> dict[str, dict[str, Any]]:
    """Name → line of a sweep's own ledger."""
    return {line["trial"]: line for _, line in ledger_lines(path) if result_of(line)}
