"""Train small models over batch × rate × horizon × model, all or a lean choice: a ledger that `fit` makes a law.

usage: powertrain sweep +sweep=NAME [KEY=VALUE …] [--pilot | --slurm | --dry-run]

examples:
  powertrain sweep +sweep=lean                      # minutes: the trials that tell most for their tokens
  powertrain sweep +sweep=tiny                      # minutes: a small grid on Python's own standard library
  powertrain sweep +sweep=tiny --dry-run            # which trials, how many tokens; trains nothing
  powertrain sweep +sweep=tiny --pilot              # the shortest horizon, then hours and the error of b
  powertrain sweep +sweep=tiny --slurm              # the same workers as a job array
  powertrain sweep --config-dir mine +sweep=mine    # mine/sweep/mine.yaml

Stopped or killed, the same command goes on: a trial that is in the ledger is not run again, one that had begun goes on
from its checkpoint. RUN.FOLDER/NAME/ holds the ledger and a folder for each trial, which is an ordinary run.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import multiprocessing.process
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table

import powertrain_command
from powertrain.data import expand
from powertrain.data.files import read_record, replace_text
from powertrain.data.prepare import prepare
from powertrain.launch.trials import (
    Progress,
    SweepConfig,
    Trial,
    check_batches,
    check_trials,
    decay_tokens,
    fingerprint,
    in_common,
    lean_design,
    ledger_lines,
    overrides,
    place_of,
    plan,
    quoted,
    read_ledger,
    result_of,
    sweep_config,
)
from powertrain.schedulers import WITH_DECAY
from powertrain.schedulers.cells import MOST
from powertrain.schedulers.law import expected_error
from powertrain.train import cli, streams
from powertrain.train.check import doubts
from powertrain.train.cli import guard
from powertrain.train.compose import composed, composed_sweep, load
from powertrain.train.config import Config, setting_values
from powertrain.train.errors import ConfigError, RunFailed
from powertrain.train.folder import lock
from powertrain.train.hardware import available_cores
from powertrain.train.track import read_back

POLL_SECONDS = 0.5
BAD_INPUT = 2
MOST_COLUMNS = 8  # of losses side by side; of more there is the best


def main(arguments: list[str] | None = None) -> None:
    """Run the sweep, or be one of its workers."""
    streams.protect()
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(
        prog="powertrain sweep",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage=argparse.SUPPRESS,
    )
    parser.add_argument(
        "--pilot", action="store_true", help="train the shortest horizon, then predict hours and the error of b"
    )
    parser.add_argument("--slurm", action="store_true", help="let `sbatch --array` run sweep.jobs workers")
    parser.add_argument("--dry-run", action="store_true", help="say what would be trained")
    # One of the processes that train: of the controller with this process number, or 0 for one of a job array.
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--config-dir", help="look for configs there too")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    options = parser.parse_intermixed_args(arguments)
    if options.config_dir:
        options.overrides = [f"--config-dir={options.config_dir}", *options.overrides]
    if options.worker is not None:
        with contextlib.suppress(KeyboardInterrupt):  # the controller says what there is to say
            sys.exit(guard(lambda: work(options)))
        sys.exit(130)
    sys.exit(guard(lambda: control(options)))


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
        results, failed = read_ledger(self.ledger), set()
        for trial in self.trials:
            if trial.name in results:
                continue
            # One that a power cut left unreadable is no result: the trial is asked again, and has it at once.
            if line := result_of(read_record(self.folder / trial.name / "result.json")):
                results[trial.name] = line
            elif self.failed_file(trial).exists():
                failed.add(trial.name)
        return Progress(self.trials, results, failed, self.design)

    def failed_file(self, trial: Trial) -> Path:
        """Exists when the trial broke in this start of the sweep, and says how."""
        return self.folder / trial.name / "failed.txt"


# ------------------------------------------------------------------------------------------------------ the controller


def control(options: argparse.Namespace) -> int:
    """Check, prepare the data, start workers, and keep the ledger and a table of it up to date."""
    sweep = Sweep(options.overrides)
    if options.pilot and sweep.design is not None:
        raise ConfigError("--pilot trains the shortest horizon of a grid; a lean sweep begins there by itself.")
    if not options.slurm:  # the machines of its jobs may have another
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
    asked = [trial for trial in progress.open() if not options.pilot or progress.before(trial) is None]
    if options.pilot and not asked:
        console.print(pilot(sweep, progress))
    for trial in sweep.trials:
        if trial.name in progress.failed:
            console.print(
                f"\n{trial.name} failed; {sweep.folder / trial.name / 'output.txt'} has all that it said. Its end:"
            )
            console.print(sweep.failed_file(trial).read_text(encoding="utf-8").strip()[-400:], markup=False)
    if asked:
        raise RunFailed(f"{len(asked)} trials are left{stopped}; the same command goes on with them.")
    return 0


def check_launcher(sweep: SweepConfig) -> None:
    """Raises ConfigError when there is no such program as the trials are to be started with."""
    program = shlex.split(sweep.launcher or "")[:1]
    if program and shutil.which(program[0]) is None:
        raise ConfigError(
            f"sweep.launcher begins with '{program[0]}', and there is no such program here, by its path or in PATH. "
            "Leave it out to train each trial in one process."
        )


def prepare_data(
    sweep: Sweep, configs: dict[tuple[str, str], Config], console: Console
) -> dict[tuple[str, str], list[str]]:
    """Tokenise the corpora before trials race to do so; the fingerprint of their tokens, by (model, schedule), and
    what it would have been when large files were only sampled."""
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
    """Raises ConfigError when what is known of a trial is not of this sweep's configuration, or of other tokens."""
    results = sweep.progress().results
    for trial in sweep.trials:
        if trial.name not in results:
            continue
        key = trial.model, trial.schedule
        asked = {
            **in_common(configs[key]),
            "data_fingerprint": fingerprints[key][results[trial.name].get("data_fingerprint") == fingerprints[key][1]],
            "decay_fraction": sweep.sweep.decay_fraction if trial.schedule in WITH_DECAY else 0.0,
        }
        for name, now in asked.items():
            was = results[trial.name].get(name)
            if isinstance(was, dict) and isinstance(now, dict):
                flat = [dict(setting_values(side)) for side in (was, now)]
                was, now = ({k: v for k, v in side.items() if flat[0].get(k) != flat[1].get(k)} for side in flat)
            if was != now:
                raise ConfigError(
                    f"{trial.name} was trained with another {name}: {was}, and now {now}. Trials of two configurations "
                    f"make no law: choose another sweep.name. (Known from {sweep.ledger} or the trial's result.json.)"
                )


def start_workers(sweep: Sweep, options: argparse.Namespace) -> list[subprocess.Popen[bytes]]:
    """Processes that train: sweep.jobs of them here, or an array of jobs."""
    arguments = [*sweep.arguments, *(["--pilot"] if options.pilot else [])]
    if options.slurm:
        script = Path(__file__).parent / "slurm" / "sweep.sbatch"
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
        raise ConfigError("A trial was refused, as the others would be; what is wrong stands above.")
    return sum(worker.returncode < 0 for worker in workers)


def write_ledger(sweep: Sweep) -> Progress:
    """Put what is known now into the ledger, in the order of the plan; what others have written stays as it is."""
    progress = sweep.progress()
    own = [trial.name for trial in sweep.trials if progress.done(trial)]
    lines = [
        text for text, line in ledger_lines(sweep.ledger) if not isinstance(line, dict) or line.get("trial") not in own
    ]
    lines += [json.dumps(progress.results[trial.name]).encode() for trial in sweep.trials if progress.done(trial)]
    text = b"".join(line + b"\n" for line in lines)
    if not sweep.ledger.exists() or sweep.ledger.read_bytes() != text:
        sweep.ledger.parent.mkdir(parents=True, exist_ok=True)
        replace_text(sweep.ledger, text)
    return progress


def planned(sweep: Sweep) -> Group:
    """Steps of every batch at every horizon, and how many trials and tokens that is at most."""
    progress, horizons = Progress(sweep.trials, {}), sorted(sweep.sweep.tokens)
    grid = Table("batch", *(f"{tokens:,} tokens" for tokens in horizons), title="steps")
    for batch in sorted(sweep.sweep.batch):
        trained = {t.tokens: f"{t.steps:,}" for t in sweep.trials if t.batch == batch}
        grid.add_row(f"{batch:g}", *(trained.get(tokens, "–") for tokens in horizons))
    limits = f"sweep.min_steps {sweep.sweep.min_steps}, sweep.max_steps {sweep.sweep.max_steps or 'none'}"
    tokens = sum(progress.trained_tokens(sweep.sweep, trial) for trial in sweep.trials)
    if sweep.design is not None:
        budget = (
            f"{sweep.sweep.budget_tokens:,} tokens" if sweep.sweep.budget_tokens else "what it finds worth its tokens"
        )
        return Group(
            grid,
            f"–: not trained ({limits}). A lean sweep trains some of these {len(sweep.trials)} trials of "
            f"{', '.join(sweep.sweep.models)}, up to {budget}; all of them would take {tokens:,} tokens.",
        )
    return Group(
        grid,
        f"–: not trained ({limits}). {len(sweep.trials)} trials of {', '.join(sweep.sweep.models)}, at most {tokens:,} "
        f"tokens; separate runs would take {sum(trial.tokens for trial in sweep.trials):,}.",
    )


def tables(sweep: Sweep, progress: Progress) -> Group:
    """Losses at the longest horizon that each row has reached: rows model × batch, columns the schedule's values."""
    grids = []
    for schedule in sweep.sweep.schedules:
        own = [t for t in sweep.trials if t.schedule == schedule and t.seed == sweep.sweep.seeds[0]]
        columns = sorted({trial.fields for trial in own})
        wide = len(columns) > MOST_COLUMNS
        names = ["best loss", "at"] if wide else ["\n".join(f"{n} {v:g}" for n, v in fields) for fields in columns]
        grid = Table("batch", "tokens", *names)
        for model in sweep.sweep.models:
            grid.add_section()
            grid.add_row(f"[italic]{model}[/]")
            for batch in sorted(sweep.sweep.batch):
                row = [t for t in own if (t.model, t.batch) == (model, batch)]
                if reached := [t.tokens for t in row if progress.done(t)] or [t.tokens for t in row][:1]:
                    here = {t.fields: t for t in row if t.tokens == max(reached)}
                    cells = _best_cell(progress, here) if wide else _cells(progress, here, columns)
                    grid.add_row(f"{batch:g}", f"{max(reached):,}", *cells)
        grid.title = schedule
        grids.append(grid)
    return Group(*grids)


def _best_cell(progress: Progress, here: dict[Any, Trial]) -> list[str]:
    losses = {fields: progress.results[t.name]["loss"] or math.inf for fields, t in here.items() if progress.done(t)}
    best = min(losses, key=lambda fields: losses[fields], default=())
    return [f"{losses[best]:.4f}", ", ".join(f"{n} {v:g}" for n, v in best)] if losses else ["…", ""]


def _cells(progress: Progress, here: dict[Any, Trial], columns: list[Any]) -> list[str]:
    losses = {fields: progress.results[t.name]["loss"] for fields, t in here.items() if progress.done(t)}
    best = min((loss for loss in losses.values() if loss is not None), default=None)
    cells = []
    for fields in columns:
        if fields in losses:
            loss = losses[fields]
            text = "diverged" if loss is None else f"{loss:.4f}"
            cells.append(f"[bold green]{text}[/]" if loss is not None and loss == best else text)
        else:
            left_out = progress.left_out(here[fields]) if fields in here else ""
            cells.append("" if left_out == "not asked" else "…" if left_out is None else left_out)
    return cells


def summary(sweep: Sweep, progress: Progress) -> str:
    """How much is done, what the shared trunks saved, and how long the rest may take."""
    done = [t for t in sweep.trials if progress.done(t)]
    if sweep.design is not None:
        budget = f" of {sweep.sweep.budget_tokens:,}" if sweep.sweep.budget_tokens else ""
        others = sum(place_of(trial) not in sweep.design.asked for trial in done)
        known = f" ({others} more that these settings do not ask for are not counted)" if others else ""
        return (
            f"{len(done) - others} trials done, {sweep.design.trained:,.0f}{budget} tokens trained{known}. "
            f"{sweep.design.step.reason}"
        )
    out = [t for t in sweep.trials if progress.left_out(t) and not progress.done(t)]
    trained, apart = sum(progress.trained_tokens(sweep.sweep, t) for t in done), sum(t.tokens for t in done)
    saved = f", {trained:,} tokens trained where separate runs take {apart:,}" if trained < apart else ""
    pruned = f", {len(out)} not worth a longer horizon" if out else ""
    seconds = seconds_left(sweep, progress)
    left = (
        f", about {f'{seconds / 3600:.1f} h' if seconds > 5400 else f'{seconds / 60:.0f} min'} left" if seconds else ""
    )
    return f"{len(done)} of {len(sweep.trials)} trials done{pruned}{saved}{left}"


def pilot(sweep: Sweep, progress: Progress) -> str:
    """How well the whole sweep will know b, from its shortest horizon."""
    lines = [progress.results[trial.name] for trial in sweep.trials if progress.done(trial)]
    planned = {(t.model, t.tokens, t.batch) for t in sweep.trials if t.schedule == "wsd"}
    try:
        noise, error, error_of_b = expected_error(lines, [(tokens, batch) for _, tokens, batch in planned])
    except ValueError as reason:
        return f"The error of b cannot be told yet: {reason}"
    return (
        f"Noise of a loss {noise:.4f} nats, of a log best rate {error:.2f}: the {len(planned)} best rates of the whole "
        f"sweep will give b with a standard error of about {error_of_b:.3f}, or more where the law is not exact."
    )


def seconds_left(sweep: Sweep, progress: Progress) -> float | None:
    """A guess from what is done: a start's cost, and the speed at the same model and batch, or near it."""
    known = {t: progress.results[t.name].get("seconds") for t in sweep.trials if progress.done(t)}
    done = [(t, float(s)) for t, s in known.items() if isinstance(s, (int, float)) and 0 < s < MOST]
    if not done:
        return None
    start = min(seconds for _, seconds in done)

    def speed(model: str, batch: float) -> float:
        near = min(
            {t.batch for t, _ in done if t.model == model} or {t.batch for t, _ in done},
            key=lambda b: abs(math.log(b / batch)),
        )
        alike = [
            (t, s) for t, s in done if t.batch == near and (t.model == model or all(o.model != model for o, _ in done))
        ]
        trained = sum(progress.trained_tokens(sweep.sweep, t) for t, _ in alike)
        return trained / max(sum(s for _, s in alike) - len(alike) * start, 0.1 * sum(s for _, s in alike))

    rest = sum(start + progress.trained_tokens(sweep.sweep, t) / speed(t.model, t.batch) for t in progress.open())
    return rest / sweep.sweep.jobs


# ---------------------------------------------------------------------------------------------------------- a worker


def work(options: argparse.Namespace) -> int:
    """Run trials until none is left that could be run."""
    sweep = Sweep(options.overrides)
    check_launcher(sweep.sweep)
    if not sweep.sweep.launcher:
        import powertrain.train.run  # noqa: F401  # once, for the processes that are forked from this one
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    while not orphaned(options.worker):
        progress = sweep.progress()
        ready = [trial for trial in progress.ready() if not options.pilot or progress.before(trial) is None]
        for trial in ready:
            with claim(sweep.folder / trial.name) as claimed:
                if claimed is not None and trial in sweep.progress().ready():
                    run_trial(sweep, progress, trial, claimed, options.worker)
                    break
        else:
            if not ready:
                return 0
            time.sleep(POLL_SECONDS)  # others have them all, and what stands on them may become ready
    return 1


def orphaned(controller: int) -> bool:
    """Whether the controller was killed: what it started must not run on unseen."""
    return controller != 0 and os.getppid() != controller


@contextlib.contextmanager
def claim(folder: Path) -> Iterator[IO[str] | None]:
    """The trial's lock, or None when another worker has it.

    A lock, and not a folder that is made: the trial's process inherits it, so the claim lasts exactly as long as
    anything of the trial lives, and nobody has to judge whether a dead worker's claim has become stale.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with lock(folder / ".claim") or contextlib.nullcontext() as file:
        yield file


def start(sweep: Sweep, progress: Progress, trial: Trial, claimed: IO[str]) -> multiprocessing.process.BaseProcess:
    """The ordinary training command of a trial, in a process of its own."""
    arguments = [*sweep.arguments, *overrides(sweep.sweep, trial, sweep.settings), *begin_from(sweep, progress, trial)]
    launcher = shlex.split(sweep.sweep.launcher or "")
    process = multiprocessing.get_context("fork").Process(
        target=_train, args=(launcher, arguments, sweep.folder / trial.name / "output.txt", claimed)
    )
    process.start()
    return process


def _train(launcher: list[str], arguments: list[str], output: Path, claimed: IO[str]) -> None:
    with open(output, "w", encoding="utf-8") as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    if launcher:
        os.set_inheritable(claimed.fileno(), True)
        try:
            os.execvp(launcher[0], [*launcher, powertrain_command.__file__, "train", *arguments])
        except OSError as error:
            print(f"powertrain: sweep.launcher '{launcher[0]}' cannot be started: {error.strerror}.", flush=True)
            os._exit(BAD_INPUT)
    # What `powertrain train` does, without importing everything again: half the time of a short trial.
    sys.argv[0] = "train"
    cli.main(arguments)


def begin_from(sweep: Sweep, progress: Progress, trial: Trial) -> list[str]:
    """The override that lets a trial begin where the decay of the one before it began."""
    from powertrain.train import checkpoint

    before = progress.before(trial)
    own = sweep.folder / trial.name / "checkpoints"
    while before is not None and trial.schedule in WITH_DECAY and not any(own.glob("step-*")):
        step = round((before.tokens - decay_tokens(sweep.sweep, before)) * before.steps / before.tokens)
        start = sweep.folder / before.name / "checkpoints" / f"step-{step:08d}"
        if start.exists() and not checkpoint.faults(start):
            return [f"run.resume={quoted(start)}"]
        before = progress.before(before)  # trained elsewhere, or damaged: from further back the losses are the same
    return []


def run_trial(sweep: Sweep, progress: Progress, trial: Trial, claimed: IO[str], controller: int) -> None:
    """Train, and leave result.json, or failed.txt when the trial broke.

    Raises:
        ConfigError: the trial refused its configuration, as the others would.
    """
    folder = sweep.folder / trial.name
    began = time.perf_counter()
    (folder / "exit.json").unlink(missing_ok=True)
    process = start(sweep, progress, trial, claimed)
    try:
        while process.is_alive() and not orphaned(controller):
            process.join(POLL_SECONDS / 5)
    finally:
        if process.is_alive():
            process.terminate()  # it saves a checkpoint and goes
        process.join()
    said = (folder / "output.txt").read_text(encoding="utf-8", errors="replace")
    ended = read_record(folder / "exit.json")
    reason = str(ended.get("reason", said[-2000:]))
    if process.exitcode != 0 and ended.get("code", process.exitcode) == BAD_INPUT:
        raise ConfigError(f"The trial {trial.name} was refused. {reason}")
    if reason == "finished" or reason.startswith("Diverged"):
        try:
            line = result(sweep, trial, reason, time.perf_counter() - began)
        except RunFailed as error:
            replace_text(folder / "failed.txt", f"{error}\n")
            return
        replace_text(folder / "result.json", json.dumps(line) + "\n")
        for older in _no_longer_needed(sweep, trial):
            shutil.rmtree(older, ignore_errors=True)
    elif process.exitcode != 0:
        replace_text(folder / "failed.txt", f"{reason}\n")
    else:
        sys.exit(1)  # stopped by a signal or by the file `stop`: it is to go on later


def _no_longer_needed(sweep: Sweep, trial: Trial) -> list[Path]:
    """Checkpoints of shorter horizons of the same trunk."""
    earlier = [dataclasses.replace(trial, tokens=tokens) for tokens in sweep.sweep.tokens if tokens < trial.tokens]
    return [sweep.folder / other.name / "checkpoints" for other in earlier]


def result(sweep: Sweep, trial: Trial, reason: str, seconds: float) -> dict[str, Any]:
    """The trial's line of the ledger, from what its run has left.

    Raises:
        RunFailed: its records have been changed.
    """
    from powertrain.train.resume import TOKENIZER

    folder = sweep.folder / trial.name
    evaluated = next((line for line in read_back(folder / "evals.jsonl") if line.get("corpus") == "overall"), {})
    loss = evaluated.get("loss") if reason == "finished" else None
    newest = max((folder / "checkpoints").glob("step-*/state.json"), default=None)
    corpora = read_record(newest).get("data_fingerprint") if newest else {}
    if (
        (reason == "finished" and "loss" not in evaluated)
        or not isinstance(corpora, dict)
        or not result_of({"trial": trial.name, "loss": loss})
    ):
        raise RunFailed(
            f"{folder} has no loss of all corpora in evals.jsonl, or no fingerprints in its checkpoint's state.json: "
            "they have been changed. Move that folder away to train the trial again."
        )
    parameters = read_record(folder / "run.json").get("parameters")
    return {
        "trial": trial.name,
        "model_name": trial.model,
        **in_common(load(folder / "config.yaml")),
        "parameters": parameters.get("total") if isinstance(parameters, dict) else None,
        "schedule": trial.schedule,
        "batch": trial.batch,
        **dict(trial.fields),
        "tokens": trial.tokens,
        "loss": loss,
        "status": "diverged" if loss is None else "finished",
        "seed": trial.seed,
        "decay_fraction": sweep.sweep.decay_fraction if decay_tokens(sweep.sweep, trial) else 0.0,
        "data_fingerprint": fingerprint({name: str(value) for name, value in corpora.items() if name != TOKENIZER}),
        "seconds": round(seconds, 1),
    }


if __name__ == "__main__":
    main()
