"""One self-contained HTML page of runs laid over each other, or of a sweep with the schedules that it compares.

usage: powertrain report RUN [RUN …] [--out FILE]
       powertrain report SWEEP [--out FILE]

examples:
  powertrain report runs/quickstart                         # runs/quickstart/report.html
  powertrain report runs/power runs/wsd --out compared.html
  powertrain report runs/compare                            # the folder of a sweep, with its ledger.jsonl
"""

from __future__ import annotations

import argparse
import html
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from powertrain.data.files import check_output, replace_text
from powertrain.launch import fit
from powertrain.launch.parser import verb_parser
from powertrain.launch.sweep.ledger import read
from powertrain.schedulers.cells import MOST, is_number
from powertrain.train.cli import guard
from powertrain.train.errors import ConfigError
from powertrain.train.report import Run, legend, looks, overlays, page, picture, runs_page, table

Line = dict[str, Any]
Cell = tuple[str, float, int]  # model, batch, tokens
Fields = tuple[tuple[str, float], ...]


def main(arguments: list[str] | None = None) -> None:
    """Write the page and print its path."""
    parser = verb_parser("report", __doc__)
    parser.add_argument("folders", type=Path, nargs="+", metavar="RUN")
    parser.add_argument("--out", type=Path, help="default: report.html in the folder; needed for several")
    sys.exit(guard(lambda: _report(parser.parse_args(arguments))))


def _report(options: argparse.Namespace) -> int:
    folders, out = options.folders, options.out
    if len(folders) > 1 and out is None:
        raise ConfigError(
            f"A page of several runs needs --out FILE: {folders[0] / 'report.html'} is the page of that run alone."
        )
    out = out or folders[0] / "report.html"
    if folders[0].is_dir():  # otherwise the error below says what is wrong
        check_output(out)
    if (folders[0] / "ledger.jsonl").exists() and len(folders) == 1:
        text = sweep_page(folders[0])
    else:
        for folder in folders:
            if not (folder / "config.yaml").exists():
                raise ConfigError(f"{folder} is no folder of a run (no config.yaml) nor of a sweep (no ledger.jsonl).")
        text = runs_page(folders)
    replace_text(out, text)
    print(out)
    return 0


def sweep_page(folder: Path) -> str:
    """Final losses, what each schedule reaches with one set of hyperparameters, and the curves of the best trials."""
    everything = [_complete(number, line) for number, line in enumerate(read(folder / "ledger.jsonl"), 1)]
    if not everything:
        raise ConfigError(f"{folder / 'ledger.jsonl'} has no trial yet, so there is nothing to show.")
    ledger = [line for line in everything if line["seed"] == _first_seed(everything)]  # repeats measure the noise
    parts = [about(ledger), *compared(ledger), *(_law(everything) if len(_schedules(ledger)) == 1 else [])]
    parts += _grids(ledger)
    cells = sorted({_cell(line) for line in ledger}, key=lambda cell: (cell[0], cell[1], cell[2]))
    longest = {(model, batch): (model, batch, tokens) for model, batch, tokens in cells}  # the last one stays
    for cell in longest.values():
        runs = []
        for schedule in _schedules(ledger):
            best = _best([line for line in ledger if (line["schedule"], _cell(line)) == (schedule, cell)])
            if best and (folder / best["trial"] / "config.yaml").exists():
                runs.append(Run(folder / best["trial"], f"{schedule} {_text(_fields(best))}"))
        if len(runs) > 1:
            parts += [f"<h2>{html.escape(_where(cell))}: the best trial of each schedule</h2>", *overlays(runs)]
    return page(folder.resolve().name, parts)


def _complete(place: int, line: Line) -> Line:
    """The line, with defaults for what a ledger made elsewhere may lack.

    Raises:
        ConfigError: something is missing, or is of another kind than a sweep writes.
    """
    if lacking := [name for name in ("batch", "tokens", "loss") if name not in line]:
        raise ConfigError(f"Line {place} of the ledger has no {', '.join(lacking)}: {str(line)[:100]}")
    line = {name: value for name, value in line.items() if value is not None or name == "loss"}
    name = f"{line.get('family', '')} {line.get('hidden_size', '')}".strip()
    line = {"model_name": name, "schedule": "wsd", "seed": 0, "trial": "", **line}
    if line["loss"] == math.inf or line["loss"] != line["loss"]:  # as some ledgers record one that diverged
        line["loss"] = None
    for name in ("batch", "tokens", "lr", "a", "b", "seed", "loss", "parameters", "decay_fraction"):
        optional = name not in ("batch", "tokens")
        if not (is_number(line.get(name), -MOST if optional else 0) or (optional and line.get(name) is None)):
            raise ConfigError(
                f"Line {place} of the ledger has {name} {str(line.get(name))[:40]}, which is no such number."
            )
    for name in ("model_name", "schedule", "trial"):
        line[name] = str(line[name])
    line["seed"], line["tokens"] = int(line["seed"] or 0), int(line["tokens"])
    return {name: value for name, value in line.items() if value is not None or name == "loss"}


def _law(ledger: Sequence[Line]) -> list[str]:
    """The fit to the trials, and its plots."""
    if all(line.get("lr") is None or line["schedule"] != "wsd" for line in ledger):
        return []
    try:
        law = fit.fit(ledger)
    except ValueError as error:
        return [f"<h2>The law</h2>\n<p class=note>There is none yet: {html.escape(str(error))}</p>"]
    shown = [picture(figure) for _, figure in fit.pictures(law)]
    return [f"<h2>The law</h2>\n<pre>{html.escape(fit.report(law))}</pre>", *shown]


def about(ledger: Sequence[Line]) -> str:
    """What was trained, in a sentence or two."""
    models = {line["model_name"]: line for line in ledger}
    named = "; ".join(
        f"{name}, {line['parameters']:,} parameters" if "parameters" in line else name for name, line in models.items()
    )
    decays = sorted({line["decay_fraction"] for line in ledger if line.get("decay_fraction")})
    decay = f" The last {decays[0]:.0%} of the tokens of a trial with a decay are its decay." if decays else ""
    text = (
        f"{len(ledger)} trials on one data order: {named}. Batches are in units of 4096 tokens, losses in nats.{decay}"
    )
    return f"<p>{html.escape(text)}</p>"


def compared(ledger: Sequence[Line]) -> list[str]:
    """Each schedule tuned at every horizon and batch, against one set of hyperparameters for all of them."""
    schedules = _schedules(ledger)
    if len(schedules) < 2:
        return []
    parts = []
    for model in dict.fromkeys(line["model_name"] for line in ledger):
        own = [line for line in ledger if line["model_name"] == model and line["loss"] is not None]
        trained = [{_cell(line) for line in own if line["schedule"] == schedule} for schedule in schedules]
        cells = sorted(set.intersection(*trained), key=lambda cell: (cell[1], cell[2]))
        if not cells:
            continue
        tuned = {
            (schedule, cell): _best([line for line in own if (line["schedule"], _cell(line)) == (schedule, cell)])
            for schedule in schedules
            for cell in cells
        }
        least = {cell: min(tuned[schedule, cell]["loss"] for schedule in schedules) for cell in cells}
        fixed = {schedule: one_for_all(own, schedule, cells) for schedule in schedules}
        above = {
            schedule: {cell: by[cell] - least[cell] for cell in cells} for schedule, (_, by) in fixed.items() if by
        }
        rows = []
        for cell in cells:
            row: list[Any] = [f"{cell[1]:g}", f"{cell[2]:,}"]
            for schedule in schedules:
                best = tuned[schedule, cell]
                text = f"{best['loss']:.4f} ({_text(_fields(best))}{_at_edge(own, best)})"
                row.append((text,) if best["loss"] == least[cell] else text)
            rows.append([*row, *(f"{above[s][cell]:+.4f}" if s in above else "" for s in schedules)])
        means = [f"{np.mean(list(above[s].values())):+.4f}" if s in above else "" for s in schedules]
        rows.append(["mean", *[""] * (1 + len(schedules)), *means])
        header = ["batch", "tokens", *(f"{s}, tuned here" for s in schedules)]
        header += [f"{s}, {_text(fixed[s][0]) or 'none ran everywhere'}" for s in schedules]
        parts += [
            f"<h2>{html.escape(model)}: final validation losses</h2>",
            "<p class=note>Left, each schedule with the hyperparameters that are best at that batch and horizon. "
            "Right, with the one set whose mean loss over all rows is lowest: nats above the best of the row. "
            "(edge) is the lowest or highest value that was tried: a better one may lie beyond.</p>",
            table(header, rows),
            _over_tokens({s: {c: tuned[s, c]["loss"] - least[c] for c in cells} for s in schedules}, above),
        ]
    return parts


def _at_edge(ledger: Sequence[Line], best: Line) -> str:
    """`, edge` if a value is the lowest or highest that was tried in this cell."""
    here = [x for x in ledger if (x["schedule"], _cell(x)) == (best["schedule"], _cell(best))]
    for name, value in _fields(best):
        tried = [x[name] for x in here if name in x]
        if value in (min(tried), max(tried)):
            return ", edge"
    return ""


def one_for_all(ledger: Sequence[Line], schedule: str, cells: Sequence[Cell]) -> tuple[Fields, dict[Cell, float]]:
    """The hyperparameters with the lowest mean loss of those trained in every cell, and their losses; or nothing."""
    losses: dict[Fields, dict[Cell, float]] = {}
    for line in ledger:
        if line["schedule"] == schedule:
            losses.setdefault(_fields(line), {})[_cell(line)] = line["loss"]
    everywhere = {fields: by for fields, by in losses.items() if set(cells) <= set(by)}
    best = min(everywhere, key=lambda fields: sum(everywhere[fields][cell] for cell in cells), default=())
    return best, everywhere.get(best, {})


def _over_tokens(tuned: dict[str, dict[Cell, float]], above: dict[str, dict[Cell, float]]) -> str:
    from matplotlib import ticker
    from matplotlib.figure import Figure

    batches = sorted({cell[1] for by in tuned.values() for cell in by})
    figure = Figure(figsize=(max(5, 3.6 * len(batches)), 3.4), layout="constrained")
    axes = figure.subplots(1, len(batches), squeeze=False)
    look = dict(zip(tuned, looks(len(tuned)), strict=True))
    kinds = {"tuned": (tuned, "o", "dashed"), "one set": (above, "s", "solid")}
    for axis, batch in zip(axes[0], batches, strict=True):
        for schedule in tuned:
            for by, marker, style in kinds.values():
                points = [(cell[2], value) for cell, value in by.get(schedule, {}).items() if cell[1] == batch]
                if points:
                    axis.plot(*zip(*points, strict=True), marker, ls=style, color=look[schedule]["color"], ms=4)
        axis.set(xscale="log", xlabel="tokens", title=f"batch {batch:g}", ylabel="nats above the best")
        axis.set_xticks(sorted({cell[2] for by in tuned.values() for cell in by if cell[1] == batch}))
        axis.xaxis.set_major_formatter(ticker.EngFormatter())
        axis.xaxis.set_minor_formatter(ticker.NullFormatter())
        axis.tick_params(axis="x", labelrotation=30)
        axis.grid(alpha=0.3)
    names = [
        (f"{schedule}, {kind}", {**look[schedule], "linestyle": style})
        for schedule in tuned
        for kind, (by, _, style) in kinds.items()
        if schedule in by
    ]
    return picture(figure) + legend(names)


def _grids(ledger: Sequence[Line]) -> list[str]:
    """All losses, and for a grid over a and b the plots of `over_a_and_b`."""
    parts = []
    for schedule in _schedules(ledger):
        own = [line for line in ledger if line["schedule"] == schedule]
        columns = sorted({_fields(line) for line in own})
        rows = []
        for cell in sorted({_cell(line) for line in own}):
            here = {_fields(line): line for line in own if _cell(line) == cell}
            best = _best(list(here.values()))
            row: list[Any] = [cell[0], f"{cell[1]:g}", f"{cell[2]:,}"]
            for fields in columns:
                line = here.get(fields)
                text = "" if line is None else "diverged" if line["loss"] is None else f"{line['loss']:.4f}"
                row.append((text,) if line is not None and line is best else text)
            rows.append(row)
        parts += [
            f"<h2>All trials: {html.escape(schedule)}</h2>",
            table(["model", "batch", "tokens", *(_text(fields) for fields in columns)], rows),
        ]
        if [name for name, _ in columns[0]] == ["a", "b"]:
            parts.append(over_a_and_b([line for line in own if "a" in line and "b" in line]))
    return parts


def over_a_and_b(ledger: Sequence[Line]) -> str:
    """The paper's section 4: loss over a at the best b, and over b at the best a, a line each batch and horizon."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots(1, 2)
    cells = sorted({_cell(line) for line in ledger})
    look = looks(len(cells))
    for cell, own in zip(cells, look, strict=True):
        here = [line for line in ledger if _cell(line) == cell and line["loss"] is not None]
        for axis, name in zip(axes, ("a", "b"), strict=True):
            values = sorted({line[name] for line in here})
            if not values:
                continue
            least = [min(line["loss"] for line in here if line[name] == value) for value in values]
            axis.plot(values, np.array(least) - min(least), marker="o", markersize=3, **own)
    for axis, name, other in zip(axes, "ab", "ba", strict=True):
        axis.set(xlabel=name, ylabel=f"nats above the least, at the best {other}")
        axis.grid(alpha=0.3)
    return picture(figure) + legend([(_where(cell), own) for cell, own in zip(cells, look, strict=True)])


def _best(lines: Sequence[Line]) -> Line:
    finished = [line for line in lines if line["loss"] is not None]
    return min(finished, key=lambda line: line["loss"]) if finished else {}


def _schedules(ledger: Sequence[Line]) -> list[str]:
    return list(dict.fromkeys(line["schedule"] for line in ledger))


def _first_seed(ledger: Sequence[Line]) -> int:
    return min(line["seed"] for line in ledger)


def _cell(line: Line) -> Cell:
    return line["model_name"], line["batch"], line["tokens"]


def _fields(line: Line) -> Fields:
    return tuple((name, line[name]) for name in ("lr", "a", "b") if name in line)


def _text(fields: Fields) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in fields)


def _where(cell: Cell) -> str:
    return f"{cell[0]}, batch {cell[1]:g}, {cell[2]:,} tokens"


if __name__ == "__main__":
    main()
