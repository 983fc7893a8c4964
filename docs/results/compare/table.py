"""Nats above the least loss of each cell (batch, horizon): schedules tuned in every cell, tuned in one, or by the law.

    python docs/results/compare/table.py

A setting that the sweep pruned in a cell (its learning rate lay more than two above the best one) has no loss there. It
is counted with the loss of the highest learning rate that was trained, less than its own would be, and marked with ≥.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

Cell = tuple[float, int]


def losses(path: Path) -> dict[float, dict[Cell, float]]:
    """Mean loss over seeds by learning rate (WSD, cosine) or a (Power), and by cell."""
    seen: dict[float, dict[Cell, list[float]]] = {}
    for line in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
        if line["status"] == "finished":
            setting = seen.setdefault(line["lr"] if line["schedule"] != "power" else line["a"], {})
            setting.setdefault((line["batch"], line["tokens"]), []).append(line["loss"])
    return {setting: {cell: float(np.mean(each)) for cell, each in by.items()} for setting, by in sorted(seen.items())}


def main() -> None:
    """Print the tables."""
    ledgers = {path.stem: losses(path) for path in sorted((Path(__file__).parent / "ledgers").glob("*.jsonl"))}
    every = [by for settings in ledgers.values() for by in settings.values()]
    cells = sorted({cell for by in every for cell in by}, key=lambda cell: (cell[1], cell[0]))
    least = {cell: min(by[cell] for by in every if cell in by) for cell in cells}
    print(f"{'':<34}" + "".join(f"{tokens:>11,}" for _, tokens in cells) + "       mean  worst")
    print(f"{'batch':<34}" + "".join(f"{batch:>11g}" for batch, _ in cells))
    print(f"{'least loss':<34}" + "".join(f"{least[cell]:>11.4f}" for cell in cells))

    def row(name: str, by: dict[Cell, float], trained: dict[Cell, bool]) -> None:
        above = {cell: by[cell] - least[cell] for cell in cells}
        shown = "".join(f"{'' if trained[cell] else '≥'}{above[cell]:.4f}".rjust(11) for cell in cells)
        print(f"{name:<34}{shown}     {np.mean(list(above.values())):.4f} {max(above.values()):.4f}")

    for name, settings in ledgers.items():
        if unfinished := [cell for cell in cells if not any(cell in by for by in settings.values())]:
            print(f"{name:<34} unfinished: nothing yet at (batch, tokens) {', '.join(map(str, unfinished))}")
            continue
        best = {cell: min(by[cell] for by in settings.values() if cell in by) for cell in cells}
        everywhere = dict.fromkeys(cells, True)
        if len(settings) == 1:
            row(f"{name}, by the law", best, everywhere)
            continue
        row(f"{name}, tuned in every cell", best, everywhere)
        chosen = {min(settings, key=lambda s: settings[s].get(cell, np.inf)) for cell in cells}
        for setting in sorted(chosen):
            by = {}
            for cell in cells:
                highest = max(other for other in settings if cell in settings[other] and other <= setting)
                by[cell] = settings[highest][cell]
            row(f"{name}, {setting:g} in every cell", by, {cell: cell in settings[setting] for cell in cells})


if __name__ == "__main__":
    main()
