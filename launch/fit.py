"""Fit the law of the best rate to the ledger of a sweep, and make a schedule of it.

usage: python -m launch.fit LEDGER [options]
       python -m launch.fit LEDGER --predict batch=1024 tokens=1e12
       python -m launch.fit LEDGER --predict sequences=64 [sequence_length=256] tokens=1e9

examples:
  python -m launch.fit runs/tiny/ledger.jsonl                         # what it says, with pictures and tables beside it
  python -m launch.fit runs/tiny/ledger.jsonl --name mine --out mine  # and mine/schedule/mine.yaml to train with
  python -m train --config-dir mine +experiment=quickstart schedule=mine

A ledger is a JSON object a line; hidden_size, batch (in units of 4096 tokens), lr, tokens and loss are needed, so any
sweep of constant rates with a decay at the end will do. --predict takes the batch in the same units, or as
batch.sequences has it: sequences of the ledger's own length, unless sequence_length is given.
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

from schedulers import Power
from schedulers.law import Cell, Law, Reading, fit, name_of
from train.cli import guard
from train.config import LAW_SEQUENCE_LENGTH, Config, ConfigError, ModelConfig, MupConfig, OptimizerConfig
from train.environment import replace_text
from train.report import looks, plain


def main(arguments: list[str] | None = None) -> None:
    """Fit, print, plot; predict or write a schedule when asked."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(
        prog="powertrain fit",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage=argparse.SUPPRESS,
    )
    parser.add_argument("ledger", type=Path)
    parser.add_argument(
        "--predict", nargs="+", metavar="KEY=VALUE", help="print the best rate at batch=β or sequences=N, and tokens=T"
    )
    parser.add_argument("--name", help="write OUT/schedule/NAME.yaml")
    parser.add_argument("--out", type=Path, help="folder for schedule/ and law/; default: the ledger's")
    sys.exit(guard(lambda: _fit(parser.parse_args(arguments))))


def _fit(options: argparse.Namespace) -> int:
    if options.name and not re.fullmatch(r"\w[\w.-]*", options.name):
        raise ConfigError(f"--name '{options.name}' cannot name a schedule: letters, digits, '_', '-' and '.'.")
    ledger = read(options.ledger)
    try:
        law = fit(ledger)
    except ValueError as error:
        raise ConfigError(f"{options.ledger}: {error}") from error
    text = schedule(law, ledger, options.ledger) if options.name else ""
    if options.predict:
        print(prediction(law, *_predict_arguments(options.predict, ledger)))
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


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a ledger.

    Raises:
        ConfigError: no such file, or a line that is no JSON object, or holds a number that nothing can be.
    """
    if not path.is_file():
        raise ConfigError(f"There is no ledger {path}. A sweep leaves one in RUN.FOLDER/NAME/ledger.jsonl.")
    lines = []
    for number, text in enumerate(path.read_text(encoding="utf-8-sig", errors="replace").split("\n"), 1):
        if not text.strip():
            continue
        try:
            line = json.loads(text)
        except (ValueError, RecursionError) as error:
            why = "nested too deep" if isinstance(error, RecursionError) else str(error).partition(";")[0]
            raise ConfigError(f"{path}, line {number}, is not JSON ({why}): mend or delete that line.") from error
        if not isinstance(line, dict):
            raise ConfigError(f"{path}, line {number}, is not a JSON object but {text[:60]!r}.")
        lines.append(line)
    return lines


def _predict_arguments(given: list[str], ledger: list[dict[str, Any]]) -> tuple[float, float]:
    """The batch in the law's unit, and the horizon."""
    try:
        values = {name: float(value.replace("_", "")) for name, value in (part.split("=") for part in given)}
    except ValueError:
        values = {}
    if set(values) not in ({"batch", "tokens"}, {"sequences", "tokens"}, {"sequences", "sequence_length", "tokens"}):
        raise ConfigError(
            "--predict is written --predict batch=1024 tokens=1e12, the batch in units of 4096 tokens, or --predict "
            f"sequences=64 tokens=1e9, not {' '.join(given)}."
        )
    batch, tokens = values.get("batch", 0.0), values["tokens"]
    if "sequences" in values:
        length = values["sequence_length"] if "sequence_length" in values else _sequence_length(ledger)
        batch = values["sequences"] * length / LAW_SEQUENCE_LENGTH
    if not (0 < batch < math.inf and 0 < tokens < math.inf):
        raise ConfigError(f"--predict has batch {batch:g} and tokens {tokens:g}; both are above 0.")
    return batch, tokens


def _sequence_length(ledger: list[dict[str, Any]]) -> int:
    """That of all lines."""
    configs = [line["config"] for line in ledger if isinstance(line.get("config"), dict)]
    lengths = {length for config in configs if isinstance(length := config.get("sequence_length"), int)}
    if len(lengths) != 1:
        found = f"holds {' and '.join(map(str, sorted(lengths)))}" if lengths else "does not tell"
        raise ConfigError(
            f"--predict sequences=… wants the length of a sequence, and the ledger {found}: add sequence_length=…, or "
            "give batch=…, in units of 4096 tokens."
        )
    return lengths.pop()


# ------------------------------------------------------------------------------------------------------- in words


def prediction(law: Law, batch: float, tokens: float) -> str:
    """The best rate for a batch and a horizon, its interval, what the Power schedule makes of it, and what to doubt."""
    lr = law.chosen.lr(batch, tokens)
    lines = [
        f"lr {lr.value:.4g}, 95% interval {lr.low:.4g} to {lr.high:.4g}, at batch {batch:g} (× 4096 tokens) and "
        f"{tokens:g} tokens",
    ]
    if law.chosen.b.value < 0:
        schedule = power(law)
        release = schedule.cap_release(batch)
        lines.append(
            f"Power: a {schedule.a:.4g}, b {schedule.b:.4g}, batch_exponent {schedule.batch_exponent:.4g}; the cap "
            f"max_lr {schedule.max_lr:.4g} releases after {release:.3g} tokens"
            + (": this run would be at the cap to its end" if release >= tokens else "")
        )
    if outside := law.outside(batch, tokens):
        lines.append(
            f"Warning: {'; '.join(outside)}. The interval takes the law to hold there, which no trial has shown."
        )
    return "\n".join([*lines, *law.notes])


def report(law: Law) -> str:
    """Everything that the fit found, as text."""
    usable = sum(cell.usable for cell in law.cells)

    def paper(name: str, reading: Reading) -> str:
        return f"  {name:<18} b {reading.b}   {at} {reading.gamma}   residual {reading.residual:.2f}"

    at = f"γ at {law.paper.central_tokens:,.0f} tokens"
    lines = [
        f"{usable} of {len(law.cells)} (size, horizon, batch) have a best rate inside the grid",
        "",
        "The paper's reading, lr = a · batch · tokens^b: γ = lr / batch of the three best batches of each horizon",
        *(paper(name_of(size), line) for size, line in law.sizes.items()),
        paper("all", law.paper),
        f"  {'':<18} a {law.paper.a}",
        "",
        "Every batch, lr = a · batch^c · tokens^b",
        f"  {'all':<18} b {law.plane.b}   c {law.plane.c}   {at} {law.plane.gamma}   residual {law.plane.residual:.2f}",
        "",
        f"residual: standard deviation of the log rate around the law. Noise of a loss: {_noise(law)} nats, of whose "
        f"variance the horizons of a trunk share {law.shared:.0%}.",
        *law.notes,
        *law.flags,
    ]
    return "\n".join(lines)


def _noise(law: Law) -> str:
    values = sorted(law.noise.values())
    return f"{values[0]:.4f} to {values[-1]:.4f}"


# --------------------------------------------------------------------------------------------------- the schedule


def max_lr(law: Law) -> float:
    """The cap: the highest best rate that the sweep saw."""
    return max(cell.lr for cell in law.cells if cell.usable)


def _exponent(law: Law) -> float:
    return 1.0 if law.proportional else law.plane.c.value


def power(law: Law) -> Power:
    """The Power schedule of a law, without a warmup."""
    chosen = law.chosen
    if chosen.b.value >= 0:
        raise ConfigError(
            f"The best rate does not fall with the horizon in this ledger (b = {chosen.b}): the Power schedule cannot "
            "express that. Sweep longer horizons, or more seeds."
        )
    return Power(a=chosen.a.value, b=chosen.b.value, max_lr=max_lr(law), warmup_tokens=0, batch_exponent=_exponent(law))


def schedule(law: Law, ledger: list[dict[str, Any]], source: Path) -> str:
    """A file for configs/schedule/: the law, and the parametrisation that it belongs to."""
    found = power(law)
    chosen = law.chosen
    batches, tokens = ([getattr(c, n) for c in law.cells if c.usable] for n in ("batch", "tokens"))
    text = f"""\
# lr = min(max_lr, a · batch^batch_exponent · n^b), fitted to {source.name}: {len(batches)} best rates
# at batches {min(batches):g} to {max(batches):g} (× 4096 tokens) and {min(tokens):,} to {max(tokens):,} tokens.
# b {chosen.b}, a {chosen.a}, c {law.plane.c}; 95% intervals.
{"".join(f"# {line}{chr(10)}" for note in law.notes for line in textwrap.wrap(note, 116))}\
name: power
a: {found.a:.6g}
b: {found.b:.6g}
max_lr: {found.max_lr:.4g}  # the highest best rate of the sweep
batch_exponent: {found.batch_exponent:.6g}
warmup_tokens: ???
decay: {{start: null, tokens: 0, shape: exponential, floor: 0.0}}
rewarmup: {{start: null, tokens: 0}}
"""
    configs = [line["config"] for line in ledger if isinstance(line.get("config"), dict)]
    if configs:
        from train.model.mup import parametrisation

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
                "ledger makes a schedule that does not say which parametrisation it belongs to."
            ) from error
        common = {name: value for name, value in own[0].items() if all(other.get(name) == value for other in own)}
        text += "belongs_to:  # a run whose own differ is told so\n"
        text += "".join(f"  {json.dumps(k, ensure_ascii=False)}: {json.dumps(v)}\n" for k, v in common.items())
    return text


# ------------------------------------------------------------------------------------------------------ the plots


def plot(law: Law, folder: Path) -> list[Path]:
    """The pictures of a law as files."""
    from matplotlib import pyplot

    paths = []
    for name, figure in pictures(law):
        paths.append(folder / f"{name}.png")
        figure.savefig(paths[-1], dpi=110)
        pyplot.close(figure)
    return paths


def pictures(law: Law) -> Iterator[tuple[str, Any]]:
    """The paper's figures 2 to 4 for this ledger, by name: losses over rates, best rates over batch and tokens, γ."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import lines, pyplot, ticker

    sizes = list(dict.fromkeys(cell.size for cell in law.cells))
    horizons = sorted({cell.tokens for cell in law.cells})
    batches = sorted({cell.batch for cell in law.cells})
    hues = dict(zip(batches, pyplot.cm.viridis(np.linspace(0, 0.9, len(batches))), strict=True))
    shades = dict(zip(horizons, pyplot.cm.plasma(np.linspace(0, 0.85, len(horizons))), strict=True))

    for size in sizes:
        own = [tokens for tokens in horizons if any((c.size, c.tokens) == (size, tokens) for c in law.cells)]
        columns = min(3, len(own))
        rows = math.ceil(len(own) / columns)
        size_in = (4.2 * columns + 0.8, 3.2 * rows)
        figure, axes = pyplot.subplots(rows, columns, figsize=size_in, squeeze=False, layout="constrained")
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

    size_in = (10, 3.6 * len(sizes))
    figure, axes = pyplot.subplots(len(sizes), 2, figsize=size_in, squeeze=False, layout="constrained")
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

    figure, axis = pyplot.subplots(figsize=(7, 5), layout="constrained")
    look = looks(len(sizes))
    for number, size in enumerate(sizes):
        points = [(c.tokens, c.lr / c.batch) for c in law.best if c.size == size]
        color = look[number]["color"]
        axis.plot(*_columns(points), "osD^v"[number % 5], color=color, label=plain(name_of(size)), alpha=0.7)
        if size in law.sizes:
            _line(axis, law.sizes[size], horizons, color, "--", None)
    _line(axis, law.paper, horizons, "black", "-", f"all: γ ∝ tokens^{law.paper.b.value:.3f}")
    axis.set(xscale="log", yscale="log", xlabel="tokens", ylabel="γ = η / batch of the three best batches")
    axis.xaxis.set_minor_formatter(ticker.NullFormatter())
    figure.legend(fontsize=8, loc="outside lower center", ncols=3)
    axis.grid(alpha=0.3, which="both")
    yield "gamma", figure


def _curve(axis: Any, cell: Cell, color: Any) -> None:
    shown = [(rate, loss) for rate, loss in zip(cell.rates, cell.losses, strict=True) if math.isfinite(loss)]
    axis.plot(*_columns(shown), "o-", color=color, markersize=3, linewidth=0.8, label=f"{cell.batch:g}")
    if cell.usable:
        axis.plot(cell.lr, cell.loss, "*", color=color, markersize=9)


def _line(axis: Any, reading: Reading, horizons: list[int], color: str, style: str, label: str | None) -> None:
    tokens = np.geomspace(horizons[0], horizons[-1], 50)
    estimates = [reading.lr(1.0, t) for t in tokens]
    axis.plot(tokens, [e.value for e in estimates], style, color=color, label=label)
    if label:
        axis.fill_between(tokens, [e.low for e in estimates], [e.high for e in estimates], color=color, alpha=0.15)


def _columns(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


if __name__ == "__main__":
    main()
