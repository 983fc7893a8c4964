"""How long a run takes, what it costs and writes, and the time that failures lose."""

from __future__ import annotations

import math

from rich.console import Console
from rich.filesize import decimal

from powertrain.launch.estimate.cluster import Cluster
from powertrain.train.config import Config
from powertrain.train.console import duration, human

COPYING = 10e9  # bytes a second from a GPU to its machine's memory, while a save pauses training


def steps_of(config: Config) -> tuple[int, int]:
    """Steps of the whole run, and tokens of the run before the last one; a batch grows between steps."""
    tokens = steps = last = 0
    phases = config.batch_phases()
    for (_, sequences), (end, _) in zip(phases, [*phases[1:], (config.run.tokens, 0)], strict=True):
        size = sequences * config.data.sequence_length
        own = max(0, -(-(min(end, config.run.tokens) - tokens) // size))
        steps, tokens, last = steps + own, tokens + own * size, size if own else last
    return steps, tokens - last


def time_section(
    console: Console, config: Config, cluster: Cluster, count: int, flops: float, engine: str | None
) -> None:
    """Print time, cost, checkpoints, and the time that failures lose."""
    from powertrain.train.checkpoint import bytes_a_parameter

    console.rule("time and disk", align="left")
    each = bytes_a_parameter(config.average.window is not None)
    size = each * count
    steps, _ = steps_of(config)
    every = config.checkpoint.every or steps
    saves = -(-steps // every)
    keep = config.checkpoint.keep
    most = min(keep + 1, saves)  # one of them is being written
    kept = f"of which checkpoint.keep={keep} stay" if keep < saves else "which all stay"
    console.print(
        f"checkpoints       {decimal(size)} each ({each} bytes a parameter), {saves:,} of them, every "
        f"{every:,} steps: {decimal(size * saves)} written\n"
        f"on disk           {decimal(size * most)}: at most {most:,}, {kept}\n"
        f"writing one       {size / cluster.write:,.0f} s at {cluster.write / 1e9:g} GB/s (cluster.write)"
    )
    if cluster.peak is None:
        console.print("time              not known: give cluster.peak, as `powertrain bench` measures it")
        return
    seconds = flops * config.run.tokens / (cluster.gpus * cluster.peak * cluster.mfu)
    a_step = seconds / steps
    sharded = engine is not None and engine.startswith("zero")
    pause = size / (cluster.gpus if sharded else 1) / COPYING
    between = 3600 * cluster.failure_hours / cluster.gpus
    # Young 1974, Daly 2006: the interval at which what saves cost is what failures cost.
    best = max(math.sqrt(2 * pause * between), size / cluster.write)
    console.print(
        f"training          {duration(seconds)}, {a_step:.2f} s a step, {human(config.run.tokens / seconds)} tokens/s: "
        f"{cluster.gpus} × {cluster.peak / 1e12:,.0f} TFLOP/s at an MFU of {cluster.mfu:g}, which is assumed "
        "(cluster.mfu)"
    )
    good = goodput(every * a_step, pause, between, cluster.restart_minutes * 60)
    console.print(
        f"failures          one in {duration(between)}, {seconds / between:.1f} in the run (one of {cluster.gpus} GPUs "
        f"fails every {cluster.failure_hours:,.0f} h)\n"
        f"saving            every {duration(every * a_step)} as configured, each pausing training for "
        f"{pause:.2f} s; best every {duration(best)}, checkpoint.every={max(1, round(best / a_step)):,}\n"
        f"goodput           {good:.2%}: what is left when saves, lost steps and restarts of "
        f"{cluster.restart_minutes:g} min are taken off; {duration(seconds / good)} in all"
    )
    if cluster.price is not None:
        hours = cluster.gpus * seconds / good / 3600
        console.print(f"cost              {hours * cluster.price:,.0f}: {hours:,.0f} GPU hours at {cluster.price:g}")


def goodput(interval: float, pause: float, between: float, restart: float) -> float:
    """Share of the time that trains steps which are kept: a save costs `pause` seconds in each interval, and a failure,
    every `between` seconds, half an interval and a restart."""
    return 1 / ((1 + pause / interval) * (1 + (interval / 2 + restart) / between))
