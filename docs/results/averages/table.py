"""The table and the picture of results.jsonl: losses at equal tokens, mean over seeds, as nats below the raw weights.

python docs/results/averages/table.py
"""

import json
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent


def main():
    losses = {}
    for line in map(json.loads, (HERE / "results.jsonl").read_text(encoding="utf-8").splitlines()):
        losses.setdefault((line["schedule"], line["steps"]), {}).setdefault(line["how"], {})[line["seed"]] = line[
            "loss"
        ]
    groups = sorted(losses)
    ways = list(dict.fromkeys(how for group in groups for how in losses[group]))
    print("| | " + " | ".join(f"{schedule}, {steps * 1024:,} tokens" for schedule, steps in groups) + " |")
    print("|---" * (len(groups) + 1) + "|")
    figure, axes = plt.subplots(1, 2, figsize=(10, 5), sharey=True, layout="constrained")
    for how in ways:
        cells = []
        for group in groups:
            raw, own = losses[group]["raw"], losses[group].get(how, {})
            if how == "raw":
                cells.append(f"{np.mean(list(raw.values())):.4f}")
            elif own:
                gains = [own[seed] - raw[seed] for seed in own]
                cells.append(f"{np.mean(gains):+.4f} ({min(gains):+.4f} … {max(gains):+.4f})")
            else:
                cells.append("–")
        print(f"| {how} | " + " | ".join(cells) + " |")
    for axis, name in zip(axes, ("power", "wsd"), strict=True):
        for how in ways[1:]:
            at = [(steps, by) for (schedule, steps), by in losses.items() if schedule == name and how in by]
            x = [steps * 1024 for steps, _ in at]
            y = [np.mean([by["raw"][seed] - loss for seed, loss in by[how].items()]) for _, by in at]
            style = "-" if how.startswith("decay") else "--" if how.startswith("merge") else ":"
            axis.plot(x, y, style, marker="o", markersize=3, label=how)
        axis.set(xscale="log", xlabel="tokens", title=name)
        axis.axhline(0, color="gray", linewidth=0.5)
    axes[0].set_ylabel("nats below the raw weights")
    axes[1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(HERE / "averages.png", dpi=100)


if __name__ == "__main__":
    main()
