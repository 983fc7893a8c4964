"""Measure the critical batch of a run, by branches with several batches off one checkpoint. The run is not changed.

usage: powertrain branch RUN --at STEP --batch 1x 2x 4x … [--tokens N] [--name NAME] [KEY=VALUE …]
       accelerate launch $(which powertrain) branch RUN --at STEP --batch 1x 2x 4x …

Batches are multiples of the run's batch at that step. A branch for each of them is trained on the same sequences in the
same order, at the learning rate that the Power schedule has for its batch, and ends in a decay to 0 over its last
quarter. All are evaluated on the same validation sequences. The result is a table of the tokens that each batch needs
for the same loss, the critical batch, and a batch.ramp to follow it. docs/branch.md explains them.

KEY=VALUE changes settings of the run's configuration for the branches. After a stop or a kill the same command resumes.
With another evaluation.sequences finished branches are evaluated again, and nothing is trained.

examples:
  powertrain branch runs/trunk --at 200 --batch 1x 2x 4x 8x
  powertrain branch runs/trunk --at 200 --batch 0.5x 1x 2x --tokens 4_194_304 --name trunk-early
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
from powertrain.launch.branch.critical import FEWEST, MORE, MOST, Array, Critical, Interval, best_of, critical
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
SHARE = 20  # by default a branch has at least a twentieth of the tokens that the run has trained
DECAY = 4  # a branch's last quarter is its decay

_MULTIPLE = re.compile(r"(\d+(?:\.\d+)?)x")


def main(arguments: list[str] | None = None) -> None:
    """Train the branches, evaluate them, and print the critical batch."""
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
        "--name", help="names the branches NAME-2x and so on, in folders beside the run's; default: RUN-branch-STEP"
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    leave(lambda: _branch(parser.parse_intermixed_args(arguments), arguments))


def _branch(options: argparse.Namespace, arguments: list[str]) -> int:
    options.overrides += [each for each in options.batch if "=" in each]
    plan = planned(options)
    is_main = os.environ.get("RANK", "0") == "0"
    console = Console(width=None if is_main and os.isatty(1) else 100, highlight=False, markup=False, quiet=not is_main)
    console.print(plan.summary())
    configs = [plan.config(multiple) for multiple in plan.multiples]
    sums = _losses(configs, arguments)
    if sums is None:
        return 0  # a run has said that it was stopped, and how to resume
    best = best_of(sums)
    if best is None:
        console.print("Cannot tell the critical batch: all branches have diverged.")
        return 0
    halves = _losses([plan.config(plan.multiples[best], half=True)], arguments)
    if halves is None:
        return 0
    if halves[0] is None:
        console.print("Cannot tell the critical batch: the branch with half of the tokens has diverged.")
        return 0
    if is_main:
        found = critical([float(each) for each in plan.sequences], sums, best, halves[0])
        _report(console, plan, configs[0], found, halves[0])
    return 0


# ------------------------------------------------------------------------------------------------------------ the plan


@dataclass(frozen=True)
class Plan:
    """The branches.

    Attributes:
        options: of the command.
        at: the checkpoint of the parent; None if all branches have begun, and no longer need it.
        start: reading of the clock there.
        base: the parent's batch there, in sequences.
        multiples: of it, ascending.
        tokens: of each branch.
    """

    options: argparse.Namespace
    at: Origin | None
    start: int
    base: int
    multiples: list[Fraction]
    tokens: int

    @property
    def sequences(self) -> list[int]:
        """The batch of each multiple."""
        return [int(self.base * multiple) for multiple in self.multiples]

    def summary(self) -> str:
        """What is trained."""
        labels = ", ".join(map(_label, self.multiples))
        return (
            f"Branches of {self.options.run} at step {self.options.at:,}, {self.start:,} tokens: batches of {labels} × "
            f"{self.base:,} sequences, {self.tokens:,} tokens each, and the best of them once more with half of the "
            "tokens. The last quarter of each is a decay to 0. "
            f"In all {self.tokens * (2 * len(self.multiples) + 1) // 2:,} tokens."
        )

    def config(self, multiple: Fraction, half: bool = False) -> Config:
        """The configuration of a branch: as it was begun, or off the parent's checkpoint.

        Raises:
            ConfigError: there is no such checkpoint, it was begun otherwise, or a batch or a setting is invalid.
        """
        folder, overrides = _folder(self.options, multiple, half), self.options.overrides
        sequences, tokens = int(self.base * multiple), self.tokens // (1 + half)
        config = begun(folder, overrides)
        if config is not None:
            start = _starts(config)
            was = {"checkpoint": Path(config.run.resume).name, "tokens": config.end_tokens - start}
            was["sequences"] = config.sequences_at(start)
            asked = {"checkpoint": f"step-{self.options.at:08d}", "tokens": tokens, "sequences": sequences}
            check_same(folder, was, asked)
        else:
            at = self.at or origin(self.options.run, self.options.at, "branch")
            config = at.branch(_changes(at, folder, sequences, tokens), overrides)
        for problem in batch_problems(config, int(os.environ.get("WORLD_SIZE") or 1), self.start):
            raise ConfigError(f"{_label(multiple)}: {problem}")
        if config.evaluation.sequences < FEWEST:
            raise ConfigError(
                f"evaluation.sequences is {config.evaluation.sequences}; branches are compared over {FEWEST} "
                "validation sequences or more, better hundreds, because an interval is over resamples of them."
            )
        return config


def planned(options: argparse.Namespace) -> Plan:
    """The branches that are asked for.

    Raises:
        ConfigError: there is no such checkpoint on the trunk, or no law for the batch; a multiple, the length or a
            setting is invalid.
    """
    multiples = _multiples([each for each in options.batch if "=" not in each])
    there = [begun(_folder(options, multiple), options.overrides) for multiple in multiples]
    at, config = None, there[0]
    if config is None or None in there:
        at = origin(options.run, options.at, "branch")
        start, base, config = at.tokens, at.config.sequences_at(at.tokens), at.config
    else:
        start = _starts(config)
        base = int(config.sequences_at(start) / multiples[0])
    check_law(config)
    if not any(corpus.validation_fraction or corpus.validation_path for corpus in config.data.corpora.values()):
        raise ConfigError(
            f"No corpus of {options.run} has validation documents, so branches could not be compared: give one a "
            "validation_fraction or a validation_path."
        )
    return Plan(options, at, start, base, multiples, _length(options.tokens, config, start, base, multiples))


def check_law(config: Config) -> Power:
    """The law of the learning rate for a batch.

    Raises:
        ConfigError: the schedule has none.
    """
    power = config.make_schedule().power
    if power is None or power.batch_exponent <= 0:
        raise ConfigError(
            f"Branches take their learning rates from the schedule, and '{config.schedule['name']}' has no law for "
            "another batch: the loss could not tell a batch that is too large from a learning rate that does not fit "
            "it. Branch off a run with schedule=power and a batch_exponent above 0. For other schedules "
            "`powertrain sweep` and `powertrain fit` find the critical batch (docs/law.md)."
        )
    return power


def _multiples(texts: list[str]) -> list[Fraction]:
    for text in texts:
        if not _MULTIPLE.fullmatch(text) or not Fraction(text[:-1]):
            raise ConfigError(f"--batch has '{text}'; give multiples of the run's batch, written as 2x or 0.5x.")
    multiples = sorted({Fraction(text[:-1]) for text in texts})
    if len(multiples) < 2:
        raise ConfigError("--batch has one multiple; a comparison takes two or more, such as 1x 2x 4x 8x.")
    return multiples


def _label(multiple: Fraction) -> str:
    return f"{float(multiple):g}x"


def _folder(options: argparse.Namespace, multiple: Fraction, half: bool = False) -> Path:
    run = options.run.resolve()
    prefix = options.name or f"{run.name}-branch-{options.at}"
    return Path(run.parent / f"{prefix}-{_label(multiple)}{'-half' if half else ''}")


def _length(asked: int | None, config: Config, start: int, base: int, multiples: list[Fraction]) -> int:
    """Tokens of a branch: steps of every batch begin at its decay, and at that of a branch of half the length."""
    for multiple in multiples:
        if (base * multiple).denominator != 1:
            raise ConfigError(
                f"--batch has {_label(multiple)}, and {_label(multiple)} of the run's {base:,} sequences is no whole "
                "number of them."
            )
    steps = [int(base * multiple) * config.data.sequence_length for multiple in multiples]
    unit = math.lcm(*steps) * 2 * DECAY
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


def _losses(configs: list[Config], arguments: list[str]) -> list[Array | None] | None:
    """Train and evaluate those branches that are not trained or not evaluated yet. Collective.

    Returns:
        (N, 2) nats and targets of every validation sequence, or None for a branch that has diverged; None if one was
        asked to stop.
    """
    ended = [_has_ended(config) for config in configs]  # before anything is trained: the same on all ranks
    for i, config in enumerate(configs):
        if ended[i] is None:
            try:
                if not trained(config, "branch", arguments):
                    return None
                ended[i] = "finished"
            except Diverged as error:
                print(f"{config.run.name} has diverged. {error}")
                ended[i] = "diverged"
            gc.collect()  # its engine's memory
    recorded = [_recorded(config) for config in configs]
    sums: list[Array | None] = []
    for config, how, known in zip(configs, ended, recorded, strict=True):
        each = None if how == "diverged" else known if known is not None else _measured(config)
        sums.append(each if each is not None and np.isfinite(each).all() else None)
    return sums


def _has_ended(config: Config) -> str | None:
    """ "finished", "diverged", or None.

    Raises:
        ConfigError: it was trained with other settings than these.
    """
    from powertrain.train import checkpoint
    from powertrain.train.resume import changes

    newest = checkpoint.available(config.run_folder / "checkpoints")[-1:]
    if newest:
        changes(newest[0], config, ranks=1)
    reason = str(read_record(config.run_folder / "exit.json").get("reason"))
    if reason.startswith("Diverged"):
        return "diverged"
    over = bool(newest) and checkpoint.load_state(newest[0]).tokens >= config.end_tokens
    return "finished" if over and reason == "finished" else None


def _recorded(config: Config) -> Array | None:
    record = read_record(config.run_folder / "sequences.json")
    same = record.get("tokens") == config.end_tokens and record.get("asked") == config.evaluation.sequences
    return np.array(record["sums"], np.float64) if same else None


def _measured(config: Config) -> Array:
    """Evaluate every validation sequence by the last checkpoint of a branch, and record it. Collective.

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
        problems = "; ".join(parts.validation.problems.values())
        raise ConfigError(f"No corpus has a validation split that a sequence fits in: {problems}.")
    if engine.is_main:
        record = {"tokens": config.end_tokens, "asked": config.evaluation.sequences, "sums": sums.tolist()}
        replace_text(config.run_folder / "sequences.json", json.dumps(record) + "\n")
    return sums.numpy()


# -------------------------------------------------------------------------------------------------------- the report


def _report(console: Console, plan: Plan, config: Config, found: Critical, half: Array) -> None:
    """Print what was found; `config` is that of any branch."""
    power, length, best = check_law(config), config.data.sequence_length, _label(plan.multiples[found.best])
    table = table_of("batch", "sequences", "steps", "lr", "loss", f"against {best}", "tokens needed")
    for i, (multiple, sequences) in enumerate(zip(plan.multiples, plan.sequences, strict=True)):
        apart, needed = found.differences[i], found.needed[i] if found.needed else None
        table.add_row(
            _label(multiple),
            f"{sequences:,}",
            f"{plan.tokens // (sequences * length):,}",
            f"{power(tokens=plan.start, batch=config.beta(sequences)):.3g}",
            f"{found.losses[i]:.4f}" if math.isfinite(found.losses[i]) else "diverged",
            f"{apart.value:+.4f} ({apart.low:+.4f} to {apart.high:+.4f})" if 0 < apart.value < math.inf else "",
            _times(needed) if needed and i != found.best else "?" if needed is None else "1",
        )
    console.print(table)
    console.print(_verdict(plan, found, half))
    laws = [power.critical_batch(tokens) / config.beta(1) for tokens in (plan.start, plan.start + plan.tokens)]
    console.print(
        f"The schedule's own critical batch, where its cap binds: {laws[0]:,.1f} sequences at the start of the "
        f"branches, {laws[1]:,.1f} at their end."
    )
    if found.bound is not None:
        console.print(ramp(plan, found.bound), soft_wrap=True)


def _times(needed: Interval) -> str:
    low, value, high = (f"{each:.2f}" if each < MOST else f"{MOST:g} or more" for each in vars(needed).values())
    return value if low == high else f"{value} ({low} to {high})"


def _verdict(plan: Plan, found: Critical, half: Array) -> str:
    best, (nats, targets) = _label(plan.multiples[found.best]), half.sum(axis=0)
    more = "Train longer branches (--tokens, with another --name), or evaluate more sequences (evaluation.sequences=…)."
    said = f"Losses are over {len(half):,} validation sequences; intervals are 95%, over resamples of them. "
    if found.critical is None or found.needed is None:
        return (
            f"{said}Cannot tell the critical batch. With half of the tokens {best} has a loss of {nats / targets:.4f}; "
            f"how much the other half lowers it is not known to within half of that difference. {more}"
        )
    low, value, high = vars(found.critical).values()
    which = f"critical batch, which needs {MORE:g} times the tokens of {best},"
    if math.isfinite(high):
        said += f"The {which} is {value:,.1f} sequences ({low:,.1f} to {high:,.1f})."
    elif found.bound is None:
        said += f"The {which} is not known: it may be any from {low:,.1f} sequences on. {more}"
    elif math.isinf(low):
        said += f"The {which} is above the largest branch, {plan.sequences[-1]:,} sequences."
    else:
        said += f"The {which} is {low:,.1f} sequences or more. {more}"
    if any(each.low > 1 for each in found.needed[: found.best]):
        said += (
            f" Batches below {best} need more tokens, too. At its best learning rate a smaller batch would not, so the "
            "schedule's learning rate is not the best one there. A larger schedule.a or another batch_exponent may fit "
            "better."
        )
    elif found.best == 0 and high <= plan.sequences[1]:
        said += f" {best} itself may be near or above the critical batch: try smaller ones, such as 0.5x."
    return said


def ramp(plan: Plan, batch: float) -> str:
    """The setting of a batch that follows the schedule's critical batch, scaled to be `batch` sequences at the start.

    It begins at the newest checkpoint of the parent, whose steps so far cannot change, and no batch is larger than the
    largest branch.
    """
    from powertrain.train import checkpoint

    run = plan.options.run
    config, newest = load(run / "config.yaml"), checkpoint.available(run / "checkpoints")
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
            f"A ramp that follows it has no larger batch than {taken[-1][1]:,} sequences before the end of the run, "
            "so there is none to paste."
        )
    return (
        "From its newest checkpoint on the run can follow it, up to the largest branch. The batch grows as the "
        "schedule's critical batch does:\n"
        f"  {ramp_setting([*taken, *ahead])}"
    )
