"""Requests to stop a run: a signal, or a file in its folder."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from powertrain.train.engine import Engine
from powertrain.train.errors import ConfigError

BY_FILE = "the file 'stop' in the run folder"


class Stop:
    """Collects requests to stop: a signal of SIGNALS to any rank, or a file `stop` in the run folder."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
    early = 0  # a signal that came before the loop, see train.cli

    def __init__(self, folder: Path, engine: Engine, check_claim: Callable[[], None]) -> None:
        self.file = folder / "stop"
        self.engine = engine
        self.check_claim = check_claim
        self._signal = self.early
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Stop:
        for number in self.SIGNALS:
            # nohup ignores SIGHUP, so that the terminal may be closed.
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: object) -> None:
        self._signal = number

    def reason(self) -> str | None:
        """Why to stop, the same on all ranks, or None. Collective.

        Raises:
            ConfigError: on all ranks, when the run's folder is another one now.
        """
        wanted = torch.tensor([self._signal, int(self.engine.is_main and self.file.exists()), 0])
        try:
            self.check_claim()
        except ConfigError:
            wanted[2] = 1
        by_signal, by_file, moved = self.engine.reduce(wanted).tolist()
        if moved:
            self.engine.first_rank_decides(self.check_claim)
        if by_file:
            return BY_FILE
        if by_signal:
            return "a signal" if not self._signal else signal.Signals(self._signal).name
        return None
