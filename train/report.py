"""One self-contained HTML page of runs: tables, and pictures as SVG inside it. It needs no network and no script."""

from __future__ import annotations

import html
import io
import json
import math
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from powertrain.data.files import read_record
from powertrain.train.compose import load
from powertrain.train.config import LAW_SEQUENCE_LENGTH, Config, setting_values
from powertrain.train.state import RAW
from powertrain.train.track import read_spread, weights_of

POINTS = 600  # of a curve at most: more of them are averaged
_MEASURES = ("loss", "bits_per_byte")
_AVERAGE = " (average)"  # after the corpus that the running average was evaluated on
_ITS_OWN = ("run.name", "run.folder")  # differ in every run
_SHADES = {"warmup": "tab:orange", "trunk": "tab:blue", "decay": "tab:green", "rewarmup": "tab:orange"}
_LINES = ("solid", "dashed", "dotted")  # as matplotlib and CSS name them

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62em; margin: 2em auto; padding: 0 1em; color: #222 }
div.table { overflow-x: auto } pre { white-space: pre-wrap; background: #f6f6f6; padding: 1em; font-size: 13px }
table { border-collapse: collapse; margin: 1em 0; font-variant-numeric: tabular-nums }
td, th { padding: .2em .7em; border-bottom: 1px solid #ddd; text-align: right }
td:first-child, th:first-child { text-align: left }
svg { max-width: 100%; height: auto } h1 { font-size: 1.5em } h2 { font-size: 1.15em; margin-top: 2em }
p.note { color: #555 } b { color: #0a6b2d }
table.text td, table.text th { text-align: left; vertical-align: top }
table.text td { min-width: 5em; overflow-wrap: anywhere }
table.figures td:first-child { white-space: nowrap }
p.legend { font-size: 13px; margin: 0 } p.legend span { display: inline-block; margin-right: 1.5em }
p.legend i { display: inline-block; width: 2em; margin-right: .4em; vertical-align: middle; border-top: 3px }
"""


def page(title: str, parts: Sequence[str]) -> str:
    """The whole page around its parts, which are HTML."""
    head = (
        f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{html.escape(title)}</title>'
    )
    return f"<!doctype html>\n{head}<style>{_STYLE}</style>\n<h1>{html.escape(title)}</h1>\n" + "\n".join(parts) + "\n"


def table(header: Sequence[str], rows: Sequence[Sequence[Any]], kind: str = "figures") -> str:
    """Rows of text; a cell given as a one-element tuple is bold. `kind` "text" is left-aligned."""

    def cell(value: Any) -> str:
        return (
            f"<td><b>{html.escape(str(value[0]))}</b></td>"
            if isinstance(value, tuple)
            else f"<td>{html.escape(str(value))}</td>"
        )

    lines = ["<tr>" + "".join(f"<th>{html.escape(name)}</th>" for name in header) + "</tr>"]
    lines += ["<tr>" + "".join(cell(value) for value in row) + "</tr>" for row in rows]
    return f'<div class="table"><table class="{kind}">\n' + "\n".join(lines) + "\n</table></div>"


def picture(figure: Any) -> str:
    """A matplotlib figure as SVG."""
    from matplotlib import rc_context

    buffer = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "powertrain"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue().partition("<!DOCTYPE")[2].partition(">")[2].strip()


def looks(count: int) -> list[dict[str, Any]]:
    """Colors and line styles for that many lines, no two of the same color."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    if count <= 10:
        return [{"color": to_hex(f"C{number}"), "linestyle": "solid"} for number in range(count)]
    # Neighbours in color differ in their dashes, too.
    hues = [to_hex(colormaps["turbo"](0.03 + 0.94 * number / (count - 1))) for number in range(count)]
    return [{"color": hue, "linestyle": _LINES[number % len(_LINES)]} for number, hue in enumerate(hues)]


def legend(entries: Sequence[tuple[str, dict[str, Any]]]) -> str:
    """A legend as HTML, below a picture, where it covers nothing."""
    shown = [
        f'<span><i style="border-top-style: {look["linestyle"]}; border-top-color: {look["color"]}"></i>'
        f"{html.escape(name)}</span>"
        for name, look in entries
    ]
    return f'<p class="legend">{" ".join(shown)}</p>'


def plain(text: str) -> str:
    """A text escaped for matplotlib, which takes $ for mathematics, and omits labels that begin with _."""
    return ("\u200b" if text.startswith("_") else "") + text.replace("$", r"\$")


def number(line: dict[str, Any], name: str) -> float:
    """A number in a record; nan where it is missing or out of range."""
    value = line.get(name)
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not -(2**63) < value < 2**63:
        return math.nan
    return float(value)


def _dict(record: dict[str, Any], name: str) -> dict[str, Any]:
    """The object of that name in a record; {} for anything else."""
    found = record.get(name)
    return found if isinstance(found, dict) else {}


def _list(record: dict[str, Any], name: str) -> list[Any]:
    found = record.get(name)
    return found if isinstance(found, list) else []


class Run:
    """A run as its folder records it. What no run would have written there is skipped, which `notes` list.

    Raises:
        ConfigError: `folder` is not that of a run.
    """

    def __init__(self, folder: Path, name: str | None = None) -> None:
        self.folder, self.name = folder, name or folder.name
        self.config: Config = load(folder / "config.yaml")
        if self.config.data.tokenizer.path == str(folder / "tokenizer"):
            self.config.data.tokenizer.path = None  # the run's own, which config.yaml names once the run has resumed
        read, note = read_spread(folder / "metrics.jsonl")
        skipped = sum(bool(line.get("skipped")) for line in read)
        whole = bool(read) and len(read) == read[-1]["step"] - read[0]["step"] + 1
        self.skipped = "" if not skipped else f" ({skipped:,} skipped)" if whole else f" (at least {skipped:,} skipped)"
        lines = [line for line in read if number(line, "tokens") >= 0 and number(line, "batch") > 0]
        self.notes = [note] if note else []
        if skipped_lines := len(read) - len(lines):
            self.notes.append(f"{skipped_lines:,} line(s) of metrics.jsonl have no tokens or batch and are left out.")
        self.lines = lines = [line for line in lines if not math.isnan(number(line, "lm_loss"))]
        self.tokens = np.array([number(line, "tokens") + number(line, "batch") * LAW_SEQUENCE_LENGTH for line in lines])
        self.phases = self._phases()
        self.evaluations, note = read_spread(folder / "evals.jsonl")
        self.notes += [note] if note else []
        evaluations = len(self.evaluations)
        self.evaluations = [line for line in self.evaluations if "corpus" in line and number(line, "tokens") >= 0]
        if skipped_lines := evaluations - len(self.evaluations):
            self.notes.append(f"{skipped_lines:,} line(s) of evals.jsonl have no corpus or tokens and are left out.")
        for line in self.evaluations:
            line["corpus"] += "" if weights_of(line) == RAW else _AVERAGE
        self.overall = [line for line in self.evaluations if line["corpus"] == "overall"]
        self.record = read_record(folder / "run.json")
        self.starts = [start for start in _list(self.record, "starts") if isinstance(start, dict)]
        steps = [re.search(r"step-0*(\d{1,18})$", str(start.get("from"))) for start in self.starts[1:]]
        resumed_at = [int(step[1]) for step in steps if step]
        later = [next((line for line in lines if line["step"] > step), None) for step in resumed_at]
        self.resumed = [line["tokens"] for line in later if line]  # the clock at each resume
        begins = self.config.run.tokens_seen
        mixtures = [(begins + stage.from_tokens, stage.mixture) for stage in self.config.data.stages]
        self.mixtures = [(at, new) for at, new in mixtures if lines and lines[0]["tokens"] <= at < self.tokens[-1]]
        done = bool(lines) and self.tokens[-1] >= self.config.end_tokens  # its own page comes before exit.json
        # A start that was refused later has left its own reason.
        reason = str(read_record(folder / "exit.json").get("reason") or "running").partition("\n")[0]
        self.ended = "finished" if done else reason[:80]

    def _phases(self) -> list[tuple[str, float, float]]:
        """(phase, tokens where it begins, where it ends), in the order of the run."""
        lines = self.lines
        names = [str(line.get("phase", "")) for line in lines]
        begins = [i for i, name in enumerate(names) if i == 0 or name != names[i - 1]]
        # From the end of the first step: a logarithmic axis has no place for 0 tokens.
        firsts = [lines[i]["tokens"] if i else self.tokens[0] for i in begins]
        ends = [self.tokens[i - 1] for i in [*begins[1:], len(lines)]] if lines else []
        return [(names[i], *reach) for i, *reach in zip(begins, firsts, ends, strict=True)]

    def curve(self, name: str, logarithmic: bool = False) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """Tokens and a metric over them; of more than POINTS values, means over equal intervals of the axis."""
        values = np.array([number(line, name) for line in self.lines])
        if len(values) <= POINTS:
            return self.tokens, values
        space = np.geomspace if logarithmic else np.linspace
        ends = np.unique(np.searchsorted(self.tokens, space(self.tokens[0], self.tokens[-1], POINTS), side="right"))
        starts = np.concatenate([[0], ends[:-1]])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # an interval of skipped steps has no mean
            means = [np.nanmean(values[a:b]) for a, b in zip(starts, ends, strict=True)]
        return self.tokens[ends - 1], np.array(means)


def runs_page(folders: Sequence[Path]) -> str:
    """A page of one run, or of several in the same pictures.

    Raises:
        ConfigError: a folder is not that of a run.
    """
    runs = [Run(folder) for folder in folders]
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
    notes = [f"<p class=note>{html.escape(f'{run.name}: {note}')}</p>" for run in runs for note in run.notes]
    parts = [summary(runs), *notes, *differences(runs), *overlays(runs), *evaluations(runs)]
    parts += [part for run in runs for part in _experts(run)]
    return page(title, [*parts, *(starts(run) for run in runs)])


def summary(runs: Sequence[Run]) -> str:
    """A row for each run."""
    rows = []
    for run in runs:
        last = run.overall[-1] if run.overall else {}
        speeds = [number(line, "tokens_per_second") for line in run.lines]
        speeds = [speed for speed in speeds if not math.isnan(speed)]
        parameters = number(_dict(run.record, "parameters"), "total")
        rows.append(
            (
                run.name,
                "" if math.isnan(parameters) else f"{parameters:,.0f}",
                run.config.schedule["name"],
                f"{run.tokens[-1] if len(run.tokens) else 0:,.0f}",
                f"{run.lines[-1]['step'] if run.lines else 0:,}{run.skipped}",
                *((_figure(number(last, m)) or "not finite") if last else "" for m in _MEASURES),
                f"{np.median(speeds):,.0f}" if speeds else "",
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
    values = [(name, [_shown(each[name]) if name in each else "" for each in settings]) for name in names]
    rows = [[name, *each] for name, each in values if len(set(each)) > 1]
    if not rows:
        return []
    header = ["setting", *(run.name for run in runs)]
    if len(runs) > len(rows):  # the longer side downwards
        header, *rows = [list(column) for column in zip(header, *rows, strict=True)]
        header[0] = "run"
    return ["<h2>Settings that differ</h2>", table(header, rows, "text")]


def _shown(value: Any) -> str:
    """A setting as in YAML; an empty list as "", since the entries of another run's have rows of their own."""
    if value == []:
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _figure(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.4f}"


def evaluations(runs: Sequence[Run]) -> list[str]:
    """The last evaluation of each corpus and task, with the lowest loss, and curves of all."""
    found: list[tuple[str, str, int, dict[str, float]]] = []
    courses: dict[str, list[Any]] = {"loss": [], "acc": []}  # of corpora, and of tasks
    for run in runs:
        for corpus in dict.fromkeys(line["corpus"] for line in run.evaluations):
            lines = [line for line in run.evaluations if line["corpus"] == corpus]
            last = {k: v for k, v in lines[-1].items() if isinstance(v, float) and math.isfinite(v)}
            if losses := [loss for line in lines if not math.isnan(loss := number(line, "loss"))]:
                last["least loss"] = min(losses)
            found.append((run.name, corpus, lines[-1]["step"], last))
            for metric, course in courses.items():
                points = [(line["tokens"], number(line, metric)) for line in lines if metric in line]
                if metric in last and corpus not in ("overall", f"overall{_AVERAGE}"):
                    course.append((f"{corpus}, {run.name}" if len(runs) > 1 else corpus, _some(points)))
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
    # Points alone are in the table.
    shown = [(labels[m], course) for m, course in courses.items() if any(len(points) > 1 for _, points in course)]
    return [*parts, *([_courses(shown)] if shown else [])]


def _some(points: list[Any]) -> list[Any]:
    """At most POINTS of them, evenly spread, the last one included."""
    return points[:: -max(1, -(-len(points) // POINTS))][::-1]


def _courses(shown: Sequence[tuple[str, Sequence[Any]]]) -> str:
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    axes = figure.subplots(1, len(shown), squeeze=False)
    names = list(dict.fromkeys(name for _, courses in shown for name, _ in courses))
    look = dict(zip(names, looks(len(names)), strict=True))
    for axis, (label, courses) in zip(axes[0], shown, strict=True):
        for name, points in courses:
            axis.plot(*zip(*points, strict=True), marker="o", markersize=3, linewidth=1, **look[name])
        axis.set(xlabel="tokens", ylabel=label)
        axis.xaxis.set_major_formatter(EngFormatter())
        axis.grid(alpha=0.3)
    return picture(figure) + legend([*look.items()])


def starts(run: Run) -> str:
    """Every start of a run: when, from where, on what, with which commit and changes; then all settings."""
    rows = []
    for start in run.starts:
        hardware = _dict(start, "hardware")
        changes = [
            f"{name}: {' → '.join(map(_shown, pair)) if isinstance(pair, list) else _shown(pair)}"
            for name, pair in _dict(start, "changed_settings").items()
        ]
        changes += [f"the tracker {name} ended: {why}" for name, why in _dict(start, "trackers_ended").items()]
        device = f"{start.get('engine')}, {hardware.get('ranks')} × {hardware.get('device')}"
        rows.append(
            (
                str(start.get("time", "")).replace("T", " ").replace("+00:00", " UTC"),
                Path(str(start["from"])).name if start.get("from") else "the beginning",
                ", ".join([device, *map(str, _list(hardware, "kernels"))]),
                f"torch {_dict(start, 'versions').get('torch')}",
                str(start.get("commit") or "")[:10],
                "; ".join(changes),
            )
        )
    header = ("started", "from", "on", "with", "commit", "settings changed, trackers ended")
    settings = html.escape((run.folder / "config.yaml").read_text(encoding="utf-8", errors="replace"))
    return (
        f"<h2>Starts and settings of {html.escape(run.name)}</h2>\n{table(header, rows, 'text') if rows else ''}\n"
        f"<details><summary>config.yaml</summary><pre>{settings}</pre></details>"
    )


def overlays(runs: Sequence[Run]) -> list[str]:
    """Loss over the logarithm of tokens; learning rate with phases, gradient norm, throughput over tokens; all runs."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    runs = [run for run in runs if run.lines]
    if not runs:
        return ["<p>No step has been taken.</p>"]
    # Fixed margins: fitting them to the labels would take longer than drawing.
    figure = Figure(figsize=(9, 4.2))
    loss = figure.subplots()
    figure.subplots_adjust(left=0.08, right=0.98, bottom=0.13, top=0.97)
    look = looks(len(runs))
    entries = [(run.name, own) for run, own in zip(runs, look, strict=True)]
    for run, own in zip(runs, look, strict=True):
        loss.plot(*run.curve("lm_loss", logarithmic=True), linewidth=1, **own)
        if run.overall:
            evaluated = _some([(line["tokens"], number(line, "loss")) for line in run.overall])
            color = own["color"] if len(runs) > 1 else "C1"
            loss.plot(*zip(*evaluated, strict=True), "o", markersize=5, color=color, mec="black", mew=0.6, zorder=3)
    loss.set(xlabel="tokens", ylabel="cross-entropy (nats a token)", xscale="log")
    notes = ["Dots are validation losses."] if any(run.overall for run in runs) else []
    notes += [f"{run.name}: {len(run.overall):,} of them, some are drawn." for run in runs if len(run.overall) > POINTS]

    panels = [
        ("lr", "learning rate"),
        ("grad_norm", "gradient norm, unclipped"),
        ("tokens_per_second", "tokens a second"),
    ]
    if any(number(line, "mfu") > 0 for run in runs for line in run.lines[-1:]):
        panels.append(("mfu", "share of the peak (MFU)"))
    critical = {run.name for run in runs if any(number(line, "critical_batch") > 0 for line in run.lines)}
    if critical or any(len({number(line, "batch") for line in run.lines}) > 1 for run in runs):
        panels.insert(1, ("batch", "batch (× 4096 tokens)" + "\nfaint: critical batch" * bool(critical)))
    below = Figure(figsize=(9, 2.5 * len(panels)))
    axes = below.subplots(len(panels), 1, sharex=True)
    below.subplots_adjust(left=0.11, right=0.98, bottom=0.07, top=0.98, hspace=0.08)
    for axis, (metric, unit) in zip(axes, panels, strict=True):
        for run, own in zip(runs, look, strict=True):
            axis.plot(*run.curve(metric), linewidth=1, **own)
            if metric == "batch" and run.name in critical:
                axis.plot(*run.curve("critical_batch"), linewidth=1, alpha=0.4, **own)
        axis.set_ylabel(unit)
        if metric == "batch":
            axis.set_yscale("log", base=2, nonpositive="mask")  # the critical batch is 0 before the first token
    axes[-1].set_xlabel("tokens")
    for axis in (loss, *axes):
        axis.grid(alpha=0.3)
        axis.xaxis.set_major_formatter(EngFormatter())
        for run, own in zip(runs, look, strict=True):
            _phases(axis, run, None if len(runs) == 1 else own["color"], named=axis in (loss, axes[0]))
    for run in runs:
        notes += [
            f"{run.name}: another mixture from {at:,} tokens on, {', '.join(f'{n} {w:g}' for n, w in mixture.items())}."
            for at, mixture in run.mixtures
        ]
    note = f"<p class=note>{html.escape(' '.join(notes))}</p>" if notes else ""
    names = legend(entries) if len(runs) > 1 else ""
    return [
        f"<h2>Loss</h2>\n{picture(figure)}{names}{note}",
        f"<h2>Learning rate, gradient norm, throughput</h2>\n{picture(below)}{names}",
    ]


def _phases(axis: Any, run: Run, color: str | None, named: bool) -> None:
    """Shade the phases of the schedule, or mark where they begin in the color of the run; mark where it resumed, and
    where it changed its mixture."""
    for place, (phase, first, last) in enumerate(run.phases):
        if color is None:
            axis.axvspan(first, last, color=_SHADES.get(phase, "grey"), alpha=0.1)
        elif place:
            axis.axvline(first, color=color, linestyle=":", linewidth=0.8)
        if named and color is None:
            height = 0.02 + 0.07 * (place % 2)  # or a short phase's name would lie under the next one
            axis.text(first, height, f" {plain(phase)}", transform=axis.get_xaxis_transform(), fontsize=8)
    for at, _ in run.mixtures:
        at = max(at, run.tokens[0])
        axis.axvline(at, color=color or "black", linestyle="dashdot", linewidth=1)
        if named:
            axis.text(at, 0.93, " mixture", transform=axis.get_xaxis_transform(), fontsize=8)
    for tokens in run.resumed:
        axis.axvline(tokens, ymax=0.04, color=color or "black", linewidth=1)


def _experts(run: Run) -> list[str]:
    """Load of the experts: the worst layer over tokens, and every expert at the newest checkpoint."""
    loads = [
        (tokens, line["expert_load"])
        for tokens, line in zip(run.tokens, run.lines, strict=True)
        if "expert_load" in line
    ]
    loads = [(tokens, load) for tokens, load in loads if isinstance(load, dict)]
    if not loads:
        return []
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    figure = Figure(figsize=(9, 3))
    axes = figure.subplots(1, 2)
    figure.subplots_adjust(left=0.08, right=0.98, bottom=0.17, top=0.97)
    chosen = loads[:: max(1, len(loads) // POINTS)]
    for axis, name, label in zip(
        axes, ("max_over_mean", "entropy"), ("largest load / mean", "entropy / uniform"), strict=True
    ):
        axis.plot([tokens for tokens, _ in chosen], [number(load, name) for _, load in chosen], linewidth=1)
        axis.set(xlabel="tokens", ylabel=f"{label}, worst layer")
        axis.xaxis.set_major_formatter(EngFormatter())
        axis.grid(alpha=0.3)
    parts = [f"<h2>Experts of {html.escape(run.name)}</h2>\n{picture(figure)}"]
    layers = [(tokens, each) for tokens, load in chosen if (each := _row(load.get("layer_entropy")))]
    layers = [(tokens, each) for tokens, each in layers if len(each) == len(layers[-1][1])]
    if len(layers) > 1:
        entropy = np.array([each for _, each in layers]).T
        figure, axis = _layers(len(entropy), "entropy of the load / uniform, by layer over tokens")
        reach = (layers[0][0], layers[-1][0], len(entropy) - 0.5, -0.5)
        image = axis.imshow(entropy, aspect="auto", cmap="viridis", interpolation="nearest", extent=reach)
        axis.set(xlabel="tokens", ylabel="layer")
        axis.xaxis.set_major_formatter(EngFormatter())
        figure.colorbar(image)
        parts.append(picture(figure))
    states = sorted((run.folder / "checkpoints").glob("step-*/state.json"))
    rows = [_row(each) for each in _list(read_record(states[-1]), "assignments")] if states else []
    if rows and all(len(row) == len(rows[0]) > 0 for row in rows):
        load = np.array(rows)
        load /= np.maximum(load.mean(axis=1, keepdims=True), 1e-9)
        figure, axis = _layers(len(load), f"load over the mean, {states[-1].parent.name}")
        image = axis.imshow(load, aspect="auto", cmap="RdBu_r", vmin=0, vmax=2, interpolation="nearest")
        axis.set(xlabel="expert", ylabel="layer")
        figure.colorbar(image)
        parts.append(picture(figure))
    return parts


def _row(values: Any) -> list[float]:
    """A list of numbers; an empty one for anything else."""
    found = [number({"": value}, "") for value in values] if isinstance(values, list) else []
    return [] if any(map(math.isnan, found)) else found


def _layers(count: int, title: str) -> tuple[Any, Any]:
    """A figure for a picture with a row for each layer."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    height = 1.1 + 0.18 * count
    figure = Figure(figsize=(9, height))
    axis = figure.subplots()
    figure.subplots_adjust(left=0.06, right=1.0, bottom=0.55 / height, top=1 - 0.4 / height)
    axis.set_title(title)
    axis.yaxis.set_major_locator(MaxNLocator(integer=True))
    return figure, axis
