"""Train small models over batch × learning rate × horizon × model, all or a lean choice: the ledger that `fit` takes.

usage: powertrain sweep +sweep=NAME [KEY=VALUE …] [--pilot | --slurm | --dry-run]

examples:
  powertrain sweep +sweep=lean                      # minutes: the most informative trials for their tokens
  powertrain sweep +sweep=tiny                      # minutes: a small grid on Python's own standard library
  powertrain sweep +sweep=tiny --dry-run            # which trials, how many tokens; trains nothing
  powertrain sweep +sweep=tiny --pilot              # the shortest horizon, then predicted hours and error of b
  powertrain sweep +sweep=tiny --slurm              # the same workers as a job array
  powertrain sweep --config-dir mine +sweep=mine    # mine/sweep/mine.yaml

After a stop or a kill the same command resumes: a trial in the ledger is not run again, one that had begun resumes from
its checkpoint. RUN.FOLDER/NAME/ holds the ledger and a folder for each trial, which is an ordinary run
without a model and report. `powertrain report` writes the report, and `powertrain export` the model of the longest
horizon of each trunk, which alone keeps its checkpoints.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live

from powertrain.data.prepare import prepare
from powertrain.launch.parser import verb_parser
from powertrain.launch.sweep.progress import Sweep, write_ledger
from powertrain.launch.sweep.tables import pilot, planned, summary, tables
from powertrain.launch.sweep.trials import fingerprint, in_common
from powertrain.launch.sweep.worker import BAD_INPUT, POLL_SECONDS, check_launcher, claim, work
from powertrain.schedulers import WITH_DECAY
from powertrain.train.check import doubts
from powertrain.train.cli import guard
from powertrain.train.config import Config, as_dict, setting_values
from powertrain.train.errors import ConfigError, RunFailed
from powertrain.train.hardware import available_cores


def main(arguments: list[str] | None = None) -> None:
    """Run the sweep, or be one of its workers."""
    parser = verb_parser("sweep", __doc__)
    parser.add_argument(
        "--pilot", action="store_true", help="train the shortest horizon, then predict hours and the error of b"
    )
    parser.add_argument("--slurm", action="store_true", help="submit sweep.jobs workers with `sbatch --array`")
    parser.add_argument("--dry-run", action="store_true", help="print what would be trained")
    # One of the processes that train: of the controller with this process number, or 0 for one of a job array.
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    sys.exit(guard(lambda: _sweep(*parser.parse_known_args(arguments))))


def _sweep(options: argparse.Namespace, given: list[str]) -> int:
    try:
        return control(given, options) if options.worker is None else work(given, options)
    except KeyboardInterrupt:
        if options.worker is None:
            raise
        return 130  # the controller reports it


def control(given: list[str], options: argparse.Namespace) -> int:
    """Check, prepare the data, start workers, and keep the ledger and a table of it up to date."""
    sweep = Sweep(given)
    if options.pilot and sweep.design is not None:
        raise ConfigError("--pilot trains the shortest horizon of a grid; a lean sweep begins with it anyway.")
    if not options.slurm:  # the machines of its jobs may have other programs
        check_launcher(sweep.sweep)
    configs = sweep.configs()
    console = Console()
    for doubt in dict.fromkeys(doubt for config in configs.values() for doubt in doubts(config)):
        console.print(f"Warning: {doubt}", markup=False)
    if options.dry_run:
        console.print(planned(sweep), summary(sweep, sweep.progress()))
        return 0
    if (sweep.folder / "config.yaml").exists():
        raise ConfigError(f"{sweep.folder} is the folder of a run: choose another sweep.name.")
    with claim(sweep.folder) as claimed:
        if claimed is None:
            raise ConfigError(
                f"Another process is running the sweep in {sweep.folder}. Wait for it, or choose another sweep.name."
            )
        check_ledger(sweep, configs, prepare_data(sweep, configs, console))
        for trial in sweep.trials:
            sweep.failed_file(trial).unlink(missing_ok=True)
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
        stopped = ""
        try:
            killed = watch(sweep, start_workers(sweep, options), console)
            stopped = f" ({killed} workers were killed)" if killed else ""
        except KeyboardInterrupt:
            stopped = " (stopped)"
        progress = write_ledger(sweep)
    console.print(tables(sweep, progress), summary(sweep, progress))
    remaining = [trial for trial in progress.open() if not options.pilot or progress.before(trial) is None]
    if options.pilot and not remaining:
        console.print(pilot(sweep, progress))
    for trial in sweep.trials:
        if trial.name in progress.failed:
            console.print(
                f"\n{trial.name} failed; {sweep.folder / trial.name / 'output.txt'} has its whole output. Its end:"
            )
            console.print(sweep.failed_file(trial).read_text(encoding="utf-8").strip()[-400:], markup=False)
    if remaining:
        raise RunFailed(f"{len(remaining)} trials are left{stopped}; the same command resumes them.")
    return 0


def prepare_data(
    sweep: Sweep, configs: dict[tuple[str, str], Config], console: Console
) -> dict[tuple[str, str], list[str]]:
    """Tokenise the corpora before trials race to do so; by (model, schedule), the fingerprint of their tokens, and that
    of earlier versions, which only sampled large files."""
    fingerprints = {}
    for key, config in configs.items():
        workers = config.data.workers or available_cores()
        prepared = prepare(config.data.corpora, config.data.tokenizer, config.data.cache_dir, workers=workers)
        sampled = {name: file.sampled_fingerprint() for name, file in prepared.train.items()}
        fingerprints[key] = [fingerprint(prepared.fingerprints), fingerprint(sampled)]
        if not prepared.validation:
            raise ConfigError(
                "No corpus has validation documents, so no trial would have a loss: set its validation_fraction."
            )
    there, longest = sum(file.num_tokens for file in prepared.train.values()), max(sweep.sweep.tokens)
    if longest > there:
        console.print(f"The longest horizon is {longest:,} tokens and the corpora hold {there:,}: tokens repeat.")
    return fingerprints


def check_ledger(
    sweep: Sweep, configs: dict[tuple[str, str], Config], fingerprints: dict[tuple[str, str], list[str]]
) -> None:
    """Check that the known trials were trained with this sweep's configuration, on its tokens.

    Raises:
        ConfigError: one was not.
    """
    results = sweep.progress().results
    for trial in sweep.trials:
        if trial.name not in results:
            continue
        key = trial.model, trial.schedule
        expected = {
            **in_common(configs[key]),
            "data_fingerprint": fingerprints[key][results[trial.name].get("data_fingerprint") == fingerprints[key][1]],
            "decay_fraction": sweep.sweep.decay_fraction if trial.schedule in WITH_DECAY else 0.0,
        }
        defaults = _defaults(configs[key])
        for name, now in expected.items():
            was = results[trial.name].get(name)
            if isinstance(was, dict) and isinstance(now, dict):
                was, now = dict(setting_values(was)), dict(setting_values(now))
                # A setting that the ledger's version did not have yet is compared as its default.
                was = {each: was.get(each, defaults.get(each)) for each in sorted({*was, *now})}
                differ = [each for each in was if was[each] != now.get(each)]
                was, now = ({each: side.get(each) for each in differ} for side in (was, now))
            if was != now:
                raise ConfigError(
                    f"{trial.name} was trained with another {name}: {was}, and now {now}. Trials of two configurations "
                    f"make no law: choose another sweep.name. (Known from {sweep.ledger} or the trial's result.json.)"
                )


def _defaults(config: Config) -> dict[str, Any]:
    """Every setting's default by dotted name, with those of the configuration's own schedule."""
    schedule = {
        f"schedule.{each.name}": each.default
        for each in dataclasses.fields(config.make_schedule())
        if each.default is not dataclasses.MISSING
    }
    return {**dict(setting_values(as_dict(Config()))), **schedule}


def start_workers(sweep: Sweep, options: argparse.Namespace) -> list[subprocess.Popen[bytes]]:
    """Processes that train: sweep.jobs of them here, or an array of jobs."""
    arguments = [*sweep.arguments, *(["--pilot"] if options.pilot else [])]
    if options.slurm:
        script = Path(__file__).parents[1] / "slurm" / "sweep.sbatch"
        return [subprocess.Popen(["sbatch", "--wait", f"--array=0-{sweep.sweep.jobs - 1}", str(script), *arguments])]
    worker = [sys.executable, "-P", "-m", "powertrain.launch.sweep", f"--worker={os.getpid()}", *arguments]
    return [subprocess.Popen(worker) for _ in range(sweep.sweep.jobs)]


def watch(sweep: Sweep, workers: list[subprocess.Popen[bytes]], console: Console) -> int:
    """Until the workers have ended: collect what they leave, and show it. Returns how many of them were killed."""
    seen = set(sweep.progress().results)
    terminal = Live(console=console, auto_refresh=False, transient=True) if console.is_terminal else None
    with terminal or contextlib.nullcontext() as live:
        try:
            while any(worker.poll() is None for worker in workers):
                progress = write_ledger(sweep)
                if live is not None:
                    live.update(Group(tables(sweep, progress), summary(sweep, progress)), refresh=True)
                elif new := [trial for trial in sweep.trials if progress.done(trial) and trial.name not in seen]:
                    seen |= {trial.name for trial in new}
                    for trial in new:
                        loss = progress.results[trial.name]["loss"]
                        print(f"{trial.name}: {'diverged' if loss is None else f'{loss:.4f}'}")
                    print(f"  {summary(sweep, progress)}", flush=True)
                time.sleep(POLL_SECONDS)
        finally:
            for worker in workers:
                worker.terminate()
            for worker in workers:
                worker.wait()
    if any(worker.returncode == BAD_INPUT for worker in workers):
        raise ConfigError("A trial was refused, as the others would be; the reason is above.")
    return sum(worker.returncode < 0 for worker in workers)
