"""The learning rate and the batch over a run, and a batch that follows the critical batch."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console

from powertrain.launch.estimate.tables import table_of
from powertrain.launch.estimate.time import steps_of
from powertrain.schedulers import Power
from powertrain.train.check import batch_problems, problems
from powertrain.train.config import Config, RampConfig
from powertrain.train.console import human
from powertrain.train.errors import ConfigError

MARKS = " ▁▂▃▄▅▆▇█"


def schedule_section(console: Console, config: Config) -> None:
    """Print the learning rate at the points where it changes, and its curve."""
    schedule = config.make_schedule()
    console.rule(f"learning rate, schedule {config.schedule.get('name')}", align="left")
    power = schedule.power
    if power is not None and power.batch_exponent <= 0:
        power = None  # no critical batch
    table = table_of("at", "tokens", "of the run", "sequences", *(["critical"] * (power is not None)), "lr", "phase")
    points = key_points(config)
    for name, tokens in points:
        sequences = config.sequences_at(tokens)
        rate = schedule(tokens=tokens, batch=config.beta(sequences))
        share = config.trained(tokens) / config.run.tokens
        critical = [f"{power.critical_batch(tokens) / config.beta(1):,.1f}"] if power is not None else []
        phase = schedule.phase(tokens)
        table.add_row(name, human(tokens), f"{share:.1%}", f"{sequences:,}", *critical, f"{rate:.3g}", phase)
    console.print(table)
    rates = [rate for _, rate in curve(config, 72)]
    top = max(schedule(tokens=at, batch=config.beta(config.sequences_at(at))) for _, at in points)
    console.print(
        "  "
        + "".join(MARKS[min(len(MARKS) - 1, math.ceil(rate / top * (len(MARKS) - 1)))] for rate in rates)
        + f"  peak {top:.3g}"
    )


def curve(config: Config, points: int) -> list[tuple[int, float]]:
    """(tokens, learning rate) at equal distances over the run."""
    schedule, start = config.make_schedule(), config.run.tokens_seen
    at = [start + config.run.tokens * number // points for number in range(points)]
    return [(tokens, schedule(tokens=tokens, batch=config.beta(config.sequences_at(tokens)))) for tokens in at]


def key_points(config: Config) -> list[tuple[str, int]]:
    """(event, tokens), in the order of the run."""
    schedule, start, end = config.make_schedule(), config.run.tokens_seen, config.end_tokens
    points = [("start", start), ("end of warmup", schedule.warmup_tokens)]
    points.append(("last step", start + steps_of(config)[1]))
    if (release := cap_release(config)) is not None and math.isfinite(release):
        points.append(("cap releases", math.ceil(release)))
    if schedule.rewarmup is not None:
        points += zip(("rewarmup", "end of rewarmup"), schedule.rewarmup, strict=True)
    if (decay := schedule.decay) is not None:
        points += [("decay starts", decay.start), ("half of decay", decay.start + decay.tokens // 2)]
    points += [(f"batch of {phase.sequences}", start + phase.from_tokens) for phase in config.batch.ramp]
    points += [(f"{quarter}/4", start + config.run.tokens * quarter // 4) for quarter in (1, 2, 3)]
    return sorted((point for point in points if start <= point[1] < end), key=lambda point: point[1])


def cap_release(config: Config) -> float | None:
    """Tokens on the clock after which max_lr no longer binds; a batch that grows can make it bind again."""
    if (power := config.make_schedule().power) is None:
        return None
    begins = [(config.run.tokens_seen + tokens, sequences) for tokens, sequences in config.batch_phases()]
    release = None
    for (begin, sequences), (end, _) in zip(begins, [*begins[1:], (math.inf, 0)], strict=True):
        of_batch = power.cap_release(config.beta(sequences))
        if release is None or of_batch > begin:
            release = min(of_batch, end)
    return release


def schedule_warnings(config: Config) -> Iterator[str]:
    """What is allowed in a schedule, and rarely intended."""
    schedule = config.make_schedule()
    release, decay = cap_release(config), schedule.decay
    trunk_ends = config.end_tokens if decay is None else decay.start
    warmup = config.trained(schedule.warmup_tokens)  # the part that lies ahead
    if release is not None and release >= trunk_ends:
        smooth = config.schedule.get("cap") == "smooth"
        rate = "between half of max_lr and all of it to its end" if smooth else "max_lr to its end, as WSD's is"
        yield (
            f"The cap would release at {human(release)} tokens, and the trunk ends at {human(trunk_ends)}: the "
            f"learning rate is {rate}. Train longer, with a smaller batch, or with a higher schedule.max_lr."
        )
    elif release is not None and release <= schedule.warmup_tokens and warmup > 0:
        smooth = config.schedule.get("cap") == "smooth"
        rate = "the learning rate stays below half of max_lr" if smooth else "max_lr is never reached"
        yield (
            f"The cap would release at {human(release)} tokens, inside the warmup of {human(schedule.warmup_tokens)}: "
            f"{rate}. A shorter schedule.warmup_tokens reaches more of it."
        )
    if warmup > 0.1 * config.run.tokens:
        yield f"The warmup takes {min(1, warmup / config.run.tokens):.0%} of the run; 1 to 5% is common."


def phase_warnings(config: Config) -> Iterator[str]:
    """Parts of a run that begin after its end."""
    for name, phases in (("batch.ramp", config.batch.ramp), ("data.stages", config.data.stages)):
        for phase in phases:
            if phase.from_tokens >= config.run.tokens:
                yield (
                    f"{name} has a part from {phase.from_tokens:,} tokens on, and the run ends after "
                    f"{config.run.tokens:,}: it is never reached."
                )


def check_followed(config: Config) -> Power:
    """The Power schedule whose critical batch a ramp can follow.

    Raises:
        ConfigError: there is none.
    """
    power = config.make_schedule().power
    if power is None or power.batch_exponent <= 0:
        name, exponent, remedy = config.schedule.get("name"), "", "Take schedule=power"
        if power is not None:
            exponent, remedy = f" with batch_exponent {power.batch_exponent:g}", "Set schedule.batch_exponent above 0"
        raise ConfigError(
            f"--ramp follows the critical batch of a Power schedule, and schedule {name}{exponent} has none. {remedy}, "
            "or drop --ramp."
        )
    return power


def followed(config: Config, ranks: int) -> list[tuple[int, int]]:
    """(tokens of the run, sequences) of a batch that grows with the critical batch, in the order of the run.

    Sizes are what all ranks take at once, batch.micro_sequences each, times powers of two. Each begins with the first
    step at which the critical batch has reached it; the smallest size begins the run, whatever the critical batch is.
    None is larger than the run's largest batch, and none begins in the decay, whose learning rate is that of its start.
    """
    power, seen, length = check_followed(config), config.run.tokens_seen, config.data.sequence_length
    trunk_ends = config.end_tokens if power.decay is None else min(power.decay.start, config.end_tokens)
    most = max(sequences for begin, sequences in config.batch_phases() if begin < config.run.tokens)
    size = config.batch.micro_sequences * ranks
    phases = [(0, size)]
    while (size := 2 * size) <= most:
        begin, before = phases[-1]
        if not power.cap_release(config.beta(size)) < trunk_ends:
            break
        step = before * length
        begin += max(0, -(-(math.ceil(power.cap_release(config.beta(size))) - seen - begin) // step)) * step
        while power.critical_batch(seen + begin) < config.beta(size):  # by rounding
            begin += step
        if seen + begin >= trunk_ends:
            break
        if begin == phases[-1][0]:
            phases.pop()
        phases.append((begin, size))
    return phases


def ramp_setting(phases: list[tuple[int, int]]) -> str:
    """batch.ramp of (tokens of the run, sequences), to paste into a shell; the first is batch.sequences."""
    parts = ",".join(f"{{from_tokens:{begin},sequences:{sequences}}}" for begin, sequences in phases[1:])
    return f"'batch.ramp=[{parts}]'"


def ramp_section(console: Console, config: Config, ranks: int) -> None:
    """Print the settings of a batch that follows the critical batch."""
    console.rule("a batch that follows the critical batch", align="left")
    unit = config.batch.micro_sequences * ranks
    if any(batch_problems(config, ranks)):
        console.print("None before the batch splits over the ranks: see the errors above.")
        return
    phases = followed(config, ranks)
    changed = copy.deepcopy(config)
    changed.batch.sequences = phases[0][1]
    changed.batch.ramp = [RampConfig(begin, sequences) for begin, sequences in phases[1:]]
    for problem in problems(changed):
        console.print(f"None would be taken: {problem}")
        return
    power = check_followed(config)
    console.print(f"  batch.sequences={phases[0][1]} {ramp_setting(phases)}", soft_wrap=True)
    above = config.trained(math.ceil(power.cap_release(config.beta(phases[0][1]))))
    most = max(sequences for begin, sequences in config.batch_phases() if begin < config.run.tokens)
    text = (
        f"{steps_of(changed)[0]:,} steps instead of {steps_of(config)[0]:,}. Sizes are {unit:,} sequences, "
        "batch.micro_sequences on each rank, times powers of two."
    )
    if 2 * unit > most:
        text += f" Twice that is more than the run's batch, {most:,}: a smaller batch.micro_sequences begins lower."
    elif 2 * phases[-1][1] > most > phases[-1][1]:
        text += f" The run's largest, {most:,}, is none of them."
    elif phases[-1][1] < most:
        text += f" The critical batch does not reach {2 * phases[-1][1]:,} before the decay or the end."
    elif len(phases) == 1:
        text += " The critical batch is larger than the run's from its first step on."
    if above > 0:
        text += f" The first batch, the smallest, is above the critical one until {above:,} tokens."
    console.print(text)


def draw(config: Config, path: Path) -> None:
    """Plot the learning rate over tokens, and the batch with a Power schedule's critical batch."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    figure = Figure(figsize=(8, 6), layout="constrained")
    axis, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    tokens, rates = zip(*curve(config, 2000), strict=True)
    axis.plot(tokens, rates)
    for name, at in key_points(config):
        if name in ("cap releases", "decay starts", "end of warmup"):
            axis.axvline(at, color="grey", linewidth=0.5)
            axis.annotate(name, (at, max(rates)), rotation=90, va="top", ha="right", fontsize=8)
    axis.set(ylabel="learning rate", title=config.run.name.replace("$", r"\$"), ylim=(0, None))
    batches = [config.beta(config.sequences_at(at)) for at in tokens]
    below.plot(tokens, batches, drawstyle="steps-post", label="batch")
    if (power := config.make_schedule().power) is not None and power.batch_exponent > 0:
        critical = [power.critical_batch(at) or math.nan for at in tokens]  # 0 before the first token
        below.plot(tokens, critical, "--", label="critical batch")
        below.legend()
    below.set(xlabel="tokens", ylabel="batch (× 4096 tokens)")
    below.set_yscale("log", base=2)
    below.xaxis.set_major_formatter(EngFormatter())
    figure.savefig(path, dpi=100)
