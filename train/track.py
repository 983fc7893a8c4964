"""Where a run writes what happens: metrics.jsonl and evals.jsonl always, accelerate's trackers beside them."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from powertrain.data.files import read_record
from powertrain.train.config import Config, as_dict, setting_values
from powertrain.train.folder import add_to_start
from powertrain.train.redact import without_secrets
from powertrain.train.state import RAW

if TYPE_CHECKING:
    from powertrain.train.engine import Engine
    from powertrain.train.state import State


FILES = ("metrics.jsonl", "evals.jsonl")
CLOSE_SECONDS = 5.0  # that all trackers together may take to end
MAX_QUEUED = 10_000  # lines for a tracker that does not take them, some 20 MB
PLACES, PLACE_BYTES = 1000, 4096  # what a report reads of a large file: a run of a million steps has some 700 MB
BLOCK = 1 << 16
LONGEST_LINE = 1 << 17


class Tracker:
    """Appends JSON lines and passes numbers on; on ranks other than the first it does nothing.

    Each of accelerate's trackers gets its numbers in a thread of its own: one that is slow, hangs or fails costs the
    run and the other trackers nothing, and CLOSE_SECONDS at the end. That it ended is logged, and recorded in run.json.
    """

    def __init__(self, folder: Path, config: Config, engine: Engine, state: State, log: Callable[[str], None]) -> None:
        self.active = engine.is_main
        self.folder = folder
        self.log = log
        self._trackers: list[_TrackerThread] = []
        self._recording = threading.Lock()
        if self.active:
            for name in FILES:
                if not state.step:  # a run that begins again, perhaps with other settings
                    (folder / name).unlink(missing_ok=True)
                elif unreadable := cut_after(folder / name, state.step):
                    log(f"{unreadable} line(s) after step {state.step:,} in {name} could not be read and are dropped.")
            self._files = {name: open(folder / name, "ab", buffering=0) for name in FILES}  # noqa: SIM115
            self._unwritten: dict[str, bytes] = dict.fromkeys(FILES, b"")
        if self.active and config.tracker.log_with:
            from accelerate.tracking import LOGGER_TYPE_TO_CLASS

            run_id = read_record(folder / "run.json").get("id")
            # A run that resumes is the same run in its trackers.
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
            settings = dict(setting_values(without_secrets(as_dict(config))))  # flat: TensorBoard takes no other
            settings = {k: v if isinstance(v, (int, float, str)) else str(v) for k, v in settings.items()}
            for name in dict.fromkeys(config.tracker.log_with):
                kind: Any = LOGGER_TYPE_TO_CLASS[name]
                place = [engine.accelerator.logging_dir] if kind.requires_logging_directory else []
                keywords = own.get(name, {}) | config.tracker.init_kwargs.get(name, {})

                def begin(kind: Any = kind, place: list[Any] = place, keywords: dict[str, Any] = keywords) -> Any:
                    tracker = kind(config.tracker.project, *place, **keywords)
                    tracker.start()
                    tracker.store_init_configuration(settings)
                    return tracker

                self._trackers.append(_TrackerThread(name, begin, self._has_ended))

    def step(self, metrics: dict[str, Any]) -> None:
        """One optimizer step. A step taken again after a resume is written again; the last line counts."""
        self._append("metrics.jsonl", metrics)
        self._pass_on("", metrics)

    def evaluation(self, metrics: dict[str, Any]) -> None:
        """One evaluation of one corpus, or of all together."""
        self._append("evals.jsonl", metrics)
        prefix = f"evaluation{'' if weights_of(metrics) == RAW else '_average'}/{metrics['corpus']}/"
        self._pass_on(prefix, metrics)

    def evaluations(self, step: int) -> list[dict[str, Any]]:
        """The lines of this step in evals.jsonl, those of the average last, and of both `overall` last; none if one was
        edited. On the first rank."""
        newest = itertools.takewhile(lambda line: line["step"] == step, read_back(self.folder / "evals.jsonl"))
        each = {
            (weights_of(line), line.get("corpus", "")): line for line in [*newest][::-1]
        }  # evaluated again: the last
        lines = sorted(each.values(), key=lambda line: (weights_of(line) != RAW, line.get("corpus") == "overall"))
        ends = {weights_of(line): line["corpus"] for line in lines if is_of_corpus(line)}
        whole = all(is_of_corpus(line) or is_of_task(line) for line in lines)
        return lines if whole and {*ends.values()} <= {"overall"} else []

    def close(self) -> None:
        """Flush files to disk and end the trackers."""
        if self.active:
            for name, file in self._files.items():
                self._write(name)
                try:
                    os.fsync(file.fileno())
                    file.close()
                except OSError as error:  # the model is still to come
                    self.log(f"Warning: {name} may be incomplete on the disk: {error.strerror}.")
        for tracker in self._trackers:
            tracker.put(None)
        until = time.monotonic() + CLOSE_SECONDS
        for tracker in self._trackers:
            tracker.join(max(0.0, until - time.monotonic()))
            if tracker.is_alive():
                tracker.leave(f"it did not end in {CLOSE_SECONDS:g} s and is left behind")

    def _append(self, name: str, metrics: dict[str, Any]) -> None:
        if self.active:
            # JSON has no NaN.
            finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in metrics.items()}
            warned = bool(self._unwritten[name])
            self._unwritten[name] += json.dumps(finite).encode() + b"\n"
            self._write(name)
            if self._unwritten[name] and not warned:
                self.log(
                    f"Warning: {name} cannot be written, on a full disk for example; its lines are kept in memory."
                )

    def _write(self, name: str) -> None:
        with contextlib.suppress(OSError):
            if not os.fstat(self._files[name].fileno()).st_nlink:  # else later lines would be lost
                self.log(f"Warning: {name} has been removed while the run trains; it begins anew here.")
                self._files[name] = open(self.folder / name, "ab", buffering=0)  # noqa: SIM115
            written = self._files[name].write(self._unwritten[name])  # perhaps a part of them
            self._unwritten[name] = self._unwritten[name][written:]

    def _pass_on(self, prefix: str, metrics: dict[str, Any]) -> None:
        if self._trackers:
            numbers = {prefix + k: v for k, v in _numbers(metrics).items() if k != "step"}
            for tracker in self._trackers:
                tracker.put((numbers, metrics["step"]))

    def _has_ended(self, tracker: str, why: str) -> None:
        why = without_secrets(why)
        self.log(f"Warning: the tracker {tracker} has ended: {why}. All is in metrics.jsonl and evals.jsonl.")
        with self._recording, contextlib.suppress(OSError):
            add_to_start(self.folder / "run.json", "trackers_ended", {tracker: why})


class _TrackerThread(threading.Thread):
    """Passes lines on to one tracker, in their order, until None is put or the tracker fails."""

    def __init__(self, tracker: str, begin: Callable[[], Any], has_ended: Callable[[str, str], None]) -> None:
        super().__init__(daemon=True)
        self._tracker, self._begin, self._has_ended = tracker, begin, has_ended
        self._lines: queue.Queue[tuple[dict[str, float], int] | None] = queue.Queue(MAX_QUEUED)
        self._left = False
        self.start()

    def put(self, line: tuple[dict[str, float], int] | None) -> None:
        """Queue one line, or None after the last one."""
        if not self._left:
            try:
                self._lines.put_nowait(line)
            except queue.Full:
                self.leave(f"{MAX_QUEUED:,} lines wait for it, and it is left behind")

    def leave(self, why: str) -> None:
        """Queue nothing more."""
        if not self._left:
            self._left = True
            self._has_ended(self._tracker, why)

    def run(self) -> None:
        try:
            tracker = self._begin()
            while not self._left and (line := self._lines.get()) is not None:
                numbers, step = line
                tracker.log(numbers, step=step)
            tracker.finish()
        except (Exception, SystemExit) as error:  # whatever a tracker raises, it must not stop a run
            self.leave(f"{type(error).__name__}: {error}")


# --------------------------------------------------------------------------------------------------- reading them again


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of metrics.jsonl or evals.jsonl in the order of their steps; of a step trained again the last one.

    A line that cannot be read is skipped: truncated by a killed process, or edited. All have a whole number `step`.
    """
    by_step: dict[tuple[int, str, str], dict[str, Any]] = {}
    if path.exists():
        with open(path, "rb") as file:
            _take(file, by_step)
    return [by_step[key] for key in sorted(by_step)]


def read_back(path: Path) -> Iterator[dict[str, Any]]:
    """The same objects from the last line to the first, repeated steps included. Read lazily, from the end."""
    return (entry for _, text in _backwards(path) if (entry := _entry(text)) is not None)


def read_spread(path: Path) -> tuple[list[dict[str, Any]], str]:
    """As `read_lines`; of a file above PLACES · PLACE_BYTES the lines at PLACES places of it, first and last included.

    Half of the places are evenly spaced, half in geometric progression, for a logarithmic axis.

    Returns:
        The objects, and a sentence about what was skipped.
    """
    size = path.stat().st_size if path.exists() else 0
    by_step: dict[tuple[int, str, str], dict[str, Any]] = {}
    unreadable = 0
    if not size:
        return [], ""
    with open(path, "rb") as file:
        if size <= PLACES * PLACE_BYTES:
            unreadable = _take(file, by_step)
        else:
            last, half = size - PLACE_BYTES, PLACES // 2
            even = [round(last * i / (half - 1)) for i in range(half)]
            early = [round(PLACE_BYTES * (last / PLACE_BYTES) ** (i / half)) for i in range(half)]
            for place in sorted({*even, *early}):
                file.seek(max(place - 1, 0))
                if not place or file.readline(LONGEST_LINE).endswith(b"\n"):  # the rest of a line
                    unreadable += _take(iter(lambda: _before(file, place + PLACE_BYTES), b""), by_step)  # noqa: B023
    notes = []
    if size > PLACES * PLACE_BYTES:
        notes.append(
            f"{path.name} has {size / 1e6:,.0f} MB: what follows is from {len(by_step):,} of its lines, those at "
            f"{PLACES:,} places spread over it."
        )
    if unreadable:
        notes.append(f"{unreadable:,} line(s) of {path.name} cannot be read and are left out.")
    return [by_step[key] for key in sorted(by_step)], " ".join(notes)


def _take(lines: Iterable[bytes], by_step: dict[tuple[int, str, str], dict[str, Any]]) -> int:
    """Put the objects of lines into `by_step`; returns how many lines cannot be read."""
    unreadable = 0
    for text in lines:
        if (entry := _entry(text)) is None:
            unreadable += bool(text.strip())
        else:
            by_step[entry["step"], entry.get("corpus", ""), weights_of(entry)] = entry
    return unreadable


def _before(file: IO[bytes], end: int) -> bytes:
    """The next line, when it begins before `end`."""
    return file.readline(LONGEST_LINE) if file.tell() < end else b""


def _entry(text: bytes) -> dict[str, Any] | None:
    """The object of a line; None for what a run does not write: edited, or left by a power cut."""
    try:
        entry = json.loads(text.decode(errors="replace"))
    except (ValueError, RecursionError):
        return None
    if not isinstance(entry, dict) or not all(isinstance(entry.get(name, ""), str) for name in ("corpus", "weights")):
        return None
    step = entry.get("step")
    return entry if type(step) is int and 0 <= step < 2**63 else None


def _backwards(path: Path) -> Iterator[tuple[int, bytes]]:
    """Each line that is not blank, from the last to the first, with the offset of its end."""
    try:
        file = open(path, "rb")  # noqa: SIM115
    except FileNotFoundError:
        return
    with file:
        start = end = file.seek(0, os.SEEK_END)
        rest, block = b"", BLOCK  # rest: what of [start, end) has not been yielded
        while start:
            size = min(block, start)
            start -= size
            file.seek(start)
            rest = file.read(size) + rest
            first = rest.find(b"\n") + 1 if start else 0
            block = BLOCK if 0 < first < len(rest) else 2 * block  # or a line of many blocks would be copied for each
            if start and not first:
                continue
            for text in reversed(rest[first:].splitlines(keepends=True)):
                if text.strip():
                    yield end, text
                end -= len(text)
            rest = rest[:first]


def weights_of(line: dict[str, Any]) -> str:
    """Which weights a line of evals.jsonl is of: RAW or AVERAGE. Those of earlier versions do not say; they are RAW."""
    weights: str = line.get("weights", RAW)
    return weights


def is_of_corpus(line: dict[str, Any]) -> bool:
    """Whether a line of evals.jsonl is the evaluation of a corpus; None is a value that is not finite."""
    values = [line.get("loss", ""), line.get("bits_per_byte", "")]
    return (
        all(value is None or isinstance(value, float) for value in values)
        and "corpus" in line
        and type(line.get("targets")) is int
    )


def is_of_task(line: dict[str, Any]) -> bool:
    """Whether a line of evals.jsonl is the evaluation of a task."""
    return "corpus" in line and not line.keys() & {"loss", "bits_per_byte", "targets"}


def _numbers(metrics: dict[str, Any], prefix: str = "") -> dict[str, float]:
    flat: dict[str, float] = {}
    for name, value in metrics.items():
        if isinstance(value, dict):
            flat |= _numbers(value, f"{prefix}{name}/")
        elif isinstance(value, (int, float)):
            flat[prefix + name] = value
    return flat


def cut_after(path: Path, step: int) -> int:
    """Truncate a file after the step of the checkpoint that the run resumes from: later steps are taken again.

    From the end, so that its cost is that of the lines dropped, not of those kept.

    Returns:
        How many whole lines among the dropped ones could not be read.
    """
    if not path.exists():
        return 0
    unreadable = 0
    for end, text in _backwards(path):  # noqa: B007
        entry = _entry(text)
        if entry is None:
            unreadable += text.endswith(b"\n")  # else truncated by a kill
        elif entry["step"] <= step:
            break
    else:
        end, text = 0, b"\n"
    with open(path, "rb+") as file:
        file.truncate(end)
        if not text.endswith(b"\n"):  # an editor may leave it so
            file.seek(end)
            file.write(b"\n")
        os.fsync(file.fileno())
    return unreadable
