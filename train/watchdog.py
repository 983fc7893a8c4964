"""Ends a run in which a rank hangs: all others wait for it in a collective, and nothing else would report it.

Every rank has a heartbeat: a thread regularly writes a counter and the step to a file in the run's folder. A rank that
has made no progress for `engine.timeout` seconds reads the files of all ranks twice, some beats apart. A rank whose
counter has not changed has stopped; one with a heartbeat, but at an earlier step than the others, hangs. No clocks of
different machines are compared.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

from powertrain.data.files import replace_text
from powertrain.train.engine import Engine
from powertrain.train.state import State

BEAT_SECONDS = 10.0  # at most: a shared file system may show a file seconds late
LOOKS_APART = 4  # beats


class Watchdog:
    """A context manager around training; call `alive` after each step, evaluation or save."""

    def __init__(self, folder: Path, engine: Engine, state: State) -> None:
        self.folder = folder
        self.beats = folder / ".ranks"
        self.engine = engine
        self.state = state
        self._progress = time.monotonic()
        self._patient = False
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Watchdog:
        def begin() -> None:
            shutil.rmtree(self.beats, ignore_errors=True)
            self.beats.mkdir()

        self.engine.first_rank_decides(begin)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()

    def alive(self) -> None:
        """This rank has made progress."""
        self._progress = time.monotonic()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """A context without a time limit, as long as all ranks have a heartbeat."""
        self._patient = True
        try:
            yield
        finally:
            self._patient = False
            self.alive()

    def _watch(self) -> None:
        timeout = self.engine.config.engine.timeout
        beat = min(BEAT_SECONDS, timeout / 20)
        count, looked, before = 0, 0, {}
        while not self._ended.wait(beat):
            count += 1
            with contextlib.suppress(OSError):  # on a full disk this rank looks stopped, should another hang
                replace_text(self._file(self.engine.rank), json.dumps({"count": count, "step": self.state.step}))
            if time.monotonic() - self._progress <= timeout:
                looked = 0
                continue
            looked += 1
            if looked == 1:
                before = self._look()
            elif looked == LOOKS_APART:  # by now the counters of ranks that run have changed
                after = self._look()
                stopped = [rank for rank in after if after[rank]["count"] == before[rank]["count"]]
                if stopped or not self._patient:
                    self._give_up(timeout, stopped, after)
                looked = 0

    def _file(self, rank: int) -> Path:
        return self.beats / f"{rank:05d}.json"

    def _look(self) -> dict[int, dict[str, int]]:
        found = {}
        for rank in range(self.engine.world_size):
            try:
                found[rank] = json.loads(self._file(rank).read_text(encoding="utf-8"))
            except (OSError, ValueError):
                found[rank] = {"count": 0, "step": 0}
        return found

    def _give_up(self, timeout: float, stopped: list[int], after: dict[int, dict[str, int]]) -> None:
        last = max(look["step"] for look in after.values())
        behind = [rank for rank in after if after[rank]["step"] < last]
        who = stopped or behind
        named = (
            f"rank {', '.join(map(str, who))} {'does not answer' if stopped else 'has not caught up'}"
            if who
            else "all ranks answer, so a collective hangs, or a step takes longer than that"
        )
        reason = (
            f"No progress for {timeout:g} s (engine.timeout) after step {self.state.step}: {named}. The run ends here; "
            "the same command resumes from the newest checkpoint."
        )
        try:
            if self.engine.rank == min({*after} - {*stopped}, default=self.engine.rank):
                print(f"powertrain: {reason}", file=sys.stderr, flush=True)
                ended = {"code": 1, "reason": reason, "step": self.state.step}
                replace_text(self.folder / "exit.json", json.dumps(ended) + "\n")
        finally:
            os._exit(1)
