"""Smooth, hard or between? Forms η = (η_max^-p + (a·β·T^b)^-p)^(-1/p), of which p = 1 is smooth and p = ∞ hard.

    python between.py ledger.jsonl …

Prints for each p the cost of the fit to all cells (the sum of soft L1 losses, plus that of b's prior), b, η_max, and
the mean regret in nats on cells that the fit did not have: the longest third of the horizons, the largest third of the
batches, both (fitted to cells with neither), and the largest model. With an exponent of the parameters where
`powertrain fit` has one, whose splits are others.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
from scipy.optimize import least_squares

from powertrain.schedulers.forms import PRIOR_B, PRIOR_B_SCALE, SCALE
from powertrain.schedulers.held_out import regret_of
from powertrain.schedulers.law import fit


def main() -> None:
    """Print the table."""
    law = fit(
        [json.loads(line) for path in sys.argv[1:] for line in Path(path).read_text(encoding="utf-8").splitlines()]
    )
    cells = [cell for cell in law.cells if cell.usable]
    tokens, batch, best = (np.log([getattr(cell, name) for cell in cells]) for name in ("tokens", "batch", "lr"))
    with_size = law.chosen.central_parameters is not None
    size = np.log([cell.parameters for cell in cells]) if with_size else np.zeros(len(cells))
    tokens, size = tokens - tokens.mean(), size - size.mean()
    regrets = [regret_of(cell) for cell in cells]

    def form(numbers: np.ndarray, p: float) -> np.ndarray:
        line = numbers[0] + numbers[1] * tokens + batch
        capped = np.minimum(line, numbers[2]) if p == np.inf else -np.logaddexp(-p * line, -p * numbers[2]) / p
        return capped + numbers[3:].sum() * size

    def fitted(p: float, kept: np.ndarray) -> tuple[np.ndarray, float]:
        def residuals(numbers: np.ndarray) -> np.ndarray:
            off = (form(numbers, p) - best)[kept]
            return np.append(off, (numbers[1] - PRIOR_B) * SCALE / PRIOR_B_SCALE)

        found = []
        for cap in (*np.quantile(best, [0.4, 0.8]), best.max() + 0.7):  # the cost has more than one minimum
            start = [np.median(best - batch) + 0.3, PRIOR_B, cap] + [0.0] * with_size
            found.append(least_squares(residuals, start, loss="soft_l1", f_scale=SCALE))
        least = min(found, key=lambda one: one.cost)
        return least.x, float(least.cost)

    long, large = (of >= np.quantile(of, 2 / 3) - 1e-9 for of in (tokens, batch))
    counts = np.array([cell.parameters or 0 for cell in cells])
    splits = {
        "long": (long, ~long),
        "large batch": (large, ~large),
        "both": (long & large, ~long & ~large),
        "largest model": (counts == counts.max(), counts < counts.max()),
    }
    print(f"{len(cells)} cells\n{'p':>4} {'cost':>8} {'b':>7} {'η_max':>8}  " + "  ".join(f"{n:>13}" for n in splits))
    for p in (1, 1.5, 2, 3, 4, 8, np.inf):
        numbers, cost = fitted(p, np.ones(len(cells), bool))
        line = f"{p:>4g} {cost:>8.4f} {numbers[1]:>7.3f} {np.exp(numbers[2]):>8.4f}  "
        for out, kept in splits.values():
            if kept.sum() < 6 or not out.any():
                line += f"{'–':>13}  "
                continue
            predicted = form(fitted(p, kept)[0], p)
            line += f"{np.mean([regrets[i](predicted[i]) for i in np.flatnonzero(out)]):>13.4f}  "
        print(line)


if __name__ == "__main__":
    main()
