"""The tables of a sweep: what it will train, what it has found, and how long the rest may take."""

from __future__ import annotations

import math
from typing import Any

from rich.console import Group
from rich.table import Table

from powertrain.launch.sweep.lean import trained_tokens
from powertrain.launch.sweep.progress import Progress, Sweep, place_of
from powertrain.launch.sweep.trials import Trial
from powertrain.schedulers.cells import is_number
from powertrain.schedulers.law import expected_error
from powertrain.train.console import duration

MOST_COLUMNS = 8  # of losses side by side; with more only the best is shown


def planned(sweep: Sweep) -> Group:
    """Steps of every batch at every horizon, and the maximum numbers of trials and tokens."""
    progress, horizons = Progress(sweep.trials, {}), sorted(sweep.sweep.tokens)
    grid = Table("batch", *(f"{tokens:,} tokens" for tokens in horizons), title="steps")
    for batch in sorted(sweep.sweep.batch):
        trained = {t.tokens: f"{t.steps:,}" for t in sweep.trials if t.batch == batch}
        grid.add_row(f"{batch:g}", *(trained.get(tokens, "–") for tokens in horizons))
    limits = f"sweep.min_steps {sweep.sweep.min_steps}, sweep.max_steps {sweep.sweep.max_steps or 'none'}"
    tokens = sum(progress.trained_tokens(sweep.sweep, trial) for trial in sweep.trials)
    if sweep.design is not None:
        budget = (
            f"{sweep.sweep.budget_tokens:,} tokens" if sweep.sweep.budget_tokens else "what it finds worth its tokens"
        )
        return Group(
            grid,
            f"–: not trained ({limits}). A lean sweep trains some of these {len(sweep.trials)} trials of "
            f"{', '.join(sweep.sweep.models)}, up to {budget}; all of them would take {tokens:,} tokens.",
        )
    return Group(
        grid,
        f"–: not trained ({limits}). {len(sweep.trials)} trials of {', '.join(sweep.sweep.models)}, at most {tokens:,} "
        f"tokens; separate runs would take {sum(trial.tokens for trial in sweep.trials):,}.",
    )


def tables(sweep: Sweep, progress: Progress) -> Group:
    """Losses at the longest horizon that each row has reached: rows model × batch, columns the schedule's values."""
    grids = []
    for schedule in sweep.sweep.schedules:
        own = [t for t in sweep.trials if t.schedule == schedule and t.seed == sweep.sweep.seeds[0]]
        columns = sorted({trial.fields for trial in own})
        wide = len(columns) > MOST_COLUMNS
        names = ["best loss", "at"] if wide else ["\n".join(f"{n} {v:g}" for n, v in fields) for fields in columns]
        grid = Table("batch", "tokens", *names)
        for model in sweep.sweep.models:
            grid.add_section()
            grid.add_row(f"[italic]{model}[/]")
            for batch in sorted(sweep.sweep.batch):
                row = [t for t in own if (t.model, t.batch) == (model, batch)]
                if reached := [t.tokens for t in row if progress.done(t)] or [t.tokens for t in row][:1]:
                    here = {t.fields: t for t in row if t.tokens == max(reached)}
                    cells = _best_cell(progress, here) if wide else _cells(progress, here, columns)
                    grid.add_row(f"{batch:g}", f"{max(reached):,}", *cells)
        grid.title = schedule
        grids.append(grid)
    return Group(*grids)


def _best_cell(progress: Progress, here: dict[Any, Trial]) -> list[str]:
    losses = {fields: progress.results[t.name]["loss"] or math.inf for fields, t in here.items() if progress.done(t)}
    best = min(losses, key=lambda fields: losses[fields], default=())
    return [f"{losses[best]:.4f}", ", ".join(f"{n} {v:g}" for n, v in best)] if losses else ["…", ""]


def _cells(progress: Progress, here: dict[Any, Trial], columns: list[Any]) -> list[str]:
    losses = {fields: progress.results[t.name]["loss"] for fields, t in here.items() if progress.done(t)}
    best = min((loss for loss in losses.values() if loss is not None), default=None)
    cells = []
    for fields in columns:
        if fields in losses:
            loss = losses[fields]
            text = "diverged" if loss is None else f"{loss:.4f}"
            cells.append(f"[bold green]{text}[/]" if loss is not None and loss == best else text)
        else:
            skip_reason = progress.skip_reason(here[fields]) if fields in here else ""
            cells.append("" if skip_reason == "not asked" else "…" if skip_reason is None else skip_reason)
    return cells


def summary(sweep: Sweep, progress: Progress) -> str:
    """What is done, the tokens that shared trunks saved, and how long the rest may take."""
    done = [t for t in sweep.trials if progress.done(t)]
    if sweep.design is not None:
        budget = f" of {sweep.sweep.budget_tokens:,}" if sweep.sweep.budget_tokens else ""
        asked = [place_of(trial) for trial in done if place_of(trial) in sweep.design.asked]
        others = len(done) - len(asked)
        trained = trained_tokens(asked, sweep.sweep.decay_fraction)
        known = f" ({others} more that these settings do not ask for are not counted)" if others else ""
        return (
            f"{len(asked)} trial{'s' * (len(asked) != 1)} done, {trained:,.0f}{budget} tokens trained{known}. "
            f"{sweep.design.step.reason}"
        )
    out = [t for t in sweep.trials if progress.skip_reason(t) and not progress.done(t)]
    trained, apart = sum(progress.trained_tokens(sweep.sweep, t) for t in done), sum(t.tokens for t in done)
    saved = f", {trained:,} tokens trained where separate runs take {apart:,}" if trained < apart else ""
    pruned = f", {len(out)} not worth a longer horizon" if out else ""
    seconds = seconds_left(sweep, progress)
    left = f", about {duration(seconds)} left" if seconds else ""
    return f"{len(done)} of {len(sweep.trials)} trials done{pruned}{saved}{left}"


def pilot(sweep: Sweep, progress: Progress) -> str:
    """The error of b to expect of the whole sweep, from its shortest horizon."""
    lines = [progress.results[trial.name] for trial in sweep.trials if progress.done(trial)]
    planned = {(t.model, t.tokens, t.batch) for t in sweep.trials if t.schedule == "wsd"}
    try:
        noise, error, error_of_b = expected_error(lines, [(tokens, batch) for _, tokens, batch in planned])
    except ValueError as reason:
        return f"The error of b cannot be predicted yet: {reason}"
    return (
        f"Noise of a loss {noise:.4f} nats, of a log best learning rate {error:.2f}: the {len(planned)} best learning "
        f"rates of the whole sweep will give b with a standard error of about {error_of_b:.3f}, or more "
        "where the law is not exact."
    )


def seconds_left(sweep: Sweep, progress: Progress) -> float | None:
    """A guess from what is done: a start's cost, and the speed at the same model and batch, or near it."""
    known = {t: progress.results[t.name].get("seconds") for t in sweep.trials if progress.done(t)}
    done = [(t, float(s)) for t, s in known.items() if is_number(s, 0)]
    if not done:
        return None
    start = min(seconds for _, seconds in done)

    def speed(model: str, batch: float) -> float:
        near = min(
            {t.batch for t, _ in done if t.model == model} or {t.batch for t, _ in done},
            key=lambda b: abs(math.log(b / batch)),
        )
        alike = [
            (t, s) for t, s in done if t.batch == near and (t.model == model or all(o.model != model for o, _ in done))
        ]
        trained = sum(progress.trained_tokens(sweep.sweep, t) for t, _ in alike)
        return trained / max(sum(s for _, s in alike) - len(alike) * start, 0.1 * sum(s for _, s in alike))

    rest = sum(start + progress.trained_tokens(sweep.sweep, t) / speed(t.model, t.batch) for t in progress.open())
    return rest / sweep.sweep.jobs
