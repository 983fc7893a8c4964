"""One self-contained HTML page of runs: tables, and pictures as SVG inside it. It needs no network and no script."""

from __future__ import annotations

import html
import io
import json
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from train.config import LAW_SEQUENCE_LENGTH, Config, load, setting_values
from train.track import read_lines

POINTS = 600  # of a curve at most: more of them are averaged
_MEASURES = ("loss", "bits_per_byte")
_ITS_OWN = ("run.name", "run.folder")  # of every run
_SHADES = {"warmup": "tab:orange", "trunk": "tab:blue", "decay": "tab:green", "rewarmup": "tab:orange"}

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62em; margin: 2em auto; padding: 0 1em; color: #222 }
div.table { overflow-x: auto } pre { overflow-x: auto; background: #f6f6f6; padding: 1em; font-size: 13px }
table { border-collapse: collapse; margin: 1em 0; font-variant-numeric: tabular-nums }
td, th { padding: .2em .7em; border-bottom: 1px solid #ddd; text-align: right }
td:first-child, th:first-child { text-align: left }
svg { max-width: 100%; height: auto } h1 { font-size: 1.5em } h2 { font-size: 1.15em; margin-top: 2em }
p.note { color: #555 } b { color: #0a6b2d }
"""


def page(title: str, parts: Sequence[str]) -> str:
    """The whole page around its parts, which are HTML."""
    head = (
        f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{html.escape(title)}</title>'
    )
    return f"<!doctype html>\n{head}<style>{_STYLE}</style>\n<h1>{html.escape(title)}</h1>\n" + "\n".join(parts) + "\n"


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Rows of text; a cell given as a one-element tuple stands out."""

    def cell(value: Any) -> str:
        return (
            f"<td><b>{html.escape(str(value[0]))}</b></td>"
            if isinstance(value, tuple)
            else f"<td>{html.escape(str(value))}</td>"
        )

    lines = ["<tr>" + "".join(f"<th>{html.escape(name)}</th>" for name in header) + "</tr>"]
    lines += ["<tr>" + "".join(cell(value) for value in row) + "</tr>" for row in rows]
    return '<div class="table"><table>\n' + "\n".join(lines) + "\n</table></div>"


def picture(figure: Any) -> str:
    """A matplotlib figure as SVG, and closed."""
    from matplotlib import pyplot

    buffer = io.StringIO()
    with pyplot.rc_context({"svg.fonttype": "none", "svg.hashsalt": "powertrain"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    pyplot.close(figure)
    return buffer.getvalue().partition("<!DOCTYPE")[2].partition(">")[2].strip()


class Run:
    """What a run's folder tells."""

    def __init__(self, folder: Path, name: str | None = None) -> None:
        self.folder, self.name = folder, name or folder.name
        # matplotlib would take $ for mathematics, and leave out what begins with _.
        self.label = ("\u200b" if self.name.startswith("_") else "") + self.name.replace("$", r"\$")
        self.config: Config = load(folder / "config.yaml")
        if self.config.data.tokenizer.path == str(folder / "tokenizer"):
            self.config.data.tokenizer.path = None  # the one that was trained for it, which a resumed run names
        lines = [line for line in read_lines(folder / "metrics.jsonl") if line["lm_loss"] is not None]
        self.lines = lines
        self.tokens = np.array([line["tokens"] + line["batch"] * LAW_SEQUENCE_LENGTH for line in lines])
        self.phases = self._phases()
        self.evaluations = read_lines(folder / "evals.jsonl")
        self.overall = [line for line in self.evaluations if line["corpus"] == "overall"]
        self.record = _read(folder / "run.json")
        steps = [re.search(r"step-0*(\d+)", start["from"] or "") for start in self.record.get("starts", [])[1:]]
        went_on = {int(step[1]) + 1 for step in steps if step}
        self.resumed = [line["tokens"] for line in lines if line["step"] in went_on]  # the clock at each later start
        done = bool(lines) and self.tokens[-1] >= self.config.end_tokens  # its own page comes before exit.json
        # A start that was refused later has left its own reason.
        reason = str(_read(folder / "exit.json").get("reason") or "running").partition("\n")[0]
        self.ended = "finished" if done else reason[:80]

    def _phases(self) -> list[tuple[str, float, float]]:
        """(phase, tokens where it begins, where it ends), in the order of the run."""
        lines = self.lines
        begins = [i for i, line in enumerate(lines) if i == 0 or line["phase"] != lines[i - 1]["phase"]]
        # From the end of the first step: a logarithmic axis has no place for 0 tokens.
        firsts = [lines[i]["tokens"] if i else self.tokens[0] for i in begins]
        ends = [self.tokens[i - 1] for i in [*begins[1:], len(lines)]] if lines else []
        return [(lines[i]["phase"], *reach) for i, *reach in zip(begins, firsts, ends, strict=True)]

    def curve(self, name: str, logarithmic: bool = False) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """Tokens and a metric over them; of more than POINTS values, means over equal stretches of the axis."""
        values = np.array([np.nan if line.get(name) is None else line[name] for line in self.lines], dtype=float)
        if len(values) <= POINTS:
            return self.tokens, values
        space = np.geomspace if logarithmic else np.linspace
        ends = np.unique(np.searchsorted(self.tokens, space(self.tokens[0], self.tokens[-1], POINTS), side="right"))
        starts = np.concatenate([[0], ends[:-1]])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # a stretch of skipped steps has no mean
            means = [np.nanmean(values[a:b]) for a, b in zip(starts, ends, strict=True)]
        return self.tokens[ends - 1], np.array(means)


def _read(path: Path) -> Any:
    """The object in a file; {} where there is none, or none that can be read, as a power cut leaves it."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}


def runs_page(folders: Sequence[Path]) -> str:
    """A page of one run, or of several over each other.

    Raises:
        ConfigError: a folder that is not a run's.
    """
    runs = [Run(folder) for folder in folders]
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
    parts = [summary(runs), *differences(runs), *overlays(runs), *evaluations(runs)]
    parts += [part for run in runs for part in _experts(run)]
    return page(title, [*parts, *(starts(run) for run in runs)])


def summary(runs: Sequence[Run]) -> str:
    """A row for each run."""
    rows = []
    for run in runs:
        last = run.overall[-1] if run.overall else {}
        skipped = sum(bool(line["skipped"]) for line in run.lines)
        rate = np.median([line["tokens_per_second"] for line in run.lines]) if run.lines else float("nan")
        rows.append(
            (
                run.name,
                f"{run.record.get('parameters', {}).get('total', 0):,}" if run.record.get("parameters") else "",
                run.config.schedule["name"],
                f"{run.tokens[-1] if len(run.tokens) else 0:,.0f}",
                f"{run.lines[-1]['step'] if run.lines else 0:,}" + (f" ({skipped} skipped)" if skipped else ""),
                *(("not finite" if last[m] is None else f"{last[m]:.4f}") if last else "" for m in _MEASURES),
                f"{rate:,.0f}",
                run.ended,
            )
        )
    names = (
        "run",
        "parameters",
        "schedule",
        "tokens",
        "steps",
        "validation loss",
        "bits a byte",
        "tokens/s, median",
        "ended",
    )
    return table(names, rows)


def differences(runs: Sequence[Run]) -> list[str]:
    """The settings that are not the same in all runs."""
    settings = [dict(setting_values(run.config)) for run in runs]
    names = [name for name in dict.fromkeys(name for each in settings for name in each) if name not in _ITS_OWN]
    values = [(name, [str(each.get(name, "")) for each in settings]) for name in names]
    rows = [(name, *each) for name, each in values if len(set(each)) > 1]
    if not rows:
        return []
    return ["<h2>Settings that differ</h2>", table(["setting", *(run.name for run in runs)], rows)]


def evaluations(runs: Sequence[Run]) -> list[str]:
    """The last evaluation of each corpus and task, with the least loss there was, and how they came to it."""
    found: list[tuple[str, str, int, dict[str, float]]] = []
    courses: dict[str, list[Any]] = {"loss": [], "acc": []}  # of corpora, and of tasks
    for run in runs:
        for corpus in dict.fromkeys(line["corpus"] for line in run.evaluations):
            lines = [line for line in run.evaluations if line["corpus"] == corpus]
            last = {k: v for k, v in lines[-1].items() if isinstance(v, float)}
            if losses := [line["loss"] for line in lines if line.get("loss") is not None]:
                last["least loss"] = min(losses)
            found.append((run.name, corpus, lines[-1]["step"], last))
            for metric, course in courses.items():
                if metric in last and corpus != "overall" and len(lines) > 1:
                    points = [(line["tokens"], line[metric]) for line in lines if line.get(metric) is not None]
                    course.append((f"{corpus}, {run.label}" if len(runs) > 1 else corpus, points))
    if not found:
        return []
    names = list(dict.fromkeys(name for *_, last in found for name in last))
    rows = [
        (corpus, run, f"{step:,}", *(f"{last[name]:.4f}" if name in last else "" for name in names))
        for run, corpus, step, last in found
    ]
    header = ["corpus or task", "run", "step", *(name.replace("_", " ") for name in names)]
    parts = [f"<h2>Evaluations</h2>\n<p class=note>The last of each.</p>\n{table(header, rows)}"]
    labels = {"loss": "validation loss (nats a token)", "acc": "accuracy"}
    shown = [(labels[metric], course) for metric, course in courses.items() if course]
    return [*parts, *([_courses(shown)] if shown else [])]


def _courses(shown: Sequence[tuple[str, Sequence[Any]]]) -> str:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import EngFormatter

    figure, axes = pyplot.subplots(1, len(shown), figsize=(9, 3.4), squeeze=False, layout="constrained")
    for axis, (label, courses) in zip(axes[0], shown, strict=True):
        for name, points in courses:
            axis.plot(*zip(*points, strict=True), "o-", markersize=3, linewidth=1, label=name)
        axis.set(xlabel="tokens", ylabel=label)
        axis.xaxis.set_major_formatter(EngFormatter())
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    return picture(figure)


def starts(run: Run) -> str:
    """Every start of a run: when, from where, by what it was run, and what was changed; then all settings."""
    rows = []
    for start in run.record.get("starts", []):
        hardware = start["hardware"]
        changed = "; ".join(f"{name}: {old} → {new}" for name, (old, new) in start["changed_settings"].items())
        rows.append(
            (
                start["time"].replace("T", " ").replace("+00:00", " UTC"),
                Path(start["from"]).name if start["from"] else "the beginning",
                f"{start['engine']}, {hardware['ranks']} × {hardware['device']}, {', '.join(hardware['kernels'])}",
                f"torch {start['versions']['torch']}",
                (start["commit"] or "")[:10],
                changed,
            )
        )
    header = ("started", "from", "on", "with", "commit", "settings changed")
    settings = html.escape((run.folder / "config.yaml").read_text(encoding="utf-8"))
    return (
        f"<h2>Starts and settings of {html.escape(run.name)}</h2>\n{table(header, rows) if rows else ''}\n"
        f"<details><summary>config.yaml</summary><pre>{settings}</pre></details>"
    )


def overlays(runs: Sequence[Run]) -> list[str]:
    """Loss over the logarithm of tokens; rate with its phases, gradient norm and throughput over tokens; all runs."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import EngFormatter

    runs = [run for run in runs if run.lines]
    if not runs:
        return ["<p>No step has been taken.</p>"]
    # Fixed margins: fitting them to the labels would take longer than drawing.
    figure, loss = pyplot.subplots(figsize=(9, 4.2))
    figure.subplots_adjust(left=0.08, right=0.98, bottom=0.13, top=0.97)
    for number, run in enumerate(runs):
        color = f"C{number % 10}"
        loss.plot(*run.curve("lm_loss", logarithmic=True), color=color, linewidth=1, label=run.label)
        if run.overall:
            evaluated = [(line["tokens"], line["loss"]) for line in run.overall]
            alone: dict[str, Any] = {"color": "C1", "label": "validation"} if len(runs) == 1 else {"color": color}
            loss.plot(*zip(*evaluated, strict=True), "o", markersize=4, **alone)
    loss.set(xlabel="tokens", ylabel="cross-entropy (nats a token)", xscale="log")
    loss.legend(fontsize=8)

    panels = [
        ("lr", "learning rate"),
        ("grad_norm", "gradient norm, unclipped"),
        ("tokens_per_second", "tokens a second"),
    ]
    if any(line.get("mfu") for run in runs for line in run.lines[-1:]):
        panels.append(("mfu", "share of the peak (MFU)"))
    below, axes = pyplot.subplots(len(panels), 1, sharex=True, figsize=(9, 2.5 * len(panels)))
    below.subplots_adjust(left=0.11, right=0.98, bottom=0.07, top=0.98, hspace=0.08)
    for axis, (metric, unit) in zip(axes, panels, strict=True):
        for number, run in enumerate(runs):
            axis.plot(*run.curve(metric), color=f"C{number % 10}", linewidth=1)
        axis.set_ylabel(unit)
    axes[-1].set_xlabel("tokens")
    for axis in (loss, *axes):
        axis.grid(alpha=0.3)
        axis.xaxis.set_major_formatter(EngFormatter())
        for number, run in enumerate(runs):
            _phases(axis, run, None if len(runs) == 1 else f"C{number % 10}", named=axis in (loss, axes[0]))
    return [
        f"<h2>Loss</h2>\n{picture(figure)}",
        f"<h2>Learning rate, gradient norm, throughput</h2>\n{picture(below)}",
    ]


def _phases(axis: Any, run: Run, color: str | None, named: bool) -> None:
    """Shade the phases of the schedule, or mark where they begin in the color of the run; mark where it went on."""
    for number, (phase, first, last) in enumerate(run.phases):
        if color is None:
            axis.axvspan(first, last, color=_SHADES.get(phase, "grey"), alpha=0.1)
        elif number:
            axis.axvline(first, color=color, linestyle=":", linewidth=0.8)
        if named and color is None:
            height = 0.02 + 0.07 * (number % 2)  # or a short phase's name would lie under the next one
            axis.text(first, height, f" {phase}", transform=axis.get_xaxis_transform(), fontsize=8)
    for tokens in run.resumed:
        axis.axvline(tokens, ymax=0.04, color=color or "black", linewidth=1)


def _experts(run: Run) -> list[str]:
    """Load of the experts: the worst layer over tokens, and every expert at the newest checkpoint."""
    if not run.lines or "expert_load" not in run.lines[-1]:
        return []
    from matplotlib import pyplot
    from matplotlib.ticker import EngFormatter

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3))
    figure.subplots_adjust(left=0.08, right=0.98, bottom=0.17, top=0.97)
    every = max(1, len(run.lines) // POINTS)
    for axis, name, label in zip(
        axes, ("max_over_mean", "entropy"), ("largest load / mean", "entropy / uniform"), strict=True
    ):
        axis.plot(run.tokens[::every], [line["expert_load"][name] for line in run.lines[::every]], linewidth=1)
        axis.set(xlabel="tokens", ylabel=f"{label}, worst layer")
        axis.xaxis.set_major_formatter(EngFormatter())
        axis.grid(alpha=0.3)
    parts = [f"<h2>Experts of {html.escape(run.name)}</h2>\n{picture(figure)}"]
    chosen = [line for line in run.lines[::every] if "layer_entropy" in line["expert_load"]]
    if len(chosen) > 1:
        entropy = np.array([line["expert_load"]["layer_entropy"] for line in chosen]).T
        figure, axis = _layers(len(entropy), "entropy of the load / uniform, by layer over tokens")
        reach = (chosen[0]["tokens"], chosen[-1]["tokens"], len(entropy) - 0.5, -0.5)
        image = axis.imshow(entropy, aspect="auto", cmap="viridis", interpolation="nearest", extent=reach)
        axis.set(xlabel="tokens", ylabel="layer")
        axis.xaxis.set_major_formatter(EngFormatter())
        figure.colorbar(image)
        parts.append(picture(figure))
    states = sorted((run.folder / "checkpoints").glob("step-*/state.json"))
    if states and (state := _read(states[-1])):
        load = np.array(state["assignments"], dtype=float)
        load /= np.maximum(load.mean(axis=1, keepdims=True), 1e-9)
        figure, axis = _layers(len(load), f"load over the mean, {states[-1].parent.name}")
        image = axis.imshow(load, aspect="auto", cmap="RdBu_r", vmin=0, vmax=2, interpolation="nearest")
        axis.set(xlabel="expert", ylabel="layer")
        figure.colorbar(image)
        parts.append(picture(figure))
    return parts


def _layers(count: int, title: str) -> tuple[Any, Any]:
    """A figure for a picture with a row for each layer."""
    from matplotlib import pyplot
    from matplotlib.ticker import MaxNLocator

    height = 1.1 + 0.18 * count
    figure, axis = pyplot.subplots(figsize=(9, height))
    figure.subplots_adjust(left=0.06, right=1.0, bottom=0.55 / height, top=1 - 0.4 / height)
    axis.set_title(title)
    axis.yaxis.set_major_locator(MaxNLocator(integer=True))
    return figure, axis
