"""A worker of a sweep: claims a trial, trains it in a process of its own, and writes its result."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import multiprocessing.process
import os
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import powertrain_command
from powertrain.data.files import read_record, replace_text
from powertrain.launch.sweep.ledger import result_of
from powertrain.launch.sweep.progress import Progress, Sweep
from powertrain.launch.sweep.trials import (
    SweepConfig,
    Trial,
    decay_tokens,
    fingerprint,
    in_common,
    overrides,
    quoted,
)
from powertrain.schedulers import WITH_DECAY
from powertrain.train import cli
from powertrain.train.compose import load
from powertrain.train.errors import ConfigError, RunFailed
from powertrain.train.folder import lock
from powertrain.train.hardware import available_cores
from powertrain.train.imports import heavy_imports
from powertrain.train.state import RAW
from powertrain.train.track import read_back, weights_of

POLL_SECONDS = 0.5
BAD_INPUT = 2


def work(given: list[str], options: argparse.Namespace) -> int:
    """Run trials until none is left to run."""
    sweep = Sweep(given)
    check_launcher(sweep.sweep)
    if not sweep.sweep.launcher:
        with heavy_imports():  # once, for the processes that are forked from this one
            import powertrain.train.run  # noqa: F401
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
            time.sleep(POLL_SECONDS)  # other workers have them all; trials that begin from them may become ready
    return 1


def check_launcher(sweep: SweepConfig) -> None:
    """Check that the program that starts trials exists.

    Raises:
        ConfigError: it does not.
    """
    program = shlex.split(sweep.launcher or "")[:1]
    if program and shutil.which(program[0]) is None:
        raise ConfigError(
            f"sweep.launcher begins with '{program[0]}', and there is no such program here, by its path or in PATH. "
            "Leave it out to train each trial in one process."
        )


def orphaned(controller: int) -> bool:
    """Whether the controller was killed: its processes must not keep running unnoticed."""
    return controller != 0 and os.getppid() != controller


@contextlib.contextmanager
def claim(folder: Path) -> Iterator[IO[str] | None]:
    """The trial's lock, or None when another worker has it.

    A lock rather than a folder: the trial's process inherits it, so the claim lasts exactly as long as any process of
    the trial, and a dead worker leaves no stale claim.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with lock(folder / ".claim") or contextlib.nullcontext() as file:
        yield file


def start(
    sweep: Sweep, progress: Progress, trial: Trial, claimed: IO[str], controller: int
) -> multiprocessing.process.BaseProcess:
    """Start the ordinary training command of a trial in a process of its own."""
    arguments = [*sweep.arguments, *overrides(sweep.sweep, trial, sweep.settings), *begin_from(sweep, progress, trial)]
    launcher = shlex.split(sweep.sweep.launcher or "")
    if controller and not launcher and sweep.settings.threads is None:
        # Several trials with a thread a core each would wait for each other: many times slower for a small model.
        arguments.append(f"threads={max(1, available_cores() // sweep.sweep.jobs)}")
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
        if start.exists() and not checkpoint.defects(start):
            return [f"run.resume={quoted(start)}"]
        before = progress.before(before)  # not here, or damaged: from an earlier one the losses are the same
    return []


def run_trial(sweep: Sweep, progress: Progress, trial: Trial, claimed: IO[str], controller: int) -> None:
    """Train, and write result.json, or failed.txt when the trial failed.

    Raises:
        ConfigError: the trial refused its configuration, as the others would.
    """
    folder = sweep.folder / trial.name
    began = time.perf_counter()
    (folder / "exit.json").unlink(missing_ok=True)
    process = start(sweep, progress, trial, claimed, controller)
    try:
        while process.is_alive() and not orphaned(controller):
            process.join(POLL_SECONDS / 5)
    finally:
        if process.is_alive():
            process.terminate()  # it saves a checkpoint and exits
        process.join()
    output = (folder / "output.txt").read_text(encoding="utf-8", errors="replace")
    ended = read_record(folder / "exit.json")
    reason = str(ended.get("reason", output[-2000:]))
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
        sys.exit(1)  # stopped by a signal or by the file `stop`: to be resumed later


def _no_longer_needed(sweep: Sweep, trial: Trial) -> list[Path]:
    """Checkpoints of shorter horizons of the same trunk."""
    earlier = [dataclasses.replace(trial, tokens=tokens) for tokens in sweep.sweep.tokens if tokens < trial.tokens]
    return [sweep.folder / other.name / "checkpoints" for other in earlier]


def result(sweep: Sweep, trial: Trial, reason: str, seconds: float) -> dict[str, Any]:
    """The trial's line of the ledger, from the records of its run.

    Raises:
        RunFailed: its records have been changed.
    """
    from powertrain.train.resume import TOKENIZER

    folder = sweep.folder / trial.name
    lines = (line for line in read_back(folder / "evals.jsonl") if weights_of(line) == RAW)
    evaluated = next((line for line in lines if line.get("corpus") == "overall"), {})
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
