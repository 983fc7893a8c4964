"""How the best learning rate grows with the batch under both rules of β2, and what each rule's best loss is.

    python docs/results/beta2/slopes.py

Best rates and losses are those of `fit` (powertrain.schedulers.cells). Intervals are 95% ones, from 2000 repetitions
with noise on every trunk as large as the ledgers show it; the runs at 16 sequences, which both rules share, have the
same in both.
"""

import json
import math
from pathlib import Path

import numpy as np

from powertrain.schedulers.cells import Trials, noise_of, parabolas
from powertrain.schedulers.law import fit

HERE, RULES, SEQUENCES = Path(__file__).parent, ("constant", "halflife"), (1, 2, 4, 8, 16)
PARTS = (SEQUENCES, (1, 2, 4, 8), (1, 2, 4), (1, 2), (2, 4), (4, 8), (8, 16))
LAW = HERE.parent / "law" / "ledger.jsonl"
TOKENS, REPLICATES = 64, 2000  # of a sequence; of the noise


def ledger() -> list[dict]:
    """Every trial of both rules, told apart by the family."""
    lines = []
    for rule in RULES:
        for sequences in SEQUENCES:
            name = "constant-16" if sequences == 16 else f"{rule}-{sequences}"  # 0.95 there by either rule
            text = (HERE / f"{name}.jsonl").read_text(encoding="utf-8")
            lines += [{**json.loads(line), "family": rule} for line in text.splitlines()]
    return lines


def fitted(lines: list[dict], replicates: int = 0) -> dict[tuple[str, int, int], np.ndarray]:
    """(rule, tokens, sequences) → (log best rate, loss there) by replicate: (2, 1 + R), nan where it is not inside."""
    trials = Trials(lines)
    plain, *_ = parabolas(trials, np.zeros((1, len(trials.groups), trials.trunks)))
    sigma, shared = noise_of(trials, plain)
    noise = trials.noise(sigma, shared, replicates, np.random.default_rng(0))
    for (size, tokens, batch), by_rate in trials.losses.items():
        if size[0] == "halflife" and batch == 16 * TOKENS / 4096:
            twin = trials.losses[("constant", size[1]), tokens, batch]
            here, there = (trials.groups.index((s, tokens)) for s in (size, ("constant", size[1])))
            for rate, entries in by_rate.items():
                for (trunk, _), (other, _) in zip(entries, twin[rate], strict=True):
                    noise[:, here, trunk] = noise[:, there, other]
    found = {}
    for p, (size, tokens, batch) in zip(parabolas(trials, noise)[0], trials.cells, strict=True):
        values = np.where(p.usable, [p.log_lr, p.loss], np.nan)
        found[size[0], tokens, round(batch * 4096 / TOKENS)] = values
    if replicates:
        print("standard deviation of a loss:", {f"{s[0]} {t:,}": round(v, 4) for (s, t), v in sigma.items()})
        print(f"share of its variance common to a trunk's horizons: {shared:.2f}")
    return found


def slope(found: dict, rule: str, tokens: int, sequences: tuple[int, ...]) -> np.ndarray:
    """Of log best rate over log batch, by least squares, in every replicate."""
    x = np.log(sequences) - np.mean(np.log(sequences))
    return x @ np.stack([found[rule, tokens, s][0] for s in sequences]) / (x @ x)


def told(values: np.ndarray, digits: int = 2, sign: str = "") -> str:
    value, low, high = (f"{v:{sign}.{digits}f}" for v in (values[0], *np.nanpercentile(values[1:], (2.5, 97.5))))
    return f"{value} [{low}, {high}]"


def main() -> None:
    """Print the tables."""
    lines = ledger()
    found = fitted(lines, REPLICATES)
    seeds = [fitted([line for line in lines if line["seed"] == seed]) for seed in (0, 1, 2)]
    horizons = sorted({tokens for _, tokens, _ in found})
    for tokens in horizons:
        print(
            f"\n{tokens:,} tokens: best rate (of each seed), loss there; half-life minus constant, nats (of each seed)"
        )
        for s in SEQUENCES:
            row = f"{s:3}"
            for rule in RULES:
                log_lr, loss = found[rule, tokens, s]
                own = " ".join(f"{math.exp(one[rule, tokens, s][0, 0]):.4f}" for one in seeds)
                row += f" | {told(np.exp(log_lr), 4)} ({own}) {loss[0]:.4f}"
            gain = found["halflife", tokens, s][1] - found["constant", tokens, s][1]
            own = " ".join(
                f"{one['halflife', tokens, s][1, 0] - one['constant', tokens, s][1, 0]:+.4f}" for one in seeds
            )
            print(f"{row} | {told(gain, 4, '+')} ({own})")
        gain = np.mean(
            [found["halflife", tokens, s][1] - found["constant", tokens, s][1] for s in SEQUENCES[:4]], axis=0
        )
        print(f"mean over 1 to 8 sequences {told(gain, 4, '+')}")
    for tokens in horizons:
        print(f"\n{tokens:,} tokens: slope of log best rate over log batch (of each seed)")
        for part in PARTS:
            row = f"{part[0]} to {part[-1]}".ljust(8)
            for rule in RULES:
                own = " ".join(f"{slope(one, rule, tokens, part)[0]:.2f}" for one in seeds)
                row += f" | {told(slope(found, rule, tokens, part))} ({own})"
            apart = slope(found, "halflife", tokens, part) - slope(found, "constant", tokens, part)
            print(f"{row} | {told(apart, 2, '+')}")
    print("\nboth horizons: mean slope")
    for part in PARTS[:3]:
        by_rule = [np.mean([slope(found, rule, tokens, part) for tokens in horizons], axis=0) for rule in RULES]
        print(
            f"{part[0]} to {part[-1]}".ljust(8),
            *(f"| {told(v)}" for v in by_rule),
            f"| {told(by_rule[1] - by_rule[0], 2, '+')}",
        )
    law = fit([json.loads(line) for line in LAW.read_text(encoding="utf-8").splitlines()], replicates=1)
    print("\nthe law of ../law at these batches: slope, by horizon")
    for part in PARTS[:3]:
        for name in ("smooth", "hard"):
            line = {
                ("", tokens, s): np.log([[law.forms[name].lr(s * TOKENS / 4096, tokens).value]])
                for tokens in horizons
                for s in part
            }
            print(f"{part[0]} to {part[-1]}".ljust(8), name, *(f"{slope(line, '', t, part)[0]:.2f}" for t in horizons))


if __name__ == "__main__":
    main()
