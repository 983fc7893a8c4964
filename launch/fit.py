"""Fit the law of the best learning rate to the ledger of a sweep, and write a schedule.

usage: powertrain fit LEDGER [options]
       powertrain fit LEDGER --predict batch=1024 tokens=1e12
       powertrain fit LEDGER --predict sequences=64 [sequence_length=256] tokens=1e9

examples:
  powertrain fit runs/tiny/ledger.jsonl                         # the law as text, and plots in law/ beside it
  powertrain fit runs/tiny/ledger.jsonl --name mine --out mine  # and mine/schedule/mine.yaml to train with
  powertrain fit runs/lean/ledger.jsonl --form smooth --name mine --out mine
  powertrain train --config-dir mine +experiment=quickstart schedule=mine

A ledger is a JSON object a line; hidden_size, batch (in units of 4096 tokens), lr, tokens and loss are needed, so any
sweep of constant learning rates with a decay at the end is enough. --predict takes the batch in the same units, or as
batch.sequences has it: sequences of the ledger's own length, unless sequence_length is given. Where the sizes of a
ledger disagree (as they do without muP) it needs `parameters`, too, and --parameters gives the size to predict for.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from powertrain.data.files import replace_text
from powertrain.launch.parser import verb_parser
from powertrain.launch.sweep.ledger import read
from powertrain.schedulers import Power, forms
from powertrain.schedulers.cells import Cell
from powertrain.schedulers.held_out import Worth, distance
from powertrain.schedulers.law import Law, fit, name_of
from powertrain.train.cli import guard
from powertrain.train.config import LAW_SEQUENCE_LENGTH, Config, ModelConfig, MupConfig, OptimizerConfig
from powertrain.train.errors import ConfigError
from powertrain.train.report import plain

USELESS = 100  # a factor between the ends of an interval, from which on the estimate in it is not printed


def main(arguments: list[str] | None = None) -> None:
    """Fit, print, plot; with --predict print a prediction, with --name write a schedule."""
    parser = verb_parser("fit", __doc__)
    parser.add_argument("ledger", type=Path)
    parser.add_argument(
        "--predict",
        nargs="+",
        metavar="KEY=VALUE",
        help="print the best learning rate at batch=β or sequences=N, and tokens=T",
    )
    parser.add_argument("--name", help="write OUT/schedule/NAME.yaml")
    parser.add_argument("--form", choices=FORMULAS, help="of the law; default: chosen by held-out regret")
    parser.add_argument("--parameters", type=float, help="of the model to write it for; default: the largest swept")
    parser.add_argument("--out", type=Path, help="folder for schedule/ and law/; default: the ledger's")
    sys.exit(guard(lambda: _fit(parser.parse_args(arguments))))


def _fit(options: argparse.Namespace) -> int:
    if options.name and not re.fullmatch(r"\w[\w.-]*", options.name):
        raise ConfigError(f"--name '{options.name}' cannot name a schedule: letters, digits, '_', '-' and '.'.")
    if options.name and options.predict:
        raise ConfigError("--name writes a schedule and --predict prints a prediction: give one of them.")
    ledger = read(options.ledger)
    asked = _predict_arguments(options.predict, ledger) if options.predict else None
    try:
        law = fit(ledger, form=options.form)
    except ValueError as error:
        raise ConfigError(f"{options.ledger}: {error}") from error
    parameters = _parameters(law, options.parameters)
    if options.parameters is not None and parameters is None:
        print("--parameters has no effect: this law is one for all sizes.")
    text = schedule(law, ledger, options.ledger, parameters) if options.name else ""
    if asked is not None:
        print(prediction(law, *asked, parameters))
        return 0
    out = options.out or options.ledger.parent
    print(report(law))
    (out / "law").mkdir(parents=True, exist_ok=True)
    for path in plot(law, out / "law"):
        print(path)
    if options.name:
        path = out / "schedule" / f"{options.name}.yaml"
        path.parent.mkdir(exist_ok=True)
        replace_text(path, text)
        print(f"{path}: train with --config-dir {out} schedule={options.name}")
    return 0


def _predict_arguments(given: list[str], ledger: list[dict[str, Any]]) -> tuple[float, float]:
    """The batch in the law's unit, and the horizon."""
    try:
        values = {name: float(value.replace("_", "")) for name, value in (part.split("=") for part in given)}
    except ValueError:
        values = {}
    twice = len(values) < len(given)
    if twice or set(values) not in (
        {"batch", "tokens"},
        {"sequences", "tokens"},
        {"sequences", "sequence_length", "tokens"},
    ):
        raise ConfigError(
            "--predict is written --predict batch=1024 tokens=1e12, the batch in units of 4096 tokens, or --predict "
            f"sequences=64 tokens=1e9, not {' '.join(given)}."
        )
    batch, tokens = values.get("batch", 0.0), values["tokens"]
    if "sequences" in values:
        length = values["sequence_length"] if "sequence_length" in values else _sequence_length(ledger)
        batch = values["sequences"] * length / LAW_SEQUENCE_LENGTH
    if not (1e-9 <= batch <= 1e24 and 1e-9 <= tokens <= 1e24):
        raise ConfigError(f"--predict has batch {batch:g} and tokens {tokens:g}; both are above 0, from 1e-9 to 1e24.")
    return batch, tokens


def _parameters(law: Law, given: float | None) -> float | None:
    """The number of parameters to predict for; None where the law is one for all sizes."""
    if given is not None and not 1 <= given <= 1e24:
        raise ConfigError(f"--parameters is {given:g}; it is a number from 1 to 1e24.")
    if law.chosen.central_parameters is None:
        return None
    return given or max(cell.parameters or 0 for cell in law.cells if cell.usable)


def _sequence_length(ledger: list[dict[str, Any]]) -> int:
    """That of all lines."""
    configs = [line["config"] for line in ledger if isinstance(line.get("config"), dict)]
    lengths = {length for config in configs if isinstance(length := config.get("sequence_length"), int)}
    if len(lengths) != 1:
        found = f"holds {' and '.join(map(str, sorted(lengths)))}" if lengths else "does not record it"
        raise ConfigError(
            f"--predict sequences=… needs the length of a sequence, and the ledger {found}: add sequence_length=…, or "
            "give batch=…, in units of 4096 tokens."
        )
    return lengths.pop()


# ------------------------------------------------------------------------------------------------------- the text


def prediction(law: Law, batch: float, tokens: float, parameters: float | None = None) -> str:
    """The best learning rate for a batch and a horizon with its interval, the critical batch, the expected regret,
    the Power schedule that follows from it, and warnings."""
    lr = law.chosen.lr(batch, tokens, parameters)
    flat = law.chosen.name in law.flat
    high = law.chosen.max_lr(parameters).high if flat else lr.high  # below the cap nothing limits the interval
    at = f"at batch {batch:g} (× 4096 tokens) and {tokens:,.0f} tokens"
    at += f", for {parameters:,.0f} parameters" if parameters else ""
    lines = [f"lr {lr.value:.4g}, 95% interval {lr.low:.4g} to {high:.4g}, {at}"]
    if high > USELESS * lr.low:
        lines = [
            f"lr not known {at}, its 95% interval spans a factor of {high / lr.low:.2g}. Sweep nearer to it, or with "
            "more batches and horizons."
        ]
    if flat:
        lines.append(f"cap {law.chosen.max_lr(parameters)}; the critical batch is not seen")
    elif law.chosen.name in forms.CAPPED:
        critical = law.chosen.critical_batch(tokens)
        lines.append(
            f"cap {law.chosen.max_lr(parameters)}; critical batch {critical} there"
            + (": this one is above it, and needs more tokens for the same loss" if batch > critical.value else "")
        )
    elif lr.value > law.highest(parameters):
        lines.append(
            f"That is above {law.highest(parameters):.4g}, the highest best learning rate of the sweep"
            + ("" if law.caps_seen else ", where a cap may lie that the sweep did not reach")
            + ": a schedule stops there."
        )
    if law.worth is not None:
        lines.append(_expected(law.worth, law.chosen.name, distance([c for c in law.cells if c.usable], batch, tokens)))
    if law.chosen.b.value < 0:
        schedule = power(law, parameters)
        release = schedule.cap_release(batch)
        lines.append(
            f"Power: a {schedule.a:.4g}, b {schedule.b:.4g}, batch_exponent {schedule.batch_exponent:.4g}, cap "
            f"{schedule.cap}; the cap max_lr {schedule.max_lr:.4g} releases after {release:.3g} tokens"
            + (": this run would be at the cap to its end" if release >= tokens else "")
        )
    if outside := law.outside(batch, tokens):
        lines.append(
            f"Warning: {'; '.join(outside)}. The interval takes the law to hold there, which no trial has shown."
        )
    return "\n".join([*lines, *law.notes])


def _expected(worth: Worth, form: str, away: float) -> str:
    """The held-out regret of cells that lay as far outside."""
    factor = f"a factor of {math.exp(away):,.3g} outside the sweep" if away else "inside the sweep"
    found = worth.expected(form, away)
    if found is not None:
        return f"expected regret, {factor}: {found[0]:.4f} nats, at worst {found[1]:.4f} (held-out cells: {found[2]})"
    farthest = max(max(split.distances) for split in worth.splits)
    mean, worst, count = worth.expected(form, farthest) or (math.nan, math.nan, 0)
    return (
        f"expected regret, {factor}: not known. The farthest cells held out lay a factor of {math.exp(farthest):,.3g} "
        f"outside their fit, with {mean:.4f} nats, at worst {worst:.4f} (cells: {count})"
    )


def report(law: Law) -> str:
    """The whole fit as text."""
    usable = sum(cell.usable for cell in law.cells)
    size = law.chosen.central_parameters
    at = f"γ at {law.chosen.central_tokens:,.0f} tokens" + (f" and {size:,.0f} parameters" if size is not None else "")
    lines = [f"{usable} of {len(law.cells)} (size, horizon, batch) have a best learning rate inside the grid", ""]
    for name, form in law.forms.items():
        numbers = ["b and γ not seen"] if name in law.flat else [f"b {form.b}", f"{at} {form.gamma}"]
        if name in forms.CAPPED:
            numbers.append(f"η_max {form.max_lr()}" if name in law.caps_seen else "η_max not seen")
        if name == "plane":
            numbers.append(f"c {form.c}")
        if form.central_parameters is not None:
            numbers.append(f"d {form.d}")
        chosen = " ←" if form is law.chosen else ""
        lines.append(f"  {name:<7} {FORMULAS[name]:<34} {'   '.join(numbers)}   residual {form.residual:.2f}{chosen}")
    lines += ["", *held_out(law), ""]
    lines += [
        f"residual: standard deviation of the log learning rate around the form. Noise of a loss: {_noise(law)} nats, "
        f"of whose variance the horizons of a trunk share {law.shared:.0%}.",
        *law.notes,
        *law.flags,
    ]
    return "\n".join(lines)


FORMULAS = {
    "power": "η = a·β·T^b",
    "hard": "η = min(η_max, a·β·T^b)",
    "smooth": "1/η = 1/η_max + 1/(a·β·T^b)",
    "plane": "η = a·β^c·T^b",
}


def held_out(law: Law) -> list[str]:
    """Mean and worst regret of every split, a line each."""
    if law.worth is None:
        return []
    names = list(law.worth.mean)
    lines = [
        "Held-out regret in nats, mean / worst; nearest: the best learning rate of the nearest swept cell, unchanged",
        f"  {'':<44}" + "".join(f"{name:>16}" for name in names),
    ]
    for split in law.worth.splits:
        cells = [f"{split.regrets[name].mean():.4f} / {split.regrets[name].max():.3f}" for name in names]
        lines.append(f"  {f'{split.name} ({len(split.held_out)})':<44}" + "".join(f"{cell:>16}" for cell in cells))
    lines.append(f"  {'mean of these':<44}" + "".join(f"{f'{law.worth.mean[name]:.4f}':>16}" for name in names))
    return lines


def _noise(law: Law) -> str:
    values = sorted(law.noise.values())
    return f"{values[0]:.4f} to {values[-1]:.4f}"


# --------------------------------------------------------------------------------------------------- the schedule


def power(law: Law, parameters: float | None = None) -> Power:
    """The Power schedule of a law, without a warmup."""
    chosen = law.chosen
    if chosen.b.value >= 0:
        raise ConfigError(
            f"The best learning rate does not fall with the horizon in this ledger (b = {chosen.b}): the Power "
            "schedule cannot express that. Sweep longer horizons, or more seeds."
        )
    return Power(
        a=chosen.a(parameters).value,
        b=chosen.b.value,
        max_lr=law.max_lr(parameters),
        warmup_tokens=0,
        batch_exponent=chosen.c.value,
        cap="smooth" if chosen.name == "smooth" else "hard",
    )


def schedule(law: Law, ledger: list[dict[str, Any]], source: Path, parameters: float | None = None) -> str:
    """A file for configs/schedule/: the law, and the parametrisation that it belongs to."""
    found = power(law, parameters)
    chosen = law.chosen
    batches, tokens = ([getattr(c, n) for c in law.cells if c.usable] for n in ("batch", "tokens"))
    cap = str(chosen.max_lr(parameters)) if chosen.name in law.caps_seen else "the highest best one of the sweep"
    numbers = f"b {chosen.b}, a {chosen.a(parameters)}; 95% intervals."
    if chosen.name in law.flat:
        numbers = "a and b are guesses."
    shares = {line.get("decay_fraction") for line in ledger}
    share = shares.pop() if len(shares) == 1 else None
    decayed = f"  # the sweep's runs: the last {share:.0%}" if isinstance(share, float) and 0 < share < 1 else ""
    text = f"""\
# {FORMULAS[chosen.name].replace("T", "n")}, fitted to {source.name}: {len(batches)} best learning rates
# at batches {min(batches):g} to {max(batches):g} (× 4096 tokens) and {min(tokens):,} to {max(tokens):,} tokens.
# {numbers}{f" For {parameters:,.0f} parameters." if parameters else ""}
{"".join(f"# {line}{chr(10)}" for note in law.notes for line in textwrap.wrap(note, 116))}\
name: power
a: {found.a:.6g}
b: {found.b:.6g}
max_lr: {found.max_lr:.4g}  # {cap}
cap: {found.cap}
batch_exponent: {found.batch_exponent:.6g}
warmup_tokens: ???
decay: {{start: null, tokens: 0, shape: exponential, floor: 0.0}}{decayed}
rewarmup: {{start: null, tokens: 0}}
"""
    configs = [line["config"] for line in ledger if isinstance(line.get("config"), dict)]
    if configs:
        from powertrain.train.model.mup import parametrisation

        try:
            own = [
                parametrisation(
                    Config(
                        model=ModelConfig(**config["model"]),
                        mup=MupConfig(**config["mup"]),
                        optimizer=OptimizerConfig(**config["optimizer"]),
                    )
                )
                for config in {json.dumps(config): config for config in configs}.values()
            ]
        except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
            raise ConfigError(
                f"{source}: a trial's `config` is not one of this version ({error}). Without `config` on its lines the "
                "ledger makes a schedule that does not record which parametrisation it belongs to."
            ) from error
        common = {name: value for name, value in own[0].items() if all(other.get(name) == value for other in own)}
        text += "belongs_to:  # a run with other values warns\n"
        text += "".join(f"  {json.dumps(k, ensure_ascii=False)}: {json.dumps(v)}\n" for k, v in common.items())
    return text


# ------------------------------------------------------------------------------------------------------ the plots


def plot(law: Law, folder: Path) -> list[Path]:
    """Write the plots of a law as files."""
    paths = []
    for name, figure in pictures(law):
        paths.append(folder / f"{name}.png")
        figure.savefig(paths[-1], dpi=110)
    return paths


def pictures(law: Law) -> Iterator[tuple[str, Any]]:
    """By name: losses over learning rates, the best of them over batch and tokens, the law with its held-out regret."""
    from matplotlib import colormaps, lines, ticker
    from matplotlib.figure import Figure

    sizes = list(dict.fromkeys(cell.size for cell in law.cells))
    horizons = sorted({cell.tokens for cell in law.cells})
    batches = sorted({cell.batch for cell in law.cells})
    hues = dict(zip(batches, colormaps["viridis"](np.linspace(0, 0.9, len(batches))), strict=True))
    shades = dict(zip(horizons, colormaps["plasma"](np.linspace(0, 0.85, len(horizons))), strict=True))

    for size in sizes:
        own = [tokens for tokens in horizons if any((c.size, c.tokens) == (size, tokens) for c in law.cells)]
        columns = min(3, len(own))
        rows = math.ceil(len(own) / columns)
        figure = Figure(figsize=(4.2 * columns + 0.8, 3.2 * rows), layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False)
        for axis, tokens in zip(axes.flat, own, strict=False):
            for cell in law.cells:
                if (cell.size, cell.tokens) == (size, tokens):
                    _curve(axis, cell, hues[cell.batch])
            axis.set(xscale="log", title=f"{tokens:,} tokens", xlabel="learning rate", ylabel="validation loss (nats)")
            axis.xaxis.set_minor_formatter(ticker.NullFormatter())
            axis.grid(alpha=0.3, which="both")
        figure.suptitle(plain(name_of(size)))
        handles = [lines.Line2D([], [], color=hues[batch], label=f"{batch:g}") for batch in batches]
        figure.legend(handles=handles, title="batch", fontsize=7, loc="outside right upper")
        for axis in list(axes.flat)[len(own) :]:
            axis.set_visible(False)
        yield f"losses_{re.sub(r'[^a-zA-Z0-9]+', '_', name_of(size))}", figure

    figure = Figure(figsize=(10, 3.6 * len(sizes)), layout="constrained")
    axes = figure.subplots(len(sizes), 2, squeeze=False)
    for (left, right), size in zip(axes, sizes, strict=True):
        usable = [cell for cell in law.cells if cell.usable and cell.size == size]
        for tokens in horizons:
            line = [(c.batch, c.lr) for c in usable if c.tokens == tokens]
            left.plot(*_columns(line), "o-", color=shades[tokens], label=f"{tokens:,}")
        for batch in batches:
            line = [(c.tokens, c.lr) for c in usable if c.batch == batch]
            right.plot(*_columns(line), "o-", color=hues[batch], label=f"{batch:g}")
        for axis, name, what in ((left, "batch (× 4096 tokens)", "tokens"), (right, "tokens", "batch")):
            axis.set(xscale="log", yscale="log", xlabel=name, ylabel="best learning rate", title=plain(name_of(size)))
            axis.xaxis.set_minor_formatter(ticker.NullFormatter())
            axis.legend(title=what, fontsize=6, loc="upper left", bbox_to_anchor=(1, 1))
            axis.grid(alpha=0.3, which="both")
    yield "best_rates", figure

    figure = Figure(figsize=(11, 4.6), layout="constrained")
    axes = figure.subplots(1, 2, width_ratios=(3, 2))
    over_batch(law, axes[0])
    over_splits(law, axes[1])
    yield "law", figure


def over_batch(law: Law, axis: Any) -> None:
    """The law in one plot: learning rate over batch, a curve a horizon, with the cap and the critical batches."""
    from matplotlib import colormaps, ticker

    chosen = law.chosen
    usable = [cell for cell in law.cells if cell.usable]
    horizons, sizes = sorted({cell.tokens for cell in usable}), list(dict.fromkeys(cell.size for cell in usable))
    shades = dict(zip(horizons, colormaps["plasma"](np.linspace(0, 0.85, len(horizons))), strict=True))
    # Best learning rates scaled to the central size, so that one curve stands for all sizes.
    scale = {
        cell.size: float(chosen.lr(1, 1, cell.parameters).value / chosen.lr(1, 1).value) if cell.parameters else 1.0
        for cell in usable
    }
    batches = np.geomspace(min(c.batch for c in usable), 4 * max(c.batch for c in usable), 80)
    for tokens in horizons:
        for number, size in enumerate(sizes):
            points = [(c.batch, c.lr / scale[size]) for c in usable if (c.size, c.tokens) == (size, tokens)]
            axis.plot(*_columns(points), "osD^v"[number % 5], color=shades[tokens], ms=4, alpha=0.8)
        rates = [chosen.lr(batch, tokens).value for batch in batches]
        axis.plot(batches, rates, color=shades[tokens], linewidth=1.2, label=f"{tokens:,}")
        if chosen.name in forms.CAPPED and chosen.name not in law.flat:
            critical = chosen.critical_batch(tokens).value
            if batches[0] <= critical <= batches[-1]:
                axis.plot(critical, chosen.lr(critical, tokens).value, "|", color=shades[tokens], ms=22, mew=1.5)
    if chosen.name in forms.CAPPED:
        cap = chosen.max_lr()
        label = "η_max" if chosen.name in law.flat else "η_max; bars: critical batch"
        axis.axhline(cap.value, color="grey", linestyle=":", label=label)
        axis.axhspan(cap.low, cap.high, color="grey", alpha=0.12)
    axis.set(xscale="log", yscale="log", xlabel="batch (× 4096 tokens)", ylabel="best learning rate", title=chosen.name)
    axis.yaxis.set_minor_formatter(ticker.NullFormatter())
    axis.grid(alpha=0.3, which="both")
    axis.legend(title="tokens", fontsize=7)


def over_splits(law: Law, axis: Any) -> None:
    """Held-out regret by form, and of the baselines."""
    if law.worth is None:
        axis.set_visible(False)
        return
    names = [
        name for name in law.worth.mean if name != "constant"
    ]  # far above the others where a law is worth anything
    width = 0.8 / len(names)
    for number, name in enumerate(names):
        means = [split.regrets[name].mean() for split in law.worth.splits]
        axis.barh(
            [row + number * width for row in range(len(means))], means, width, label=name,
            color="grey" if name == "nearest" else f"C{list(forms.NUMBERS).index(name)}",
        )  # fmt: skip
    labels = [split.name.replace(" from ", "\nfrom ").replace(", ", ",\n") for split in law.worth.splits]
    axis.set_yticks([row + 0.4 - width / 2 for row in range(len(labels))], labels, fontsize=7)
    axis.invert_yaxis()
    axis.set(xlabel="held-out regret (nats, mean)")
    axis.grid(alpha=0.3, axis="x")
    axis.legend(fontsize=7)


def _curve(axis: Any, cell: Cell, color: Any) -> None:
    shown = [(rate, loss) for rate, loss in zip(cell.rates, cell.losses, strict=True) if math.isfinite(loss)]
    axis.plot(*_columns(shown), "o-", color=color, markersize=3, linewidth=0.8, label=f"{cell.batch:g}")
    if cell.usable:
        axis.plot(cell.lr, cell.loss, "*", color=color, markersize=9)


def _columns(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


if __name__ == "__main__":
    main()
