"""What a person sees of a run: a bar on a terminal, a line now and then where output is a file."""

from __future__ import annotations

import contextlib
import datetime
import math
import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

if TYPE_CHECKING:  # the preparation of data does without the seconds that these imports take
    from train.config import Config
    from train.engine import Engine
    from train.state import State


class _Console(Console):
    def on_broken_pipe(self) -> None:
        self.quiet = True  # rich would end the process; that nobody reads any more is no reason to lose a run


class Progressing:
    """A context manager whose `step` shows tokens, loss, rate, tokens/s and time left."""

    def __init__(self, config: Config, engine: Engine, state: State) -> None:
        self.console = _Console(stderr=False)
        self.active = engine.is_main
        self.config = config
        self.end = config.run.tokens
        self.start = state.tokens - config.run.tokens_seen
        self.last_line = self.start
        self.smooth = 0.0
        self.progress = Progress(
            TextColumn("{task.fields[tokens]} of " + human(config.end_tokens) + " tokens"),
            BarColumn(bar_width=24),
            TextColumn("lm_loss {task.fields[loss]}  rate {task.fields[rate]}  {task.fields[speed]} tokens/s  left"),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=self.console,
            disable=not (self.active and self.console.is_terminal),
        )
        self.task = self.progress.add_task(
            "train", total=self.end, completed=self.start, tokens="0", loss="-", rate="-", speed="-"
        )

    def __enter__(self) -> Progressing:
        self.progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(OSError):
            self.progress.stop()

    def step(self, record: dict[str, Any], state: State) -> None:
        """Show one step's metrics."""
        if not self.active:
            return
        done = state.tokens - self.config.run.tokens_seen
        speed = record["tokens_per_second"]
        self.smooth = 0.9 * self.smooth + 0.1 * speed if self.smooth else speed
        fields: dict[str, Any] = {
            "tokens": human(state.tokens),
            "loss": "skipped" if record["lm_loss"] is None else f"{record['lm_loss']:.3f}",
            "rate": f"{record['lr']:.2e}",
            "speed": human(self.smooth),
        }
        self.progress.update(self.task, completed=min(done, self.end), **fields)
        if not self.console.is_terminal and (done - self.last_line >= self.end / 20 or done >= self.end):
            self.last_line = done
            self.say(
                f"step {state.step:>7,}  {fields['tokens']} tokens ({done / self.end:.0%})  lm_loss {fields['loss']}  "
                f"rate {fields['rate']}  {fields['speed']} tokens/s"
            )

    def say(self, text: str) -> None:
        """A line above the bar."""
        if self.active:
            with contextlib.suppress(OSError):  # a terminal that was closed, a full disk
                self.console.print(text, highlight=False, markup=False, soft_wrap=True)


def progress_lines(say: Callable[[str], None], every: float = 30.0) -> Callable[[str, int, int | None], None]:
    """For `data.prepare`'s progress: a line when something begins, and one every so many seconds."""
    begun: dict[str, tuple[float, int]] = {}
    said: dict[str, float] = {}

    def progress(description: str, done: int, total: int | None) -> None:
        now = time.monotonic()
        if now - said.setdefault(description, -math.inf) < every:
            return
        said[description] = now
        then, before = begun.setdefault(description, (now, done))
        so_far = f"{decimal(done)} of {decimal(total)}" if total else decimal(done)
        line = f"{description}: {so_far}" if done else description
        if done > before:
            speed = (done - before) / (now - then)
            line += f", {decimal(int(speed))}/s"
            if total is not None:
                line += f", {datetime.timedelta(seconds=round((total - done) / speed))} left"
        say(line)

    return progress


def human(count: float) -> str:
    """1234567 as 1.23M."""
    for unit, name in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= unit:
            return f"{count / unit:.3g}{name}"
    return f"{count:.0f}"
