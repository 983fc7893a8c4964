"""Measure the critical batch of a run by branches with several batches off a checkpoint. The run is not changed.

usage: powertrain branch RUN --at STEP --batch 1x 2x 4x … [--tokens N] [--name NAME] [KEY=VALUE …]
       accelerate launch $(which powertrain) branch RUN --at STEP --batch 1x 2x 4x …

A batch is a multiple of the run's batch at that step. Each branch sees the same sequences in the same order, at the
learning rate that the Power schedule gives for its batch, and ends in a decay to 0 over its last quarter. All are then
evaluated on the same validation sequences: which batch needs more tokens for the same loss?

KEY=VALUE changes settings of the parent's configuration. After a stop or a kill the same command resumes. With another
evaluation.sequences finished branches are evaluated again, and not trained again.

examples:
  powertrain branch runs/trunk --at 200 --batch 1x 2x 4x 8x
  powertrain branch runs/trunk --at 200 --batch 0.5x 1x 2x --tokens 4_000_000 --name trunk-early
  powertrain branch runs/trunk --at 200 --batch 1x 2x 4x 8x evaluation.sequences=1024
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import math
import os
import re
import sys
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from powertrain.data.files import read_record, replace_text
from powertrain.launch.branch.critical import MORE, MOST, Array, Critical, critical
from powertrain.launch.estimate.learning_rate import check_followed, followed, ramp_setting
from powertrain.launch.estimate.tables import table_of
from powertrain.launch.parser import verb_parser
from powertrain.schedulers import Power
from powertrain.train.branch import Origin, begun, check_same, origin
from powertrain.train.check import batch_problems
from powertrain.train.cli import leave, trained
from powertrain.train.compose import load
from powertrain.train.config import BatchConfig, Config
from powertrain.train.errors import ConfigError, Diverged

MIN_STEPS = 32  # of the largest batch: AdamW's second moment remembers some 20 steps
SHARE = 20  # by default a branch takes at least a twentieth of the tokens that the run has trained
DECAY = 4  # a branch's last quarter is its decay

_MULTIPLE = re.compile(r"(\d+(?:\.\d+)?)x")


def main(arguments: list[str] | None = None) -> None:
    """Train the branches, evaluate them, and print what they say."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = verb_parser("branch", __doc__)
    parser.add_argument("run", type=Path, help="the folder of the run to branch off")
    parser.add_argument("--at", type=int, required=True, help="step of one of its checkpoints")
    parser.add_argument("--batch", nargs="+", required=True, metavar="Nx", help="multiples of the run's batch there")
    parser.add_argument(
        "--tokens",
        type=int,
        help=f"length of each branch; default: {MIN_STEPS} steps of the largest batch, and at least a twentieth of the "
        "tokens that the run has trained",
    )
    parser.add_argument(
        "--name", help="of the branches, beside their parent, before the batch; default: RUN-branch-STEP"
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    leave(lambda: _branch(parser.parse_intermixed_args(arguments), arguments))


def _branch(options: argparse.Namespace, arguments: list[str]) -> int:
    options.overrides += [each for each in options.batch if "=" in each]
    plan = planned(options)
    is_main = os.environ.get("RANK", "0") == "0"
    console = Console(width=None if is_main and os.isatty(1) else 100, highlight=False, markup=False, quiet=not is_main)
    console.print(plan.summary())
    for config in [config for config in plan.configs.values() if not _has_ended(config)]:  # the same on all ranks
        try:
            if not trained(config, "branch", arguments):
                return 0  # it has said so, and how to resume
        except Diverged as error:
            console.print(f"{config.run.name} has diverged: {error}")
        gc.collect()  # its engine's memory
    measured = [config for config in plan.configs.values() if not _has_diverged(config)]
    for config in [config for config in measured if _sums(config) is None]:
        _measure(config)
        gc.collect()
    if is_main:
        _report(console, plan)
    return 0


# ------------------------------------------------------------------------------------------------------------ the plan


@dataclass(frozen=True)
class Plan:
    """The branches.

    Attributes:
        run: the folder of the parent.
        step: of the parent, where they begin.
        start: reading of the clock there.
        base: the parent's batch there, in sequences.
        multiples: of it, ascending.
        tokens: of each branch.
        configs: name of a branch, as in its folder's → its configuration; of each multiple, and of the smallest one at
            half of the tokens.
    """

    run: Path
    step: int
    start: int
    base: int
    multiples: list[Fraction]
    tokens: int
    configs: dict[str, Config]

    @property
    def sequences(self) -> list[int]:
        """The batch of each multiple."""
        return [int(self.base * multiple) for multiple in self.multiples]

    @property
    def half(self) -> Config:
        """The smallest batch at half of the tokens."""
        return self.configs[_half(self.multiples[0])]

    def of(self, multiple: Fraction) -> Config:
        """The configuration of a multiple."""
        return self.configs[_label(multiple)]

    def power(self) -> Power:
        """The law."""
        return check_law(self.half)

    def summary(self) -> str:
        """What is trained."""
        labels = ", ".join(map(_label, self.multiples))
        return (
            f"Branches of {self.run} at step {self.step:,}, {self.start:,} tokens: batches of {labels} × {self.base:,} "
            f"sequences, {self.tokens:,} tokens each, and {_label(self.multiples[0])} once more over half of them; the "
            f"last quarter of each is a decay to 0. In all {self.tokens * (2 * len(self.multiples) + 1) // 2:,} tokens."
        )


def planned(options: argparse.Namespace) -> Plan:
    """The branches that are asked for: those begun as they are, others off the parent's checkpoint.

    Raises:
        ConfigError: there is no such checkpoint on the trunk, or no law for the batch; a multiple, a batch, the length
            or a setting is invalid; or a branch of the name was begun otherwise.
    """
    multiples = _multiples([each for each in options.batch if "=" not in each])
    run = options.run.resolve()
    prefix = options.name or f"{run.name}-branch-{options.at}"
    labels = {_half(multiples[0]): multiples[0], **{_label(multiple): multiple for multiple in multiples}}
    folders = {label: run.parent / f"{prefix}-{label}" for label in labels}
    there = {label: found for label in labels if (found := begun(folders[label], options.overrides)) is not None}
    at = origin(options.run, options.at, "branch") if len(there) < len(labels) else None
    if at is not None:
        start, base, config = at.tokens, at.config.sequences_at(at.tokens), at.config
    else:  # all have begun, and no longer need their parent
        config = there[_label(multiples[0])]
        start = _starts(config)
        base = int(config.sequences_at(start) / multiples[0])
    check_law(config)
    if not any(corpus.validation_fraction or corpus.validation_path for corpus in config.data.corpora.values()):
        raise ConfigError(
            f"No corpus of {options.run} has validation documents, so branches could not be compared: give one a "
            "validation_fraction or a validation_path."
        )
    tokens = _length(options.tokens, config, start, base, multiples)
    configs = {}
    for label, multiple in labels.items():
        own, length = int(base * multiple), tokens // (2 if label.endswith("half") else 1)
        if label in there:
            begins = _starts(there[label])
            was = {
                "at": Path(there[label].run.resume).name,
                "tokens": there[label].end_tokens - begins,
                "sequences": there[label].sequences_at(begins),
            }
            check_same(folders[label], was, {"at": f"step-{options.at:08d}", "tokens": length, "sequences": own})
            configs[label] = there[label]
        else:
            assert at is not None
            configs[label] = at.branch(_changes(at, folders[label], own, length), options.overrides)
        ranks = int(os.environ.get("WORLD_SIZE") or 1)
        for problem in batch_problems(configs[label], ranks, start):
            raise ConfigError(f"{label}: {problem}")
    return Plan(options.run, options.at, start, base, multiples, tokens, configs)


def check_law(config: Config) -> Power:
    """The law of the learning rate for a batch.

    Raises:
        ConfigError: the schedule has none.
    """
    power = config.make_schedule().power
    if power is None or power.batch_exponent <= 0:
        raise ConfigError(
            f"Branches take their learning rates from the schedule, and '{config.schedule['name']}' has no law for "
            "another batch: a loss could not tell a batch that is too large from a learning rate that does not fit it. "
            "Branch a run of schedule=power with a batch_exponent above 0; for others `powertrain sweep` and "
            "`powertrain fit` find the critical batch (docs/law.md)."
        )
    return power


def _multiples(texts: list[str]) -> list[Fraction]:
    for text in texts:
        if not _MULTIPLE.fullmatch(text) or not Fraction(text[:-1]):
            raise ConfigError(f"--batch has '{text}'; a multiple of the run's batch is written 2x or 0.5x.")
    multiples = sorted({Fraction(text[:-1]) for text in texts})
    if len(multiples) < 2:
        raise ConfigError("--batch has one multiple; to compare takes two or more, such as 1x 2x 4x 8x.")
    return multiples


def _label(multiple: Fraction) -> str:
    return f"{float(multiple):g}x"


def _half(smallest: Fraction) -> str:
    return f"{_label(smallest)}-half"


def _length(asked: int | None, config: Config, start: int, base: int, multiples: list[Fraction]) -> int:
    """Tokens of a branch: steps of every batch begin at its decay, and at that of a branch of half the length."""
    for multiple in multiples:
        if (base * multiple).denominator != 1:
            raise ConfigError(
                f"--batch has {_label(multiple)}, and {_label(multiple)} of the run's {base:,} sequences is no whole "
                "number of them."
            )
    steps = [int(base * multiple) * config.data.sequence_length for multiple in multiples]
    unit = math.lcm(*steps[1:], 2 * steps[0]) * DECAY
    least = MIN_STEPS * steps[-1]
    if asked is None:
        return -(-max(least, config.trained(start) // SHARE) // unit) * unit
    if asked < least or asked % unit:
        fitting = [(max(-(-least // unit), asked // unit) + more) * unit for more in (0, 1)]
        raise ConfigError(
            f"--tokens is {asked:,}. It has to be {least:,} or more, {MIN_STEPS} steps of the largest batch, and a "
            f"multiple of {unit:,}, so that every batch has whole steps before and in its decay: {fitting[0]:,} or "
            f"{fitting[1]:,}, for example."
        )
    return asked


def _changes(at: Origin, folder: Path, sequences: int, tokens: int) -> dict[str, Any]:
    decay = tokens // DECAY
    earlier = [
        {"from_tokens": phase.from_tokens, "sequences": phase.sequences}
        for phase in at.config.batch.ramp
        if phase.from_tokens < at.trained
    ]
    return {
        **at.settings(
            folder, {"start": at.tokens + tokens - decay, "tokens": decay, "shape": "exponential", "floor": 0.0}, tokens
        ),
        "batch.ramp": [*earlier, {"from_tokens": at.trained, "sequences": sequences}],
        "sample_prompt": None,
    }


def _starts(config: Config) -> int:
    """Reading of the clock where a branch began."""
    return config.end_tokens - DECAY * int(config.schedule["decay"]["tokens"])


# ------------------------------------------------------------------------------------------------------ the branches


def _has_diverged(config: Config) -> bool:
    return str(read_record(config.run_folder / "exit.json").get("reason", "")).startswith("Diverged")


def _has_ended(config: Config) -> bool:
    """Whether the branch is trained.

    Raises:
        ConfigError: by other settings than these.
    """
    from powertrain.train import checkpoint
    from powertrain.train.resume import changes

    newest = checkpoint.available(config.run_folder / "checkpoints")[-1:]
    if newest:
        changes(newest[0], config, ranks=1)
    if _has_diverged(config):
        return True
    ended = read_record(config.run_folder / "exit.json").get("reason") == "finished"
    return ended and bool(newest) and checkpoint.load_state(newest[0]).tokens >= config.end_tokens


def _sums(config: Config) -> Array | None:
    """(N, 2) nats and targets of every validation sequence, if they are recorded."""
    record = read_record(config.run_folder / "sequences.json")
    same = record.get("tokens") == config.end_tokens and record.get("asked") == config.evaluation.sequences
    return np.array(record["sums"], np.float64) if same else None


def _measure(config: Config) -> None:
    """Record the losses of a finished branch on every validation sequence. Collective.

    Raises:
        ConfigError: no validation split holds a sequence.
    """
    from powertrain.train import checkpoint
    from powertrain.train.assemble import assemble
    from powertrain.train.engine import Engine
    from powertrain.train.state import State

    engine = Engine(config)
    newest = engine.first_rank_decides(lambda: checkpoint.newest_valid(config.run_folder / "checkpoints"))
    parts = assemble(config, engine, State(), newest, lambda text: None)
    sums = parts.validation.per_sequence(engine)
    if not len(sums):
        raise ConfigError(
            f"No validation split is as long as a sequence: {'; '.join(parts.validation.problems.values())}."
        )
    if engine.is_main:
        record = {"tokens": config.end_tokens, "asked": config.evaluation.sequences, "sums": sums.tolist()}
        replace_text(config.run_folder / "sequences.json", json.dumps(record) + "\n")


# -------------------------------------------------------------------------------------------------------- the report


def _report(console: Console, plan: Plan) -> None:
    sums = [None if _has_diverged(plan.of(multiple)) else _sums(plan.of(multiple)) for multiple in plan.multiples]
    sums = [None if each is None or not np.isfinite(each).all() else each for each in sums]
    half = _sums(plan.half)
    if sums[0] is None or half is None or not np.isfinite(half).all():
        console.print("Cannot tell: the smallest batch has diverged, and others are compared with it.")
        return
    found = critical([float(each) for each in plan.sequences], sums, half)
    power, length = plan.power(), plan.half.data.sequence_length
    table = table_of(
        "batch", "sequences", "steps", "lr", "loss", f"against {_label(plan.multiples[0])}", "tokens needed"
    )
    for i, (multiple, sequences) in enumerate(zip(plan.multiples, plan.sequences, strict=True)):
        against, needed = found.differences[i], found.needed[i] if found.needed else None
        table.add_row(
            _label(multiple),
            f"{sequences:,}",
            f"{plan.tokens // (sequences * length):,}",
            f"{power(tokens=plan.start, batch=plan.half.beta(sequences)):.3g}",
            f"{found.losses[i]:.4f}" if math.isfinite(found.losses[i]) else "diverged",
            ""
            if not i or math.isinf(against.value)
            else f"{against.value:+.4f} ({against.low:+.4f} to {against.high:+.4f})",
            "?"
            if needed is None
            else "1"
            if not i
            else f"{_times(needed.value)} ({_times(needed.low)} to {_times(needed.high)})",
        )
    console.print(table)
    console.print(_verdict(plan, found, len(half), float(half.sum(axis=0)[0] / half.sum(axis=0)[1])))
    laws = [power.critical_batch(tokens) / plan.half.beta(1) for tokens in (plan.start, plan.start + plan.tokens)]
    console.print(
        f"The schedule's own, where its cap binds: {laws[0]:,.1f} sequences at the start, {laws[1]:,.1f} at the end."
    )
    if (batch := found.bound([float(each) for each in plan.sequences])) is not None:
        console.print(ramp(plan, batch), soft_wrap=True)


def _times(needed: float) -> str:
    return f"{needed:.2f}" if needed < MOST else f"{MOST:g} or more"


def _verdict(plan: Plan, found: Critical, count: int, half: float) -> str:
    smallest = _label(plan.multiples[0])
    more = "Give more --tokens (and a --name of its own), or evaluate more sequences (evaluation.sequences=…)."
    said = f"Losses are over {count:,} validation sequences, intervals 95% of resamples of them. "
    if found.batch is None:
        return (
            f"{said}Cannot tell the critical batch: half of the tokens bring {smallest} to a loss of {half:.4f}, and "
            f"what the other half lowers it by is not known to within a half. {more}"
        )
    low, value, high = found.batch.low, found.batch.value, found.batch.high
    defined = f"the batch that needs {MORE:g} times the tokens of {smallest}"
    if math.isfinite(high):
        said += f"The critical batch, {defined}, is {value:,.1f} sequences ({low:,.1f} to {high:,.1f})."
        if high <= plan.sequences[1]:
            said += " The run's own batch may be near or above it: branch with smaller ones, such as 0.5x."
        return said
    if found.bound([float(each) for each in plan.sequences]) is None:
        return (
            f"{said}Cannot tell the critical batch, {defined}: it may lie anywhere from {low:,.1f} sequences on. {more}"
        )
    if math.isinf(low):
        return f"{said}The critical batch, {defined}, is above the largest branch, {plan.sequences[-1]:,} sequences."
    return (
        f"{said}The critical batch, {defined}, is {low:,.1f} sequences or more: beyond that it cannot be told. {more}"
    )


def ramp(plan: Plan, batch: float) -> str:
    """The setting of a batch that follows the schedule's critical batch, scaled to be `batch` sequences at the start.

    It begins at the newest checkpoint of the parent, whose steps so far cannot change, and no batch is larger than the
    largest branch.
    """
    from powertrain.train import checkpoint

    config, newest = load(plan.run / "config.yaml"), checkpoint.available(plan.run / "checkpoints")
    now = config.trained(checkpoint.load_state(newest[-1]).tokens if newest else plan.start)
    power, scaled = check_followed(config), copy.deepcopy(config)
    own = {"a": power.max_lr / (config.beta(1) * batch) ** power.batch_exponent / math.pow(plan.start, power.b)}
    scaled.schedule = {**config.schedule, **own}
    scaled.batch = BatchConfig(plan.sequences[-1], config.batch.micro_sequences)
    sizes = followed(scaled, int(os.environ.get("WORLD_SIZE") or 1))
    taken = [(begin, size) for begin, size in config.batch_phases() if begin < now]
    first = max((size for begin, size in sizes if begin <= now), default=0)
    ahead = [(now, first), *((begin, size) for begin, size in sizes if begin > now)]
    ahead = [(begin, size) for begin, size in ahead if size > taken[-1][1]]
    if not ahead:
        return (
            f"By the schedule's exponent it gives no larger batch than {taken[-1][1]:,} sequences before the run's end."
        )
    return (
        "From its newest checkpoint on the run can follow it, growing as the schedule's, up to the largest branch:\n"
        f"  {ramp_setting([*taken, *ahead])}"
    )
