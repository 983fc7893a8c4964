"""A sweep and its progress: which trials have a result, and which may be run next."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from powertrain.data import expand
from powertrain.data.files import read_record, replace_text
from powertrain.launch.sweep.lean import Design, Place
from powertrain.launch.sweep.ledger import ledger_lines, result_of, results
from powertrain.launch.sweep.trials import (
    SweepConfig,
    Trial,
    check_batches,
    check_trials,
    decay_tokens,
    overrides,
    plan,
    sweep_config,
)
from powertrain.schedulers import WITH_DECAY
from powertrain.schedulers.law import MIN_HORIZONS
from powertrain.train.compose import composed, composed_sweep
from powertrain.train.config import Config
from powertrain.train.errors import ConfigError

KEPT_ABOVE_BEST = 2  # learning rates above the best one that continue to the next horizon


def lean_design(sweep: SweepConfig, trials: list[Trial]) -> Design:
    """The design of a lean sweep whose whole grid is `trials`.

    Raises:
        ConfigError: a grid or a budget that gives no law.
    """
    grid: dict[Place, list[float]] = {}
    for trial in trials:
        place, rate = place_of(trial)
        grid.setdefault(place, []).append(rate)
    target = (sweep.target.batch, sweep.target.tokens) if sweep.target else None
    horizons, batches = ({trial.tokens for trial in trials}, {trial.batch for trial in trials})
    if len(horizons) < MIN_HORIZONS or len(batches) < 2:
        raise ConfigError(
            f"A lean sweep is for a law, which takes {MIN_HORIZONS} horizons and two batches or more; with "
            f"{sweep.min_steps} to {sweep.max_steps or 'any number of'} steps (sweep.min_steps, sweep.max_steps) this "
            f"one has {len(horizons)} of sweep.tokens and {len(batches)} of sweep.batch. Give more, or a grid "
            "(sweep.design=grid)."
        )
    design = Design(grid, target, sweep.budget_tokens or math.inf, sweep.decay_fraction)
    if (least := design.of_a_law()) > design.budget:
        raise ConfigError(
            f"sweep.budget_tokens is {sweep.budget_tokens:,}, which gives no law: two batches and the shortest "
            f"{MIN_HORIZONS} horizons take about {least:,.0f} tokens. Give as many, or shorter horizons."
        )
    return design


def place_of(trial: Trial) -> tuple[Place, float]:
    """A trial as a lean sweep asks for it: its cell and its learning rate."""
    return (trial.model, trial.batch, trial.tokens), dict(trial.fields)["lr"]


class Progress:
    """Which trials are done, and which may be run next.

    Args:
        results: name → line of the ledger.
        failed: names of trials that failed in this start.
        design: of a lean sweep, which chooses the trials.
    """

    def __init__(
        self,
        trials: list[Trial],
        results: Mapping[str, dict[str, Any]],
        failed: Collection[str] = (),
        design: Design | None = None,
    ) -> None:
        self.trials, self.results, self.failed, self.design = trials, results, failed, design
        if design is not None:
            losses = {place_of(t): results[t.name]["loss"] for t in trials if t.name in results}
            design.advance({place: math.inf if loss is None else loss for place, loss in losses.items()})
        self._groups: dict[tuple[Any, ...], dict[int, list[Trial]]] = {}
        self._skip_reasons: dict[Trial, str | None] = {}
        for trial in trials:
            self._groups.setdefault(trial.group, {}).setdefault(trial.tokens, []).append(trial)

    def before(self, trial: Trial) -> Trial | None:
        """The same trial at the horizon before."""
        earlier = [tokens for tokens in self._groups[trial.group] if tokens < trial.tokens]
        return dataclasses.replace(trial, tokens=max(earlier)) if earlier else None

    def done(self, trial: Trial) -> bool:
        return trial.name in self.results

    def skip_reason(self, trial: Trial) -> str | None:
        """Why a trial is skipped, or None. Decided by the results at the horizon before, whatever the order of work.

        `diverged`: it did so before. `pruned`: its learning rate lies more than two above the best one, and the best
        one does not rise with the horizon. `not asked`: a lean sweep has not selected it so far.
        """
        if trial not in self._skip_reasons:
            self._skip_reasons[trial] = self._find_skip_reason(trial)
        return self._skip_reasons[trial]

    def _find_skip_reason(self, trial: Trial) -> str | None:
        if self.design is not None:
            return None if place_of(trial) in self.design.asked else "not asked"
        before = self.before(trial)
        if before is None:
            return None
        if reason := self.skip_reason(before):
            return reason
        if self.done(before) and self.results[before.name]["loss"] is None:
            return "diverged"
        if [name for name, _ in trial.fields] != ["lr"]:
            return None
        group = self._groups[trial.group][before.tokens]
        if not all(map(self._is_known, group)):
            return None
        losses = [self.results[other.name]["loss"] if self.done(other) else None for other in group]
        finished = [loss for loss in losses if loss is not None]
        if not finished:
            return None
        above = [other for other in group if other.fields > group[losses.index(min(finished))].fields]
        return "pruned" if before in sorted(above, key=lambda other: other.fields)[KEPT_ABOVE_BEST:] else None

    def open(self) -> list[Trial]:
        """Trials that neither have a result nor are skipped."""
        return [trial for trial in self.trials if not self.done(trial) and not self.skip_reason(trial)]

    def ready(self) -> list[Trial]:
        """Open trials that have not failed, and whose trials at the horizon before are all known."""
        return [trial for trial in self.open() if trial.name not in self.failed and self._before_is_known(trial)]

    def _before_is_known(self, trial: Trial) -> bool:
        before = self.before(trial)
        return before is None or (
            before.name not in self.failed and all(map(self._is_known, self._groups[trial.group][before.tokens]))
        )

    def _is_known(self, trial: Trial) -> bool:
        return self.done(trial) or bool(self.skip_reason(trial)) or trial.name in self.failed

    def trained_tokens(self, sweep: SweepConfig, trial: Trial) -> int:
        """Tokens that the trial's own process trains: those after the decay start of the trial before."""
        before = self.before(trial)
        if before is None or trial.schedule not in WITH_DECAY:
            return trial.tokens
        return trial.tokens - (before.tokens - decay_tokens(sweep, before))


class Sweep:
    """A sweep's plan and its files."""

    def __init__(self, arguments: list[str]) -> None:
        self.arguments = arguments
        self.settings, node = composed_sweep(arguments)
        self.sweep: SweepConfig = sweep_config(node)
        check_batches(self.sweep, self.settings.data.sequence_length)
        self.trials = plan(self.sweep)
        self.design = lean_design(self.sweep, self.trials) if self.sweep.design == "lean" else None
        self.folder = Path(expand(self.settings.run.folder)) / self.sweep.name
        self.ledger = Path(expand(self.sweep.ledger)) if self.sweep.ledger else self.folder / "ledger.jsonl"

    def configs(self) -> dict[tuple[str, str], Config]:
        """The configuration of a trial of each model and schedule, after checking all trials."""
        configs: dict[tuple[str, str], Config] = {}
        for trial in self.trials:
            if (trial.model, trial.schedule) not in configs:
                configs[trial.model, trial.schedule] = composed(
                    [*self.arguments, *overrides(self.sweep, trial, self.settings)]
                )
        check_trials(self.sweep, self.trials, configs)
        return configs

    def progress(self) -> Progress:
        """What is known now: the ledger's lines, results that are not in it yet, and what failed in this start."""
        known, failed = results(self.ledger), set()
        for trial in self.trials:
            if trial.name in known:
                continue
            # A result.json that a power cut left unreadable is none: the trial runs again, and is finished at once.
            if line := result_of(read_record(self.folder / trial.name / "result.json")):
                known[trial.name] = line
            elif self.failed_file(trial).exists():
                failed.add(trial.name)
        return Progress(self.trials, known, failed, self.design)

    def failed_file(self, trial: Trial) -> Path:
        """Exists when the trial failed in this start of the sweep, and holds the reason."""
        return self.folder / trial.name / "failed.txt"


def write_ledger(sweep: Sweep) -> Progress:
    """Put what is known now into the ledger, in the order of the plan; what others have written stays as it is."""
    progress = sweep.progress()
    own = [trial.name for trial in sweep.trials if progress.done(trial)]
    lines = [
        text.strip()
        for _, text, line in ledger_lines(sweep.ledger)
        if (line.get("trial") not in own if isinstance(line, dict) else text.endswith(b"\n"))  # or it is cut short
    ]
    lines += [json.dumps(progress.results[trial.name]).encode() for trial in sweep.trials if progress.done(trial)]
    text = b"".join(line + b"\n" for line in lines)
    if not sweep.ledger.exists() or sweep.ledger.read_bytes() != text:
        sweep.ledger.parent.mkdir(parents=True, exist_ok=True)
        replace_text(sweep.ledger, text)
    return progress
