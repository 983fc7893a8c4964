"""Draw the curves of run.sh, and print the table of docs/continued-pretraining.md. Run it where runs/ is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

from powertrain.train.track import read_lines

RUNS = Path("runs")
COLOURS = {"power": "tab:blue", "wsd": "tab:orange", "cosine": "tab:green"}


def evaluations(name: str, corpus: str) -> list[dict[str, Any]]:
    return [line for line in read_lines(RUNS / name / "evals.jsonl") if line["corpus"] == corpus]


def main() -> None:
    figure, (top, bottom) = pyplot.subplots(2, 1, sharex=True, figsize=(9, 7), height_ratios=[2, 1])
    for name, colour in COLOURS.items():
        branches = [f"{name}-first", f"{name}-second"] if name == "power" else []
        for run, style in [(name, "-"), *((branch, "--") for branch in branches)]:
            lines = evaluations(run, "overall")
            label = {"power": "Power: trunk", "power-first": "Power: decay branches"}.get(run, run)
            top.plot(
                [line["tokens"] / 1e6 for line in lines],
                [line["loss"] for line in lines],
                style,
                marker=".",
                color=colour,
                label=None if run == "power-second" else label,
            )
            rates = read_lines(RUNS / run / "metrics.jsonl")
            bottom.plot([line["tokens"] / 1e6 for line in rates], [line["lr"] for line in rates], style, color=colour)
    top.set_ylabel("validation loss (nats a token)")
    top.set_ylim(top=6.5)
    top.legend()
    bottom.set_ylabel("learning rate η")
    bottom.set_xlabel("tokens (millions)")
    for axis in (top, bottom):
        axis.grid(alpha=0.3)
    figure.savefig("continued-pretraining.png", dpi=110, bbox_inches="tight")

    print("| run | at 0.74M tokens: addresses / code / overall | at 1.47M tokens: addresses / code / overall |")
    print("|---|---|---|")
    rows = (("Power", "power-first", "power-second"), ("WSD", "wsd-first", "wsd"), ("cosine", "cosine-first", "cosine"))
    for title, first, second in rows:
        cells = []
        for run in (first, second):
            cells.append(" / ".join(f"{evaluations(run, c)[-1]['loss']:.3f}" for c in ("addresses", "code", "overall")))
        print(f"| {title} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
