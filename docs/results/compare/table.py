"""Nats above the least loss of each cell (batch, horizon): schedules tuned in every cell, tuned in one, or by the law.

    python docs/results/compare/table.py        # seed 0, and then the means of what has three seeds

A setting that the sweep pruned in a cell (its learning rate lay more than two above the best one) has no loss there. It
is counted with the loss of the highest learning rate that was trained, less than its own would be, and marked with ≥.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

Cell = tuple[float, int]


def losses(path: Path, seeds: tuple[int, ...]) -> dict[float, dict[Cell, float]]:
    """Mean loss by learning rate (WSD, cosine) or a (Power) and by cell, where each of these seeds is done."""
    seen: dict[float, dict[Cell, dict[int, float]]] = {}
    for line in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
        if line["status"] == "finished" and line["seed"] in seeds:
            setting = seen.setdefault(line["lr"] if line["schedule"] != "power" else line["a"], {})
            setting.setdefault((line["batch"], line["tokens"]), {})[line["seed"]] = line["loss"]
    means = {
        setting: {cell: float(np.mean(list(of.values()))) for cell, of in by.items() if len(of) == len(seeds)}
        for setting, by in sorted(seen.items())
    }
    return {setting: by for setting, by in means.items() if by}


def main() -> None:
    """Print the tables."""
    for seeds in ((0,), (0, 1, 2)):
        print(f"\nseed {', '.join(map(str, seeds))}")
        table(seeds)


def table(seeds: tuple[int, ...]) -> None:
    """One table: every schedule that is done in all cells."""
    paths = sorted((Path(__file__).parent / "ledgers").glob("*.jsonl"))
    ledgers = {path.stem: found for path in paths if (found := losses(path, seeds))}
    if not ledgers:
        return
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
            row(name, best, everywhere)
            continue
        row(f"{name}, tuned in every cell", best, everywhere)
        chosen = {min(settings, key=lambda s: settings[s].get(cell, np.inf)) for cell in cells}
        for setting in sorted(chosen):
            by = {}
            for cell in cells:
                if lower := [other for other in settings if cell in settings[other] and other <= setting]:
                    by[cell] = settings[max(lower)][cell]
            if len(by) < len(cells):
                print(f"{name}, {setting:g}: not trained in every cell")
                continue
            row(f"{name}, {setting:g} in every cell", by, {cell: cell in settings[setting] for cell in cells})


if __name__ == "__main__":
    main()
