"""Predict memory, time, cost, disk, learning rates and problems of a run before it starts.

usage: powertrain estimate [+experiment=NAME] [KEY=VALUE …] [cluster.KEY=VALUE …] [--plot FILE] [--ramp]

Nothing is trained or prepared. Memory is counted by running the step's own code on tensors without contents.

  cluster.gpu=H100            H100 | H200 | A100 | L40S | B200 | cpu (this machine); or give the next two
  cluster.memory=80e9         bytes of a GPU             cluster.peak=989e12   its dense bf16 FLOP/s
  cluster.gpus=1              in all                     cluster.gpus_per_node=8
  cluster.mfu=0.4             share of the peak that a run is assumed to reach
  cluster.price=2.5           of a GPU and hour; without it there is no line about cost
  cluster.write=1e9           bytes a second to run.folder, all ranks together
  cluster.failure_hours=50677 of one GPU, between failures      cluster.restart_minutes=15  lost beside steps

Exit status: 0 it would run, 1 something would go wrong, 2 bad usage.

examples:
  powertrain estimate +experiment=quickstart cluster.gpu=cpu
  powertrain estimate +experiment=powermoe_3b cluster.gpus=64 cluster.price=2.5 --plot rates.png
"""

from __future__ import annotations

import sys
from pathlib import Path

from rich.console import Console
from rich.filesize import decimal

from powertrain.launch.check import described
from powertrain.launch.estimate.cluster import Cluster, cluster_of
from powertrain.launch.estimate.learning_rate import (
    check_followed,
    draw,
    phase_warnings,
    ramp_section,
    schedule_section,
    schedule_warnings,
)
from powertrain.launch.estimate.problems import data_problems, machine_problems
from powertrain.launch.estimate.time import steps_of, time_section
from powertrain.launch.parser import verb_parser
from powertrain.train.check import batch_doubts, batch_problems, doubts, problems
from powertrain.train.cli import guard
from powertrain.train.compose import composed
from powertrain.train.config import Config
from powertrain.train.console import human
from powertrain.train.errors import ConfigError
from powertrain.train.imports import heavy_imports


def main(arguments: list[str] | None = None) -> None:
    """Print the estimate."""
    parser = verb_parser("estimate", __doc__)
    parser.add_argument(
        "--plot", type=Path, metavar="FILE", help="plot learning rate, batch and critical batch over tokens"
    )
    parser.add_argument(
        "--ramp",
        action="store_true",
        help="the settings of a batch that grows with a Power schedule's critical batch, to paste",
    )
    options, overrides = parser.parse_known_args(arguments)
    sys.exit(guard(lambda: _estimate(overrides, options.plot, options.ramp)))


def _estimate(overrides: list[str], plot: Path | None, ramp: bool) -> int:
    if plot is not None and (plot.suffix not in (".png", ".svg", ".pdf") or not plot.absolute().parent.is_dir()):
        raise ConfigError(f"--plot is {plot}; it takes a .png, .svg or .pdf in a folder that exists.")
    cluster = cluster_of([each.removeprefix("cluster.") for each in overrides if each.startswith("cluster.")])
    config = composed(described([each for each in overrides if not each.startswith("cluster.")]), checked=False)
    errors, warnings = list(problems(config)), list[str]()
    sound = not errors
    if ramp and sound:
        check_followed(config)

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


def _sections(console: Console, config: Config, cluster: Cluster) -> tuple[list[str], list[str]]:
    """Print all sections, and return errors and warnings."""
    with heavy_imports():
        from powertrain.launch.estimate.memory import USABLE, memory_section
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
                f"{decimal(int(cluster.memory or 0))} with none of {', '.join(cluster.engines(config))}. Take a "
                "smaller one, engine.activation_checkpointing=true, more GPUs or larger ones."
            )
    time_section(console, config, cluster, counts["total"], flops, engine)
    schedule_section(console, config)
    data_errors, data_warnings = data_problems(config, console)
    console.rule(align="left")
    more_errors, more_warnings = machine_problems(config, cluster, counts["total"])
    if mismatches := mup.parametrisation_mismatches(config):
        warnings.append(f"The schedule's law belongs to another parametrisation: {'; '.join(mismatches)}.")
    return [*errors, *data_errors, *more_errors], [*warnings, *data_warnings, *more_warnings]
