"""The trials of a sweep, and the settings of each one's run.

A trial is a run at one horizon T. All trials that differ in T alone share one trunk: each begins from the checkpoint at
which the decay of the one before began, (1 − decay_fraction)·T, since up to there they are the same run. Nothing
on the trunk depends on T, so a trial's losses are those of a separate run, bit for bit.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import math
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from types import NoneType
from typing import Any

from omegaconf import MISSING, DictConfig, OmegaConf

from powertrain.schedulers import WITH_DECAY
from powertrain.train.check import check
from powertrain.train.compose import typed
from powertrain.train.config import LAW_SEQUENCE_LENGTH, Config, as_dict
from powertrain.train.errors import ConfigError


@dataclass
class Repeat:
    """One point of the grid, trained again at every horizon with these seeds, to measure the noise."""

    model: str = MISSING  # one of models
    batch: float = MISSING  # one of batch
    fields: dict[str, float] = MISSING  # of the schedule: lr, or a and b
    seeds: list[int] = MISSING  # to train it with at every horizon
    schedule: str = "wsd"  # one of schedules


@dataclass
class Target:
    """The batch and horizon that the law of a lean sweep is to predict."""

    batch: float = MISSING  # in units of 4096 tokens
    tokens: float = MISSING  # horizon


@dataclass
class SweepConfig:
    """The `sweep` part of configs/sweep/NAME.yaml; the rest of that file is an experiment."""

    name: str = MISSING  # the folder run.folder/name
    models: dict[str, dict[str, Any]] = MISSING  # NAME: fields of `model`
    schedules: dict[str, dict[str, list[float]]] = MISSING  # NAME: field: values; all combinations are trained
    batch: list[float] = MISSING  # in units of 4096 tokens
    tokens: list[int] = MISSING  # horizons
    decay_fraction: float = 0.1  # of each horizon, for power and wsd
    seeds: list[int] = field(default_factory=lambda: [0])  # each trains the whole grid
    repeats: list[Repeat] = field(default_factory=list)  # points of the grid to train with other seeds, for the noise
    design: str = "grid"  # grid: all trials; lean: the most informative about the law for their tokens
    target: Target | None = None  # of a lean sweep; default: all batches and horizons of the grid alike
    budget_tokens: int | None = None  # that a lean sweep may train in all; default: until more would not help
    min_steps: int = 100  # a batch is trained at the horizons that give it this many steps …
    max_steps: int | None = None  # … to this many; default: no limit
    jobs: int = 2  # trials at a time on this machine
    launcher: str | None = None  # what starts a trial, such as "accelerate launch --num_processes 8"; default: python
    ledger: str | None = None  # default: RUN.FOLDER/NAME/ledger.jsonl


@dataclass(frozen=True)
class Trial:
    """A run of the sweep. `fields` are the schedule's, in the order in which the sweep names them."""

    model: str
    schedule: str
    fields: tuple[tuple[str, float], ...]
    batch: float
    seed: int
    tokens: int

    @property
    def name(self) -> str:
        """The folder of the run; also the trial's key in the ledger."""
        values = "-".join(f"{name}{value:g}" for name, value in self.fields)
        return f"{self.model}-{self.schedule}-beta{self.batch:g}-{values}-seed{self.seed}-{self.tokens}"

    @property
    def group(self) -> tuple[Any, ...]:
        """The same for trials that differ in learning rate and horizon alone."""
        return self.model, self.schedule, self.batch, self.seed

    @property
    def steps(self) -> int:
        return round(self.tokens / (self.batch * LAW_SEQUENCE_LENGTH))


def sweep_config(node: Any) -> SweepConfig:
    """The checked `sweep` part of a composed configuration.

    Raises:
        ConfigError: a key is missing or unknown, or a value is invalid.
    """
    if not node:
        raise ConfigError("There is no sweep in this configuration. One is chosen with +sweep=NAME.")
    node = dict(node)
    if "schedules" in node:
        node["schedules"] = _whole_as_floats(node["schedules"])
    if not isinstance(node.get("target", {}), (Mapping, DictConfig, NoneType)):
        raise ConfigError(f"sweep.target is {node['target']}; it is written {{batch: 64, tokens: 1e9}}.")
    try:
        sweep = typed(OmegaConf.create(node), SweepConfig)
    except ConfigError as error:
        known = ", ".join(entry.name for entry in dataclasses.fields(SweepConfig))
        raise ConfigError(f"sweep: {error} The settings of a sweep are {known}.") from error
    for name in ("models", "schedules", "batch", "tokens", "seeds"):
        if not getattr(sweep, name):
            raise ConfigError(f"sweep.{name} is empty: there is nothing to train.")
    for schedule, grid in sweep.schedules.items():
        if not grid or not all(grid.values()):
            raise ConfigError(f"sweep.schedules.{schedule} is {grid}; it gives values for each field, as lr: [0.01].")
        for values in grid.values():
            _finite(f"sweep.schedules.{schedule}", values)
    _finite("sweep.batch", sweep.batch, above=0)
    _finite("sweep.tokens", sweep.tokens, above=0)
    _finite("sweep.jobs", [sweep.jobs], above=0)
    _finite("sweep.min_steps", [sweep.min_steps], above=0)
    if sweep.max_steps is not None:
        _finite("sweep.max_steps", [sweep.max_steps], above=0)
    if not re.fullmatch(r"\w[\w.-]*", sweep.name):
        raise ConfigError(f"sweep.name is '{sweep.name}'; it names a folder.")
    if not 0 < sweep.decay_fraction < 1:
        raise ConfigError(f"sweep.decay_fraction is {sweep.decay_fraction}; it is a share between 0 and 1.")
    _check_design(sweep)
    try:
        shlex.split(sweep.launcher or "")
    except ValueError as error:
        raise ConfigError(f"sweep.launcher is {sweep.launcher!r}, which no shell could read: {error}.") from error
    return sweep


def _check_design(sweep: SweepConfig) -> None:
    if sweep.design not in ("grid", "lean"):
        raise ConfigError(f"sweep.design is '{sweep.design}'; the designs are grid and lean.")
    given = [name for name in ("target", "budget_tokens") if getattr(sweep, name) is not None]
    if sweep.design == "grid":
        if given:
            raise ConfigError(f"sweep.{given[0]} is for sweep.design=lean; a grid trains everything.")
        return
    if list(sweep.schedules) != ["wsd"] or list(sweep.schedules["wsd"]) != ["lr"]:
        raise ConfigError(
            "A lean sweep brackets one number, the learning rate: sweep.schedules is to be wsd: {lr: [...]}."
        )
    _finite("sweep.schedules.wsd", sweep.schedules["wsd"]["lr"], above=0)
    if len(set(sweep.schedules["wsd"]["lr"])) < 3:
        raise ConfigError(
            f"sweep.schedules.wsd.lr is {sweep.schedules['wsd']['lr']}; to bracket the best learning rate takes three "
            "or more, best a wide range of factors of 2, of which a lean sweep trains few."
        )
    if len(set(sweep.seeds)) > 1 or sweep.repeats:
        raise ConfigError("A lean sweep trains one seed: sweep.repeats is to be [], and sweep.seeds one.")
    if sweep.target is not None:
        _finite("sweep.target", [sweep.target.batch, sweep.target.tokens], above=0)
    if sweep.budget_tokens is not None:
        _finite("sweep.budget_tokens", [sweep.budget_tokens], above=0)


def _whole_as_floats(value: Any) -> Any:
    """OmegaConf takes a whole number for a float, but not inside a dict of dicts."""
    if isinstance(value, dict):
        return {key: _whole_as_floats(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_whole_as_floats(entry) for entry in value]
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _finite(name: str, values: Sequence[float], above: float = -math.inf) -> None:
    for value in values:
        if not (value is not None and math.isfinite(value) and value > above):
            limit = f" above {above:g}" if above > -math.inf else ""
            raise ConfigError(f"{name} holds {value}; it takes finite numbers{limit}.")


def plan(sweep: SweepConfig) -> list[Trial]:
    """All trials, shortest horizon first, so that the ledger is at any moment a whole sweep up to some horizon.

    Raises:
        ConfigError: a decay or a horizon between two steps, or no trial at all.
    """
    trials: list[Trial] = []
    for tokens, model, (schedule, grid), batch in itertools.product(
        sorted(sweep.tokens), sweep.models, sweep.schedules.items(), sorted(sweep.batch)
    ):
        steps = tokens / (batch * LAW_SEQUENCE_LENGTH)
        if not sweep.min_steps <= steps <= (sweep.max_steps or math.inf):
            continue
        _check_boundaries(sweep, tokens, batch)
        names = list(grid)
        points = [
            (tuple(zip(names, values, strict=True)), sweep.seeds)
            for values in itertools.product(*(sorted(grid[n]) for n in names))
        ]
        for repeat in sweep.repeats:
            if (repeat.model, repeat.schedule, repeat.batch) == (model, schedule, batch):
                if sorted(repeat.fields) != sorted(names):
                    raise ConfigError(
                        f"A repeat of sweep.repeats gives {sorted(repeat.fields)}; '{schedule}' is swept over "
                        f"{sorted(names)}."
                    )
                points.append((tuple((name, repeat.fields[name]) for name in names), repeat.seeds))
        trials += [Trial(model, schedule, fields, batch, seed, tokens) for fields, seeds in points for seed in seeds]
    for repeat in sweep.repeats:
        if not any(
            (t.model, t.schedule, t.batch, dict(t.fields))
            == (repeat.model, repeat.schedule, repeat.batch, repeat.fields)
            and t.seed in repeat.seeds
            for t in trials
        ):
            raise ConfigError(f"{repeat} of sweep.repeats belongs to no model, schedule and batch of the sweep.")
    if not trials:
        limit = f" and at most {sweep.max_steps}" if sweep.max_steps else ""
        raise ConfigError(
            f"No batch has {sweep.min_steps} steps or more at any horizon{limit}: there is no trial. "
            "Change sweep.batch, sweep.tokens, sweep.min_steps or sweep.max_steps."
        )
    trials = list(dict.fromkeys(trials))
    names = [trial.name for trial in trials]
    if len(set(names)) < len(names) or max(map(len, names)) > 200:
        wrong = max(names, key=len) if max(map(len, names)) > 200 else next(n for n in names if names.count(n) > 1)
        raise ConfigError(
            f"A trial's folder would be named {wrong}: too long, or two trials would share it. Give models shorter "
            "names, and values that differ in six digits."
        )
    return trials


def _check_boundaries(sweep: SweepConfig, tokens: int, batch: float) -> None:
    step = batch * LAW_SEQUENCE_LENGTH
    if not step.is_integer():
        raise ConfigError(
            f"A batch of {batch:g} is {step:g} tokens, no whole number of them, let alone of sequences: sweep.batch "
            f"counts in units of {LAW_SEQUENCE_LENGTH} tokens."
        )
    if (where := _between_steps(sweep, tokens, batch)) is None:
        return
    every = math.lcm(*(round(b * LAW_SEQUENCE_LENGTH) for b in sweep.batch))
    unit = every * Fraction(sweep.decay_fraction).limit_denominator(1000).denominator
    fitting = max(1, round(tokens / unit)) * unit
    advice = f"Multiples of {unit:,} tokens fit every batch of this sweep, for example {fitting:,}."
    if any(_between_steps(sweep, fitting, b) for b in sweep.batch):
        advice = "No short horizon ends there: give sweep.decay_fraction fewer digits, as 0.1."
    raise ConfigError(f"At a batch of {batch:g} (steps of {step:,.0f} tokens) {where}, between two steps. {advice}")


def _between_steps(sweep: SweepConfig, tokens: int, batch: float) -> str | None:
    """Which of a trial's horizon and decay start would lie between two steps, and where; None if neither does."""
    step = batch * LAW_SEQUENCE_LENGTH
    for what, count in (("horizon", tokens), ("start of the decay", (1 - sweep.decay_fraction) * tokens)):
        if abs(count / step - round(count / step)) > 1e-6:
            return f"the {what} of T = {tokens:,} lies at {count:,.0f} tokens"
    return None


def check_batches(sweep: SweepConfig, sequence_length: int) -> None:
    """Check that batches are whole numbers of sequences.

    Raises:
        ConfigError: one is not.
    """
    for batch in sweep.batch:
        sequences = batch * LAW_SEQUENCE_LENGTH / sequence_length
        if not sequences.is_integer():
            near = sorted({max(1, math.floor(sequences)), math.ceil(sequences)})
            raise ConfigError(
                f"A batch of {batch:g} is {batch * LAW_SEQUENCE_LENGTH:g} tokens, no whole number of sequences of "
                f"{sequence_length}. sweep.batch counts in units of {LAW_SEQUENCE_LENGTH} tokens; near it lie "
                f"{' and '.join(str(n * sequence_length / LAW_SEQUENCE_LENGTH) for n in near)}."
            )


def check_trials(sweep: SweepConfig, trials: list[Trial], configs: Mapping[tuple[str, str], Config]) -> None:
    """Check that every trial can be trained; `configs` as composed by (model, schedule).

    Raises:
        ConfigError: one cannot.
    """
    for trial in trials:
        config = dataclasses.replace(configs[trial.model, trial.schedule])
        sequences = trial.batch * LAW_SEQUENCE_LENGTH / config.data.sequence_length
        decay = decay_tokens(sweep, trial)
        if trial.schedule in WITH_DECAY and decay <= trial.batch * LAW_SEQUENCE_LENGTH:
            raise ConfigError(
                f"The trial {trial.name} has {trial.steps} steps, and sweep.decay_fraction={sweep.decay_fraction:g} of "
                "them is no more than one. A step's learning rate is that at the tokens before it, so this decay would "
                f"do nothing. Raise sweep.min_steps to {math.ceil(2 / sweep.decay_fraction)}, or sweep.decay_fraction."
            )
        config.batch = dataclasses.replace(config.batch, sequences=int(sequences))
        config.run = dataclasses.replace(config.run, tokens=trial.tokens, seed=trial.seed)
        config.schedule = {**config.schedule, **dict(trial.fields)}
        if trial.schedule in WITH_DECAY:
            config.schedule["decay"] = {**(config.schedule.get("decay") or {}), "start": None, "tokens": decay}
        if config.run.tokens_seen or config.batch.ramp or config.data.stages or config.run.init_from:
            raise ConfigError(
                "A sweep's trials start at nothing, with one batch size and one mixture: leave out run.tokens_seen, "
                "run.init_from, batch.ramp and data.stages."
            )
        check(config)


def decay_tokens(sweep: SweepConfig, trial: Trial) -> int:
    """Tokens of the trial's decay; 0 for a schedule without one."""
    if trial.schedule not in WITH_DECAY:
        return 0
    return round(sweep.decay_fraction * trial.steps) * round(trial.batch * LAW_SEQUENCE_LENGTH)


def overrides(sweep: SweepConfig, trial: Trial, settings: DictConfig) -> list[str]:
    """The settings of a trial's run, on top of the sweep's own."""
    tokens_a_step = round(trial.batch * LAW_SEQUENCE_LENGTH)
    sequences = max(1, tokens_a_step // settings.data.sequence_length)
    decay = decay_tokens(sweep, trial)
    # A checkpoint where the decay starts, for the next horizon to begin from, and on the way there.
    every = math.gcd(trial.steps, trial.steps - decay // tokens_a_step) if decay else math.ceil(trial.steps / 10)
    kept = math.ceil(decay / tokens_a_step / every) + 1
    return [
        *(f"model.{name}={'null' if value is None else value}" for name, value in sweep.models[trial.model].items()),
        f"schedule={trial.schedule}",
        *(f"schedule.{name}={value!r}" for name, value in trial.fields),
        *([f"schedule.decay.tokens={decay}", "schedule.decay.start=null"] if decay else []),
        f"batch.sequences={sequences}",
        f"batch.micro_sequences={math.gcd(sequences, settings.batch.micro_sequences)}",
        f"run.tokens={trial.tokens}",
        f"run.seed={trial.seed}",
        f"run.name={trial.name}",
        f"run.folder={quoted(Path(settings.run.folder) / sweep.name)}",
        f"checkpoint.every={every}",
        f"checkpoint.keep={kept}",
        "evaluation.every=0",
        "run.export=false",  # half of what a short trial takes besides its steps; two verbs write both later
    ]


def quoted(value: object) -> str:
    """Quoted for Hydra's grammar."""
    text = str(value).replace("'", r"\'")
    return f"'{text}'"


def in_common(config: Config) -> dict[str, Any]:
    """What a line of the ledger records of a trial's configuration besides batch, learning rate, horizon and seed."""
    plain = as_dict(config)
    schedule = {name: value for name, value in plain["schedule"].items() if name not in ("lr", "a", "b", "decay")}
    decay = plain["schedule"].get("decay")
    return {
        "family": config.model.model_type,
        "hidden_size": config.model.hidden_size,
        "warmup_tokens": config.make_schedule().warmup_tokens,
        "config": {
            "model": plain["model"],
            "mup": plain["mup"],
            "optimizer": plain["optimizer"],
            "balance": plain["balance"],
            "schedule": {
                **schedule,
                **({"decay_shape": decay["shape"], "decay_floor": decay["floor"]} if decay else {}),
            },
            "sequence_length": plain["data"]["sequence_length"],
            "mixture": plain["data"]["mixture"],
            "evaluation_sequences": plain["evaluation"]["sequences"],
            "precision": plain["precision"],
        },
    }


def fingerprint(corpora: Mapping[str, str]) -> str:
    """One fingerprint for the tokens of all corpora."""
    return hashlib.sha256("".join(corpora[name] for name in sorted(corpora)).encode()).hexdigest()[:16]
