"""The loss at the end of a decay, predicted from other decays of the same run.

The gain of a decay is the trunk's loss at the tokens at which the decay ends, minus the loss of the decay. Over the
decays of a trunk it is taken as linear in two logarithms: of the tokens at the decay's start, and of the decay's length
as a share of them. The trunk's loss is taken as locally linear in the logarithm of the tokens. docs/decay.md compares
other forms.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from powertrain.data.files import read_record
from powertrain.launch.estimate.tables import table_of
from powertrain.train.compose import load
from powertrain.train.config import Config
from powertrain.train.console import human
from powertrain.train.errors import ConfigError
from powertrain.train.state import RAW
from powertrain.train.track import is_of_corpus, read_lines, weights_of

LEAST = 2  # decays to predict from
NEAR, FEW = 0.3, 6  # the trunk's loss is fitted to its evaluations within this log factor, and to so many at least
APART = 0.1  # a direction in which decays differ by less than this share of the largest spread gets no slope
BEYOND = 1.25  # times the tokens of the trunk's last evaluation: its loss is not extrapolated further

Points = Sequence[tuple[int, float]]  # tokens on the clock, and loss


@dataclass(frozen=True)
class Decayed:
    """A decay: tokens on the clock where it starts, how long it is, and the loss at its end."""

    start: int
    tokens: int
    loss: float = math.nan

    @property
    def end(self) -> int:
        """Tokens where it ends."""
        return self.start + self.tokens


def trunk_loss(points: Points, tokens: float) -> float:
    """The trunk's loss from its evaluations nearby, of which there are FEW or more."""
    x = np.log([n for n, _ in points]) - math.log(tokens)
    y = np.array([loss for _, loss in points])
    near = np.argsort(np.abs(x), kind="stable")[: max(FEW, int((np.abs(x) <= NEAR).sum()))]
    return float(np.polyfit(x[near], y[near], 1)[1])


def predicted(points: Points, decays: Sequence[Decayed], wanted: Decayed) -> float:
    """The loss at the end of `wanted`.

    The slopes are the smallest that fit best: where decays do not differ in a direction, the gain does not, either.

    Args:
        points: evaluations of the trunk, FEW or more.
        decays: of the trunk, one or more.
    """
    places = np.log([(decay.start, decay.tokens / decay.start) for decay in decays])
    gains = np.array([trunk_loss(points, decay.end) - decay.loss for decay in decays])
    centre, mean = places.mean(axis=0), gains.mean()
    slopes = np.linalg.lstsq(places - centre, gains - mean, rcond=APART)[0]
    gain = mean + (np.log((wanted.start, wanted.tokens / wanted.start)) - centre) @ slopes
    return trunk_loss(points, wanted.end) - float(gain)


def held_out(points: Points, decays: Sequence[Decayed]) -> list[float] | None:
    """The loss of each decay as predicted from the others; None where there are fewer than LEAST others."""
    if len(decays) <= LEAST:
        return None
    return [predicted(points, [*decays[:i], *decays[i + 1 :]], decay) for i, decay in enumerate(decays)]


# ----------------------------------------------------------------------------------------------------------- the runs


def trunk_points(run: Path, config: Config) -> tuple[list[tuple[int, float]], int]:
    """Evaluations of all corpora of a run on its trunk, and how many targets each is over.

    Those before a second warmup are left out: that may have followed a decay, of which the settings no longer tell.

    Raises:
        ConfigError: there are fewer than FEW of them.
    """
    schedule = config.make_schedule()
    _, begins = schedule.rewarmup or (0, 0)
    lines = [line for line in _overall(run) if line["tokens"] >= begins and schedule.phase(line["tokens"]) == "trunk"]
    points = [(line["tokens"], line["loss"]) for line in lines if line["targets"] == lines[-1]["targets"]]
    if len(points) < FEW:
        other = (
            f" with the number of targets of the last one, and {n} with another"
            if (n := len(lines) - len(points))
            else ""
        )
        raise ConfigError(
            f"{run} has {len(points)} evaluations of its trunk{other}. A prediction takes {FEW} or more: evaluate it "
            "more often (evaluation.every=…)."
        )
    return points, lines[-1]["targets"]


def decays_of(
    run: Path, config: Config, shape: str, floor: float, targets: int
) -> tuple[dict[str, Decayed], list[str]]:
    """The finished decays of this shape that were branched off a run, by their folder's name, and why others are left
    out; in the order of their ends."""
    from powertrain.train.resume import parent

    found: dict[str, Decayed] = {}
    others = []
    for folder in sorted(path.parent for path in run.parent.glob("*/config.yaml")):
        origin = parent(folder) if folder != run else None
        if origin is None or not _is_of(origin, run):
            continue
        branch = load(folder / "config.yaml")
        decay = branch.make_schedule().decay
        if decay is None:
            continue
        why, evaluations = "", _overall(folder)
        if read_record(folder / "exit.json").get("reason") != "finished" or not evaluations:
            others.append(f"{folder.name} is not finished")
            continue
        end = decay.start + decay.tokens
        after = branch.step_after(end - 1)  # the last step of the decay; a branch may have gone on
        last = next((line for line in evaluations if line["tokens"] == after), None)
        if (decay.shape, decay.floor) != (shape, floor):
            why = f"has the shape {decay.shape}, floor {decay.floor:g}"
        elif branch.rewarmup_start != config.rewarmup_start:
            why = "has another second warmup"
        elif branch.sequences_at(decay.start) != config.sequences_at(decay.start):
            why = "has another batch"
        elif _mixture(branch, end - 1) != _mixture(config, end - 1):
            why = "has another mixture"
        elif last is None:
            why = "has no evaluation at its end"
        elif last["targets"] != targets:
            why = f"was evaluated on {last['targets']:,} targets, its trunk on {targets:,}"
        else:
            found[folder.name] = Decayed(decay.start, decay.tokens, last["loss"])
        if why:
            others.append(f"{folder.name} {why}")
    return dict(sorted(found.items(), key=lambda each: each[1].end)), others


def _is_of(origin: Path, run: Path) -> bool:
    """Whether a checkpoint is one of `run`: by its path, or by the run's name where they were moved together."""
    recorded = origin.parent.parent
    return recorded.resolve() == run or (recorded.name == run.name and not recorded.exists())


def _overall(run: Path) -> list[dict[str, Any]]:
    """The evaluations of all corpora together after a step or more, of the weights themselves and not of their running
    average; none with a loss or tokens that no run has."""
    lines = (line for line in read_lines(run / "evals.jsonl") if line.get("corpus") == "overall" and is_of_corpus(line))
    return [
        line
        for line in lines
        if weights_of(line) == RAW
        and line["loss"] is not None
        and math.isfinite(line["loss"])
        and type(line.get("tokens")) is int
        and 0 < line["tokens"] < 2**63
    ]


def _mixture(config: Config, tokens: int) -> dict[str, float]:
    sequence = config.trained(tokens) // config.data.sequence_length
    return [mixture for begin, mixture in config.stages() if begin <= sequence][-1]


def reading_at(config: Config, step: int) -> int:
    """The clock after `step` steps, however long the budget."""
    tokens = 0
    phases = config.batch_phases()
    for (_, sequences), (end, _) in zip(phases, [*phases[1:], (math.inf, 0)], strict=True):
        size = sequences * config.data.sequence_length
        own = step if math.isinf(end) else min(step, max(0, -(-(int(end) - tokens) // size)))
        tokens, step = tokens + own * size, step - own
    return config.run.tokens_seen + tokens


def prediction(run: Path, step: int, tokens: int, shape: str, floor: float, console: Any) -> None:
    """Print the loss that a decay of `tokens` tokens from `step` would have, and the errors of such predictions.

    Raises:
        ConfigError: there are fewer than LEAST decays of this shape, too few evaluations of the trunk, or none near the
            end of the decay; or the step is not on the trunk.
    """
    run = run.resolve()
    config = load(run / "config.yaml")
    if step < 1:
        raise ConfigError(f"--at is {step}; it is a step of {run}, 1 or more.")
    start, schedule = reading_at(config, step), config.make_schedule()
    if (phase := schedule.phase(start)) != "trunk":
        raise ConfigError(f"Step {step} of {run} lies in its {phase}: a decay branches off the trunk.")
    if schedule.rewarmup is not None and start < schedule.rewarmup[0]:
        raise ConfigError(
            f"Step {step} of {run} lies before its second warmup, at {schedule.rewarmup[0]:,} tokens: the trunk is "
            "what comes after that. Give a later step."
        )
    if config.step_after(start) >= start + tokens:
        raise ConfigError(
            f"--tokens is {tokens:,}, and a step of {run} there is {config.step_after(start) - start:,} tokens: no "
            "step begins inside such a decay, so it would change nothing. Make it longer than a step."
        )
    points, targets = trunk_points(run, config)
    decays, others = decays_of(run, config, shape, floor, targets)
    left_out = f" Left out: {'; '.join(others)}." if others else ""
    if len(decays) < LEAST:
        raise ConfigError(
            f"Finished decays of the shape {shape} with floor {floor:g} beside {run}: {len(decays)}; a prediction "
            f"takes {LEAST} or more.{left_out} Train another one first, such as one that is short and early."
        )
    wanted, reached = Decayed(start, tokens), points[-1][0]
    if wanted.end > BEYOND * reached:
        raise ConfigError(
            f"The decay would end at {wanted.end:,} tokens, and the trunk was last evaluated at {reached:,}. Its loss "
            f"is not extrapolated beyond {BEYOND:g} times that: train the trunk further, or predict an earlier decay."
        )
    starts = [decay.start for decay in decays.values()]
    if max(starts) < 1.1 * min(starts) and not min(starts) / 1.1 < start < 1.1 * max(starts):
        raise ConfigError(
            f"All {len(decays)} decays of {run} with this shape start near {starts[0]:,} tokens, and this one would at "
            f"{start:,}. They do not show how the gain of a decay changes along the trunk: train one from another step."
            + left_out
        )
    told = held_out(points, list(decays.values()))
    table = table_of("decay", "from", "tokens", "loss", *(["predicted", "error"] if told else []))
    for i, (name, decay) in enumerate(decays.items()):
        row = [name, f"{decay.start:,}", f"{decay.tokens:,}", f"{decay.loss:.4f}"]
        table.add_row(*row, *([f"{told[i]:.4f}", f"{told[i] - decay.loss:+.4f}"] if told else []))
    console.print(table)
    if others:
        console.print(left_out.strip())
    loss = predicted(points, list(decays.values()), wanted)
    text = f"A decay of {tokens:,} tokens from step {step:,} ({human(start)} tokens) would end at a loss of {loss:.4f}."
    if told is None:
        text += f" With only {len(decays)} decays none can be held out, so no error can be given."
    else:
        errors = [abs(each - decay.loss) for each, decay in zip(told, decays.values(), strict=True)]
        text += (
            f" Predicted from the others, each of the {len(decays)} decays has an error of "
            f"{sum(errors) / len(errors):.4f} on average, {max(errors):.4f} at most."
        )
    for what, own, seen in (
        ("start", start, starts),
        ("share of the tokens before it", tokens / start, [decay.tokens / decay.start for decay in decays.values()]),
    ):
        beyond = max(own / max(seen), min(seen) / own)
        if beyond > 1.01:
            text += f" This extrapolates: its {what} is outside the range of the others, by a factor of {beyond:.2g}."
    if wanted.end > reached:
        text += f" The trunk's loss is extrapolated from {human(reached)} to {human(wanted.end)} tokens."
    console.print(text)
