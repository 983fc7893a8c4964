"""A picture of a run."""

from __future__ import annotations

from pathlib import Path

from train.config import LAW_SEQUENCE_LENGTH
from train.track import read_lines


def plot(folder: Path) -> Path:
    """Draw loss and rate over tokens from metrics.jsonl and evals.jsonl; returns the picture's path."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = [line for line in read_lines(folder / "metrics.jsonl") if line["lm_loss"] is not None]
    tokens = [line["tokens"] + line["batch"] * LAW_SEQUENCE_LENGTH for line in lines]
    evaluations = [line for line in read_lines(folder / "evals.jsonl") if line["corpus"] == "overall"]

    figure, (top, bottom) = pyplot.subplots(2, 1, sharex=True, figsize=(8, 6), height_ratios=[2, 1])
    top.plot(tokens, [line["lm_loss"] for line in lines], color="tab:blue", linewidth=0.8, label="training")
    top.plot(
        [line["tokens"] for line in evaluations],
        [line["loss"] for line in evaluations],
        "o-",
        color="tab:orange",
        markersize=4,
        label="validation",
    )
    top.set_ylabel("cross-entropy (nats a token)")
    top.set_title(folder.name)
    top.legend()
    bottom.plot(tokens, [line["lr"] for line in lines], color="tab:green")
    bottom.set_ylabel("learning rate η")
    bottom.set_xlabel("tokens")
    for axis in (top, bottom):
        axis.grid(alpha=0.3)
        for earlier, line, token in zip(lines, lines[1:], tokens[1:], strict=False):
            if line["phase"] != earlier["phase"]:
                axis.axvline(token, color="grey", linestyle=":")
    path = folder / "loss_and_rate.png"
    figure.savefig(path, dpi=120, bbox_inches="tight")
    pyplot.close(figure)
    return path
