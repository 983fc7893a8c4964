"""What a run will take, before anything runs: memory, time, money, disk, its rates, and what would go wrong.

usage: powertrain estimate [+experiment=NAME] [KEY=VALUE …] [cluster.KEY=VALUE …] [--plot FILE] [--ramp]

Nothing is trained or prepared. Memory is counted by running a step's own code on tensors without contents.

  cluster.gpu=H100            H100 | H200 | A100 | L40S | B200 | cpu (this machine); or give what follows
  cluster.memory=80e9         bytes of a GPU             cluster.peak=989e12   its dense bf16 FLOP/s
  cluster.gpus=1              in all                     cluster.gpus_per_node=8
  cluster.mfu=0.4             share of the peak that is taken to be reached
  cluster.price=2.5           of a GPU and hour; without it there is no line about cost
  cluster.write=1e9           bytes a second to run.folder, all ranks together
  cluster.failure_hours=50677 of one GPU, between failures      cluster.restart_minutes=15  lost beside steps

  --plot FILE                 the rate, the batch and the critical batch over tokens
  --ramp                      the settings of a batch that grows with a Power schedule's critical batch, to paste

Exit status: 0 it would run, 1 something would go wrong, 2 bad usage.

examples:
  powertrain estimate +experiment=quickstart cluster.gpu=cpu
  powertrain estimate +experiment=powermoe_3b cluster.gpus=64 cluster.price=2.5 --plot rates.png
"""

from __future__ import annotations

import copy
import dataclasses
import math
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from powertrain.data import DataError, expand
from powertrain.launch.check import described
from powertrain.schedulers import Power
from powertrain.train.check import batch_doubts, batch_problems, doubts, problems
from powertrain.train.cli import guard
from powertrain.train.compose import composed
from powertrain.train.config import Config, RampConfig
from powertrain.train.console import human
from powertrain.train.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

# 419 unexpected interruptions in 54 days on 16,384 H100s: arXiv 2407.21783, section 3.3.4.
FAILURE_HOURS = 54 * 24 * 16_384 / 419
# Of a GPU's memory, for CUDA's context, NCCL's buffers, and blocks that the allocator cannot use.
USABLE = 0.9
COPYING = 10e9  # bytes a second from a GPU to its machine, during which a save has training stand still
CHECKPOINT_BYTES = 12  # a parameter: float32 master and two moments
MARKS = " ▁▂▃▄▅▆▇█"


@dataclass
class Cluster:
    """What a run is to have; see the module."""

    gpu: str = "H100"
    gpus: int = 1
    gpus_per_node: int = 8
    memory: float | None = None
    peak: float | None = None
    mfu: float = 0.4
    price: float | None = None
    write: float = 1e9
    failure_hours: float = FAILURE_HOURS
    restart_minutes: float = 15

    @property
    def on_gpu(self) -> bool:
        return self.gpu != "cpu"

    def engines(self, config: Config) -> list[str]:
        """The ways to run on it, simplest first; with `engine.expect` that one."""
        known = ["plain"] if self.gpus == 1 else ["ddp", "zero1", "zero2", "zero3"]
        known += ["zero3_offload"] if self.on_gpu else []
        expected = config.engine.expect
        return known if expected is None else [each for each in known if each.startswith(expected)] or [expected]


def main(arguments: list[str] | None = None) -> None:
    """Print the estimate."""
    arguments = sys.argv[1:] if arguments is None else arguments
    sys.exit(guard(lambda: _estimate(arguments)))


def _estimate(arguments: list[str]) -> int:
    if "--help" in arguments or "-h" in arguments:
        print(__doc__)
        return 0
    plot, arguments = _plot_file(arguments)
    ramp, arguments = "--ramp" in arguments, [each for each in arguments if each != "--ramp"]
    cluster = cluster_of([each.removeprefix("cluster.") for each in arguments if each.startswith("cluster.")])
    config = composed(described([each for each in arguments if not each.startswith("cluster.")]), checked=False)
    errors, warnings = list(problems(config)), list[str]()
    sound = not errors
    if ramp and sound:
        check_followed(config)

    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 100, highlight=False, soft_wrap=False, markup=False)
    if sound:
        errors, warnings = _sections(console, config, cluster)
    for kind, found in (("Warning", warnings), ("ERROR", errors)):
        for paragraph in found:
            console.print(f"{kind}: {paragraph}", markup=False)
    console.print(f"\n{len(errors)} error(s), {len(warnings)} warning(s)." if errors or warnings else "\nIt would run.")
    if ramp and sound:
        ramp_section(console, config, cluster.gpus)
    if plot is not None and sound:
        draw(config, plot)
    return 1 if errors else 0


def _plot_file(arguments: list[str]) -> tuple[Path | None, list[str]]:
    if "--plot" not in arguments:
        return None, arguments
    place = arguments.index("--plot")
    if place + 1 == len(arguments):
        raise ConfigError("--plot takes a file, such as rates.png or rates.svg.")
    file = Path(arguments[place + 1])
    if file.suffix not in (".png", ".svg", ".pdf") or not file.absolute().parent.is_dir():
        raise ConfigError(f"--plot is {file}; it takes a .png, .svg or .pdf in a folder that exists.")
    return file, arguments[:place] + arguments[place + 2 :]


def cluster_of(settings: list[str]) -> Cluster:
    """Raises ConfigError: a setting or GPU that is not known, or a value out of its range."""
    from powertrain.train.metrics import GPUS

    try:
        given = OmegaConf.from_dotlist(settings)
        found: Any = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Cluster), given))
    except (OmegaConfBaseException, YAMLError) as error:
        known = ", ".join(field.name for field in dataclasses.fields(Cluster))
        raise ConfigError(f"cluster: {str(error).partition(chr(10))[0]}. Its settings are {known}.") from error
    cluster: Cluster = found
    for name, value in vars(cluster).items():
        if isinstance(value, (int, float)) and not 1e-9 <= value <= 1e24:
            raise ConfigError(f"cluster.{name} is {value}; it has to be a number greater than zero, from 1e-9 to 1e24.")
    if cluster.gpu in GPUS:
        peak, memory = GPUS[cluster.gpu]
        cluster.peak, cluster.memory = cluster.peak or peak, cluster.memory or memory
    elif cluster.gpu == "cpu":
        import psutil

        cluster.memory = cluster.memory or psutil.virtual_memory().total / min(cluster.gpus, cluster.gpus_per_node)
    elif cluster.memory is None or cluster.peak is None:
        raise ConfigError(
            f"cluster.gpu is {cluster.gpu}, which is none of {', '.join(GPUS)} and cpu: give cluster.memory in bytes "
            "and cluster.peak in FLOP/s."
        )
    if cluster.mfu > 1:
        raise ConfigError(f"cluster.mfu is {cluster.mfu}; it is a share of the peak, at most 1.")
    return cluster


def _sections(console: Console, config: Config, cluster: Cluster) -> tuple[list[str], list[str]]:
    """Print everything; errors and warnings."""
    from powertrain.train import metrics
    from powertrain.train.model import mup

    counts = metrics.parameters_of(config)
    flops = metrics.flops_per_token(config, counts)
    steps, _ = steps_of(config)
    console.rule(f"{config.run.name}: {config.model.model_type}", align="left")
    console.print(
        f"parameters        {human(counts['total'])}, of them embedding {human(counts['embedding'])}; active for a "
        f"token {human(counts['active'] + counts['embedding'])}, without embedding {human(counts['active'])}\n"
        f"tokens            {human(config.run.tokens)} in {steps:,} steps; {config.run.tokens / counts['total']:,.1f} "
        f"a parameter, {config.run.tokens / counts['active']:,.1f} an active one\n"
        f"a step            {config.batch.sequences:,} × {config.data.sequence_length:,} = "
        f"{config.batch.sequences * config.data.sequence_length:,} tokens\n"
        f"FLOPs             {flops:.3g} a token, {flops * config.run.tokens:.3g} in all (forward and backward)"
    )
    errors = list(batch_problems(config, cluster.gpus))
    if config.engine.expect == ("plain" if cluster.gpus > 1 else "ddp"):
        errors.append(f"engine.expect is {config.engine.expect}, which cluster.gpus={cluster.gpus} cannot be.")
    warnings = [*doubts(config), *batch_doubts(config), *schedule_warnings(config), *phase_warnings(config)]
    engine = None
    if not errors:
        engine = memory_section(console, config, cluster)
        if engine is None:
            errors.append(
                f"batch.micro_sequences={config.batch.micro_sequences} fits {USABLE:.0%} of "
                f"{_bytes(cluster.memory or 0)} with none of {', '.join(cluster.engines(config))}. Take a smaller one, "
                "engine.activation_checkpointing=true, more GPUs or larger ones."
            )
    time_section(console, config, cluster, counts["total"], flops, engine)
    schedule_section(console, config)
    data_errors, data_warnings = data_problems(config, console)
    console.rule(align="left")
    more_errors, more_warnings = machine_problems(config, cluster, counts["total"])
    if unlike := mup.unlike_the_law(config):
        warnings.append(f"The schedule's law belongs to another parametrisation: {'; '.join(unlike)}.")
    return [*errors, *data_errors, *more_errors], [*warnings, *data_warnings, *more_warnings]


def steps_of(config: Config) -> tuple[int, int]:
    """Steps of the whole run, and tokens of the run before the last one; a batch grows between steps."""
    tokens = steps = last = 0
    phases = config.batch_phases()
    for (_, sequences), (end, _) in zip(phases, [*phases[1:], (config.run.tokens, 0)], strict=True):
        size = sequences * config.data.sequence_length
        own = max(0, -(-(min(end, config.run.tokens) - tokens) // size))
        steps, tokens, last = steps + own, tokens + own * size, size if own else last
    return steps, tokens - last


# ------------------------------------------------------------------------------------------------ memory


def memory_section(console: Console, config: Config, cluster: Cluster) -> str | None:
    """Print what each engine takes, and what fits; the engine to take, or None."""
    from powertrain.launch import memory
    from powertrain.train import metrics

    ways = cluster.engines(config)
    limit, micro = USABLE * (cluster.memory or 0), config.batch.micro_sequences
    share = config.batch.sequences // cluster.gpus
    # As configured first, then what else divides a rank's share, as long as anything fits.
    sizes = [micro, *(size for size in (2**n for n in range(16)) if size != micro and share % size == 0)]
    needed: dict[int, dict[str, Counter[str]]] = {}
    for size in sizes:
        smaller = [found for other, found in needed.items() if other < size]
        engines = [e for e in ways if all(found[e].total() <= limit for found in smaller if e in found)]
        if size != micro and not (engines := [e for e in engines if all(e in found for found in smaller)]):
            break
        changed = copy.deepcopy(config)
        changed.batch.micro_sequences = size
        passes = memory.Passes(changed, cluster.gpus, cluster.on_gpu)
        needed[size] = {e: memory.needed(changed, e, cluster.gpus, passes) for e in engines}
    fits = {
        e: [size for size in sorted(needed) if e in needed[size] and needed[size][e].total() <= limit] for e in ways
    }

    unit, name = (
        (1e9, "GB") if limit >= 20e9 and max(each.total() for each in needed[micro].values()) > 1e9 else (1e6, "MB")
    )

    def sized(size: float) -> str:
        return f"{size / unit:,.1f}"

    console.rule(
        f"memory of one {'GPU' if cluster.on_gpu else 'rank'} in {name}, batch.micro_sequences={micro}", align="left"
    )
    table = _table("", *memory.PARTS, "sum", "")
    for engine, parts in needed[micro].items():
        mark = "" if parts.total() <= limit else "✗"
        table.add_row(engine, *(sized(parts[part]) for part in memory.PARTS), sized(parts.total()), mark)
    console.print(table)
    attention, experts = memory.kernels(config, cluster.on_gpu)
    console.print(
        f"At a step's most, on {cluster.gpus} of them. ✗: over {USABLE:.0%} of {sized(cluster.memory or 0)} {name}. "
        f"Counted with {attention}{f', {experts}, equal shares for all experts' if config.model.is_moe else ''}"
        f"{', activation checkpointing' if config.engine.activation_checkpointing else ''}. copies: working weights; "
        "backward: gradients on their way; buffers: of DeepSpeed."
    )
    if "zero3_offload" in needed[micro]:
        host = 16 * metrics.parameters_of(config)["total"] / cluster.gpus * min(cluster.gpus, cluster.gpus_per_node)
        console.print(f"zero3_offload keeps {sized(host)} {name} more in the memory of each machine.")
    if len(needed) > 1:
        table = _table("sum, by batch.micro_sequences", *map(str, sorted(needed)))
        for engine in ways:
            sums = [needed[size][engine].total() if engine in needed[size] else None for size in sorted(needed)]
            table.add_row(engine, *("✗" if each is None else f"{sized(each)}{' ✗' * (each > limit)}" for each in sums))
        console.print(table)
    able = [engine for engine in ways if fits[engine]]
    chosen = next((engine for engine in able if micro in fits[engine]), None)
    if chosen is None:
        if able:
            console.print(f"With {able[0]} batch.micro_sequences={fits[able[0]][-1]} would fit.")
        return None
    console.print(f"{chosen} is the simplest that fits, with up to {fits[chosen][-1]} sequences:")
    console.print(command_of(cluster, chosen, fits[chosen][-1]), soft_wrap=True, markup=False)
    return chosen


def command_of(cluster: Cluster, engine: str, micro: int) -> str:
    """What to paste; the run's own settings follow."""
    if engine == "plain":
        return f"  accelerate launch $(which powertrain) train … batch.micro_sequences={micro}"
    if cluster.gpus <= cluster.gpus_per_node:
        environment = "ACCELERATE_USE_CPU=true " if not cluster.on_gpu and engine == "ddp" else ""
        file = f"--config_file $(powertrain path {engine}) --num_processes {cluster.gpus}"
        return f"  {environment}accelerate launch {file} $(which powertrain) train … batch.micro_sequences={micro}"
    nodes = -(-cluster.gpus // cluster.gpus_per_node)
    file = "" if engine == "zero3" else f"ACCELERATE_CONFIG=$(powertrain path {engine}) "
    return f"  {file}sbatch --nodes={nodes} $(powertrain path train.sbatch) … batch.micro_sequences={micro}"


# ------------------------------------------------------------------------------------------------ time, cost, failures


def time_section(
    console: Console, config: Config, cluster: Cluster, count: int, flops: float, engine: str | None
) -> None:
    """Print time, cost, checkpoints, and what failures take of it."""
    console.rule("time and disk", align="left")
    size = CHECKPOINT_BYTES * count
    steps, _ = steps_of(config)
    every = config.checkpoint.every or steps
    saves = -(-steps // every)
    most = min(config.checkpoint.keep + 1, saves)  # one of them is being written
    console.print(
        f"checkpoints       {_bytes(size)} each ({CHECKPOINT_BYTES} bytes a parameter), {saves:,} of them, every "
        f"{every:,} steps: {_bytes(size * saves)} written\n"
        f"on disk           {_bytes(size * most)}: {most:,} "
        f"at the most, of which checkpoint.keep={config.checkpoint.keep} stay\n"
        f"writing one       {size / cluster.write:,.0f} s at {cluster.write / 1e9:g} GB/s (cluster.write)"
    )
    if cluster.peak is None:
        console.print("time              not known: give cluster.peak, as launch.bench measures it")
        return
    seconds = flops * config.run.tokens / (cluster.gpus * cluster.peak * cluster.mfu)
    a_step = seconds / steps
    sharded = engine is not None and engine.startswith("zero")
    standing = size / (cluster.gpus if sharded else 1) / COPYING
    between = 3600 * cluster.failure_hours / cluster.gpus
    # Young 1974, Daly 2006: the interval at which what saves cost is what failures cost.
    best = max(math.sqrt(2 * standing * between), size / cluster.write)
    console.print(
        f"training          {_time(seconds)}, {a_step:.2f} s a step, {human(config.run.tokens / seconds)} tokens/s: "
        f"{cluster.gpus} × {cluster.peak / 1e12:,.0f} TFLOP/s at an MFU of {cluster.mfu:g}, which is assumed "
        "(cluster.mfu)"
    )
    good = goodput(every * a_step, standing, between, cluster.restart_minutes * 60)
    console.print(
        f"failures          one in {_time(between)}, {seconds / between:.1f} in the run (one of {cluster.gpus} GPUs "
        f"fails every {cluster.failure_hours:,.0f} h)\n"
        f"saving            every {_time(every * a_step)} as configured, where training stands still for "
        f"{standing:.2f} s; best every {_time(best)}, checkpoint.every={max(1, round(best / a_step)):,}\n"
        f"goodput           {good:.2%}: what is left when saves, lost steps and restarts of "
        f"{cluster.restart_minutes:g} min are taken off; {_time(seconds / good)} in all"
    )
    if cluster.price is not None:
        hours = cluster.gpus * seconds / good / 3600
        console.print(f"cost              {hours * cluster.price:,.0f}: {hours:,.0f} GPU hours at {cluster.price:g}")


def goodput(interval: float, standing: float, between: float, restart: float) -> float:
    """Share of the time that trains what stays: a save costs `standing` seconds in each interval, and a failure, every
    `between` seconds, half an interval and a restart."""
    return 1 / ((1 + standing / interval) * (1 + (interval / 2 + restart) / between))


# ------------------------------------------------------------------------------------------------ the schedule


def schedule_section(console: Console, config: Config) -> None:
    """Print the rate where something happens to it, and its curve."""
    schedule = config.make_schedule()
    console.rule(f"rate, schedule {config.schedule.get('name')}", align="left")
    power = schedule.power
    if power is not None and power.batch_exponent <= 0:
        power = None  # no critical batch
    table = _table("at", "tokens", "of the run", "sequences", *(["critical"] * (power is not None)), "rate", "phase")
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
    """(tokens, rate) at equal distances over the run."""
    schedule, start = config.make_schedule(), config.run.tokens_seen
    at = [start + config.run.tokens * number // points for number in range(points)]
    return [(tokens, schedule(tokens=tokens, batch=config.beta(config.sequences_at(tokens)))) for tokens in at]


def key_points(config: Config) -> list[tuple[str, int]]:
    """(what happens, tokens), in the order of the run."""
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
    """Clock reading from which on max_lr sets no rate any more: a batch that grows can bring it back."""
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
    """What of a schedule is allowed and seldom meant."""
    schedule = config.make_schedule()
    release, decay = cap_release(config), schedule.decay
    trunk_ends = config.end_tokens if decay is None else decay.start
    warmup = config.trained(schedule.warmup_tokens)  # what of it lies ahead
    if release is not None and release >= trunk_ends:
        smooth = config.schedule.get("cap") == "smooth"
        rate = "between half of max_lr and all of it to its end" if smooth else "max_lr to its end, as WSD's is"
        yield (
            f"The cap would release at {human(release)} tokens, and the trunk ends at {human(trunk_ends)}: the rate is "
            f"{rate}. Train longer, with a smaller batch, or with a higher schedule.max_lr."
        )
    elif release is not None and release <= schedule.warmup_tokens and warmup > 0:
        smooth = config.schedule.get("cap") == "smooth"
        rate = "the rate stays below half of max_lr" if smooth else "max_lr is never reached"
        yield (
            f"The cap would release at {human(release)} tokens, inside the warmup of {human(schedule.warmup_tokens)}: "
            f"{rate}. A shorter schedule.warmup_tokens comes nearer to it."
        )
    if warmup > 0.1 * config.run.tokens:
        yield f"The warmup takes {min(1, warmup / config.run.tokens):.0%} of the run; 1 to 5% is common."


def phase_warnings(config: Config) -> Iterator[str]:
    """Parts of a run that lie behind its end."""
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
        name, exponent = config.schedule.get("name"), "" if power is None else " with batch_exponent 0 or below"
        raise ConfigError(
            f"--ramp follows the critical batch of a Power schedule, and schedule {name}{exponent} has none. Take "
            "schedule=power, or leave --ramp out."
        )
    return power


def followed(config: Config, ranks: int) -> list[tuple[int, int]]:
    """(tokens of the run, sequences) of a batch that grows with the critical batch, in the order of the run.

    Sizes are what all ranks take at once, batch.micro_sequences each, times powers of two. Each begins with the first
    step at which the critical batch has reached it; the smallest size begins the run, whatever the critical batch is.
    None is larger than the run's largest batch, and none begins in the decay, whose rate is read at its start.
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
        while power.critical_batch(seen + begin) < config.beta(size):  # by a rounding
            begin += step
        if seen + begin >= trunk_ends:
            break
        if begin == phases[-1][0]:
            phases.pop()
        phases.append((begin, size))
    return phases


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
    parts = ",".join(f"{{from_tokens:{begin},sequences:{sequences}}}" for begin, sequences in phases[1:])
    console.print(f"  batch.sequences={phases[0][1]} 'batch.ramp=[{parts}]'", soft_wrap=True)
    above = config.trained(math.ceil(power.cap_release(config.beta(phases[0][1]))))
    most = max(sequences for begin, sequences in config.batch_phases() if begin < config.run.tokens)
    said = (
        f"{steps_of(changed)[0]:,} steps instead of {steps_of(config)[0]:,}. Sizes are {unit:,} sequences, "
        "batch.micro_sequences on each rank, times powers of two."
    )
    if 2 * unit > most:
        said += f" Twice that is more than the run's batch, {most:,}: a smaller batch.micro_sequences begins lower."
    elif 2 * phases[-1][1] > most > phases[-1][1]:
        said += f" The run's largest, {most:,}, is none of them."
    elif phases[-1][1] < most:
        said += f" The critical batch does not reach {2 * phases[-1][1]:,} before the decay or the end."
    elif len(phases) == 1:
        said += " The critical batch is larger than the run's from its first step on."
    if above > 0:
        said += f" The first batch, the smallest, is above the critical one until {above:,} tokens."
    console.print(said)


def draw(config: Config, path: Path) -> None:
    """The rate over tokens, and the batch with the critical one of a Power schedule, as a picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import EngFormatter

    figure, (axis, below) = pyplot.subplots(
        2, 1, figsize=(8, 6), sharex=True, height_ratios=(3, 2), layout="constrained"
    )
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


# ------------------------------------------------------------------------------------------------ what would go wrong


def data_problems(config: Config, console: Console) -> tuple[list[str], list[str]]:
    """Errors and warnings about corpora and tokenizer; print how often tokens are seen."""
    from powertrain.data import sources
    from powertrain.data.loader import windows_in
    from powertrain.data.mixture import mixture_of
    from powertrain.data.order import Stage, epochs
    from powertrain.data.prepare import find, rows_needed, skipped_records
    from powertrain.data.tokens import TokenFile

    errors: list[str] = []
    data = config.data
    if config.evaluation.tasks:
        from powertrain.train import tasks

        try:
            tasks.load(config.evaluation.tasks, Path(config.evaluation.data) if config.evaluation.data else None)
        except ConfigError as error:
            errors.append(f"evaluation.tasks: {error}")
    if not data.corpora:
        return errors, [
            "No data is named yet, so nothing was looked at; training wants data=NAME, or corpora described."
        ]
    for corpus in data.corpora.values():
        for path in (corpus.path, *([corpus.validation_path] if corpus.validation_path else [])):
            try:
                if corpus.source == "tokens":
                    TokenFile(expand(str(path)))
                else:
                    sources.files(dataclasses.replace(corpus, path=path, validation_path=None))
            except (DataError, OSError) as error:
                errors.append(str(error))
    if data.tokenizer.path is None and all(corpus.source == "tokens" for corpus in data.corpora.values()):
        errors.append(
            "All corpora are token files, which do not say how they were made: name the tokenizer in "
            "data.tokenizer.path."
        )
    stages = config.stages()
    for _, mixture in stages:
        try:
            mixture_of(mixture)
        except DataError as error:
            errors.append(str(error))
    if errors:
        return errors, []
    try:
        found = find(data.corpora, data.tokenizer, data.cache_dir)
    except DataError as error:
        return [str(error)], []
    vocabulary, whose = data.tokenizer.vocab_size, "The tokenizer to be trained (data.tokenizer.vocab_size)"
    own = Path(expand(data.tokenizer.path)) if data.tokenizer.path is not None else None
    if folder := found.tokenizer_folder or (own if own is not None and own.is_dir() else None):
        from powertrain.data.tokenizer import load_tokenizer

        vocabulary = rows_needed(load_tokenizer(folder))
        whose = f"The tokenizer in {folder}"
    elif data.tokenizer.path is not None:
        vocabulary = 0  # not known: of the hub
    if vocabulary > config.model.vocab_size:
        errors.append(
            f"{whose} has {vocabulary:,} tokens, and model.vocab_size is {config.model.vocab_size:,}: set "
            f"model.vocab_size to {vocabulary:,} or more."
        )
    length = data.sequence_length
    windows = {name: windows_in(file.num_tokens, length) for name, file in found.train.items()}
    errors += [
        f"{name} has {found.train[name].num_tokens:,} tokens, fewer than one window of {length + 1:,}."
        for name, count in windows.items()
        if count < 1
    ]
    # What is not tokenised yet has at most a token a byte, where it is not compressed.
    for name in sorted(set(data.corpora) - set(windows)):
        if data.corpora[name].source in ("stdlib", "text"):
            windows[name] = sum(path.stat().st_size for path in sources.files(data.corpora[name])) // length
    warnings = [
        f"{name} is not prepared yet, so it is not known how often its tokens will be seen; `powertrain prepare` "
        "tokenises it."
        for name in data.corpora
        if name not in windows
    ]
    for name, folder in found.folders.items():
        if (folder / "validation.idx").exists() and (held_out := TokenFile(folder / "validation").num_tokens) <= length:
            warnings.append(
                f"The validation split of {name} has {held_out:,} tokens, fewer than one window of {length + 1:,}: it "
                "will not be evaluated."
            )
    many = [skipped_records(name, folder) for name, folder in found.folders.items()]
    warnings += [sentence for _, sentence, is_warning in many if is_warning]
    if not errors and all(windows.values()):
        seen = []
        rows = tuple(Stage(*stage) for stage in stages)
        for name, times in epochs(rows, windows, -(-config.run.tokens // length)).items():
            size = human(windows[name] * length)
            exactly = name in found.train
            seen.append(
                f"{name} {'' if exactly else 'at least '}{times:.2f} of {'' if exactly else 'at most '}{size} tokens"
            )
            if times > 1:
                has = f"has {size} tokens" if exactly else f"has at most {size} tokens, one a byte"
                warnings.append(f"{name} {has}, and the run sees them {times:.1f} times.")
        if seen:
            console.rule("data", align="left")
            console.print(f"epochs            {'; '.join(seen)}")
    return errors, warnings


def machine_problems(config: Config, cluster: Cluster, count: int) -> tuple[list[str], list[str]]:
    """Errors, which are about this machine where it is the one, and warnings: kernels, disk, checkpoints, nodes."""
    from powertrain.train.model import granite

    errors: list[str] = []
    warnings: list[str] = []
    here = warnings if cluster.on_gpu else errors
    try:
        granite.check_kernels(config, "cuda" if cluster.on_gpu else "cpu")
    except ConfigError as error:
        here.append(f"On this machine: {error}" if cluster.on_gpu else str(error))
    folder = config.run_folder.absolute()
    folder = next(path for path in (folder, *folder.parents) if path.exists())
    free, needed = shutil.disk_usage(folder).free, CHECKPOINT_BYTES * count * (config.checkpoint.keep + 1)
    if free < needed:
        here.append(
            f"{folder} has {_bytes(free)} free, and {config.checkpoint.keep} checkpoints and one under way take "
            f"{_bytes(needed)}. Free some, choose another run.folder, or a smaller checkpoint.keep."
        )
    if config.checkpoint.every == 0:
        warnings.append("checkpoint.every is 0: a run that fails before its end has saved nothing.")
    if cluster.gpus > cluster.gpus_per_node and cluster.gpus % cluster.gpus_per_node:
        errors.append(
            f"cluster.gpus {cluster.gpus} is no multiple of cluster.gpus_per_node {cluster.gpus_per_node}: "
            "launch/slurm/train.sbatch takes whole nodes."
        )
    return errors, warnings


def _table(*headings: str) -> Any:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE, padding=(0, 0, 0, 1), pad_edge=False)
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="right" if number else "left", no_wrap=True)
    return table


def _bytes(size: float) -> str:
    for unit, name in ((1e12, "TB"), (1e9, "GB")):
        if size >= unit:
            return f"{size / unit:,.1f} {name}"
    return f"{size / 1e6:,.1f} MB"


def _time(seconds: float) -> str:
    for unit, name in ((86_400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * unit:
            return f"{seconds / unit:,.1f} {name}"
    return f"{seconds:.1f} s"


if __name__ == "__main__":
    main()
