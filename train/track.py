"""Where a run writes what happens: metrics.jsonl and evals.jsonl always, accelerate's trackers beside them."""

from __future__ import annotations

import contextlib
import json
import math
import os
import queue
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train.config import Config, as_dict, setting_values
from train.environment import replace_text, without_secrets

if TYPE_CHECKING:
    from train.engine import Engine
    from train.state import State


FILES = ("metrics.jsonl", "evals.jsonl")
MOST_SECONDS = 5.0


class Tracker:
    """Appends JSON lines and passes numbers on; on ranks other than the first it does nothing.

    accelerate's trackers get theirs in a thread: one that is slow, hangs or fails costs the run nothing but what the
    trackers would have shown, and MOST_SECONDS at the end.
    """

    def __init__(self, folder: Path, config: Config, engine: Engine, state: State, say: Callable[[str], None]) -> None:
        self.active = engine.is_main
        self.folder = folder
        self.say = say
        self._queue: queue.Queue[Callable[[], None] | None] | None = None
        if self.active:
            for name in FILES:
                _cut_after(folder / name, state.step)
            self._files = {name: open(folder / name, "ab", buffering=0) for name in FILES}  # noqa: SIM115
            self._unwritten: dict[str, bytes] = dict.fromkeys(FILES, b"")
        if self.active and config.tracker.log_with:
            run_id = json.loads((folder / "run.json").read_text(encoding="utf-8"))["id"]
            # A run that goes on is the same run there, too.
            own: dict[str, dict[str, Any]] = {
                "wandb": {
                    "name": config.run.name,
                    "id": run_id,
                    "resume": "allow",
                    "dir": os.environ.get("WANDB_DIR", str(folder)),
                },
                "trackio": {"name": f"{config.run.name}-{run_id}", "resume": "allow"},  # which knows names alone
                "tensorboard": {"purge_step": state.step + 1},
            }
            given = config.tracker.init_kwargs
            init_kwargs = {name: own.get(name, {}) | given.get(name, {}) for name in config.tracker.log_with}
            settings = dict(setting_values(without_secrets(as_dict(config))))  # flat: TensorBoard takes no other
            settings = {k: v if isinstance(v, (int, float, str)) else str(v) for k, v in settings.items()}
            self.accelerator, self._queue = engine.accelerator, queue.Queue()
            self._thread = threading.Thread(target=self._pass_on, args=(self._queue,), daemon=True)
            self._thread.start()
            self._queue.put(lambda: self.accelerator.init_trackers(config.tracker.project, settings, init_kwargs))

    def step(self, metrics: dict[str, Any]) -> None:
        """One optimizer step. A step done again after a resume is written again; the last line counts."""
        self._append("metrics.jsonl", metrics)
        self._log({k: v for k, v in _numbers(metrics).items() if k != "step"}, metrics["step"])

    def evaluation(self, metrics: dict[str, Any]) -> None:
        """One evaluation of one corpus, or of all together."""
        self._append("evals.jsonl", metrics)
        prefix = f"evaluation/{metrics['corpus']}/"
        self._log({prefix + k: v for k, v in _numbers(metrics).items() if k != "step"}, metrics["step"])

    def has_evaluated(self, step: int) -> bool:
        """Whether evals.jsonl has a line of this step. On the first rank."""
        return any(line["step"] == step for line in read_lines(self.folder / "evals.jsonl"))

    def close(self) -> None:
        """Flush files to disk and end the trackers."""
        if self.active:
            for name, file in self._files.items():
                self._write(name)
                os.fsync(file.fileno())
                file.close()
        if waiting := self._queue:  # which the thread may drop at any moment
            waiting.put(self.accelerator.end_training)
            waiting.put(None)
            self._thread.join(MOST_SECONDS)
            if self._thread.is_alive():
                self.say(f"Warning: a tracker did not end in {MOST_SECONDS:g} s and is left behind.")

    def _append(self, name: str, metrics: dict[str, Any]) -> None:
        if self.active:
            # JSON has no NaN.
            finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in metrics.items()}
            complained = bool(self._unwritten[name])
            self._unwritten[name] += json.dumps(finite).encode() + b"\n"
            self._write(name)
            if self._unwritten[name] and not complained:
                self.say(
                    f"Warning: {name} cannot be written, on a full disk for example; its lines are kept for later."
                )

    def _write(self, name: str) -> None:
        with contextlib.suppress(OSError):
            written = self._files[name].write(self._unwritten[name])  # perhaps a part
            self._unwritten[name] = self._unwritten[name][written:]

    def _log(self, numbers: dict[str, float], step: int) -> None:
        if waiting := self._queue:
            waiting.put(lambda: self.accelerator.log(numbers, step=step))

    def _pass_on(self, waiting: queue.Queue[Callable[[], None] | None]) -> None:
        while (call := waiting.get()) is not None:
            try:
                call()
            except (Exception, SystemExit) as error:  # whatever a tracker raises, it must not stop a run
                self.say(f"Warning: tracking has ended: {type(error).__name__}: {without_secrets(str(error))}")
                self._queue = None
                return


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of metrics.jsonl, one a step in order: a step trained again replaces its earlier line.

    A last line cut short by a killed process is left out.
    """
    by_step: dict[Any, dict[str, Any]] = {}
    if path.exists():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                entry = json.loads(line)
                by_step[(entry["step"], entry.get("corpus"))] = entry
            except (ValueError, TypeError, KeyError):
                continue
    return [by_step[key] for key in sorted(by_step, key=lambda key: (key[0], str(key[1])))]


def _numbers(metrics: dict[str, Any], prefix: str = "") -> dict[str, float]:
    flat: dict[str, float] = {}
    for name, value in metrics.items():
        if isinstance(value, dict):
            flat |= _numbers(value, f"{prefix}{name}/")
        elif isinstance(value, (int, float)):
            flat[prefix + name] = value
    return flat


def _cut_after(path: Path, step: int) -> None:
    """Drop what lies after the checkpoint that the run goes on from: those steps are taken again, or never."""
    if path.exists():
        kept = [json.dumps(entry) + "\n" for entry in read_lines(path) if entry["step"] <= step]
        replace_text(path, "".join(kept))
