"""What the law is worth outside its sweep: the learning rate of each form, and two others, against a sweep there.

    python transfer.py ledger.jsonl transfer.jsonl

Prints each candidate's rate, its loss by the parabola through the rates near the best one, and the regret in nats.
"""

import json
import math
import sys
from pathlib import Path

import numpy as np

from powertrain.schedulers.law import fit


def main() -> None:
    """Compare the candidates."""
    swept, there = (
        [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()] for path in sys.argv[1:3]
    )
    batch, tokens = there[0]["batch"], there[0]["tokens"]
    law = fit(swept)
    predicted = law.chosen.lr(batch, tokens)
    nearest = min(
        (cell for cell in law.cells if cell.usable),
        key=lambda cell: abs(math.log(cell.batch / batch)) + abs(math.log(cell.tokens / tokens)),
    )
    best_there = nearest.rates[int(np.argmin(nearest.losses))]
    candidates = {
        **{f"the form '{name}'": form.lr(batch, tokens).value for name, form in law.forms.items()},
        f"the law, '{law.chosen.name}' ({predicted.low:.4f} to {predicted.high:.4f})": predicted.value,
        f"the best rate at batch {nearest.batch:g}, {nearest.tokens:,} tokens": best_there,
        "a = 4, b = -0.51": 4 * batch * tokens**-0.51,
    }
    by_rate: dict[float, list[float]] = {}
    for line in there:
        by_rate.setdefault(line["lr"], []).append(line["loss"])
    print(f"{'rate':>9}  loss, mean over seeds (and each)")
    for rate in sorted(by_rate):
        print(f"{rate:9.4f}  {np.mean(by_rate[rate]):.4f}  ({', '.join(f'{loss:.4f}' for loss in by_rate[rate])})")
    scatter = [np.std(losses, ddof=1) for losses in by_rate.values() if len(losses) > 1]
    noise = np.mean(scatter) if scatter else math.nan
    rates = np.array(sorted(by_rate))
    losses = np.array([np.mean(by_rate[rate]) for rate in rates])
    near = np.argsort(losses)[:4]
    square, slope, level = np.polyfit(np.log(rates[near]), losses[near], 2)
    best = -slope / (2 * square)
    least = level + slope * best / 2
    print(f"\nbest rate {math.exp(best):.4f}, loss {least:.4f}; standard deviation of a seed {noise:.4f}")
    for name, rate in candidates.items():
        trained = np.flatnonzero(np.abs(np.log(rates / rate)) < 0.03)
        if len(trained):
            regret, how = losses[trained[0]] - least, "trained"
        else:
            regret, how = square * (math.log(rate) - best) ** 2, "by the parabola"
        print(f"{rate:9.4f}  {regret:+.4f} nats, {how}: {name}")


if __name__ == "__main__":
    main()
