"""What a run prints: a progress bar and metrics on a terminal, a line now and then where output is a file."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group
from rich.filesize import decimal
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn
from rich.text import Text

if TYPE_CHECKING:  # preparing data does not need these imports, which take seconds
    from powertrain.train.config import Config
    from powertrain.train.engine import Engine
    from powertrain.train.state import State

LINE_SHARE, LINE_SECONDS = 0.05, 600.0  # of a run, between lines in a file
PREPARATION_SECONDS = 30.0  # between lines about the preparation of data
# In a row: in the quickstart's warmup routers collapse onto one expert for up to seven steps, and recover.
COLLAPSE_STEPS = 20
NOTED_EXCESS = 0.1  # nats above a uniform guess from which the first loss is explained


class _Console(Console):
    def on_broken_pipe(self) -> None:
        self.quiet = True  # rich would end the process, and a closed pipe is no reason to lose a run


class Progressing:
    """A context manager whose `step` shows a run's progress and metrics, and whose `log` prints a line."""

    def __init__(self, config: Config, engine: Engine, state: State) -> None:
        self.console = _Console(stderr=False)
        self.active = engine.is_main
        self.config = config
        self.cap: float | None = config.schedule.get("max_lr")
        self.smooth = 0.0
        self.steps = self.collapsed_steps = 0  # of this start
        self.collapsed, self.in_a_row, self.warned = False, 0, False
        done = config.trained(state.tokens)
        self.logged, self.logged_tokens = -math.inf, done  # when the last line was written to a file
        self.progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None),
            TextColumn("{task.percentage:.0f}%  {task.fields[left]} left"),
            console=self.console,
            expand=True,
        )
        self.task = self.progress.add_task(config.run.name, total=config.run.tokens, completed=done, left="?")
        self.facts = Text()
        self.live = Live(Group(self.progress, self.facts), console=self.console)

    def __enter__(self) -> Progressing:
        if self.active and self.console.is_terminal:
            self.live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(OSError):
            self.live.stop()
        if kind is None and 10 * self.collapsed_steps > self.steps:
            self.log(
                f"Warning: in {self.collapsed_steps:,} of {self.steps:,} steps the routing of a layer was collapsed: "
                "see expert_load in metrics.jsonl, and docs/balance.md."
            )

    def step(self, record: dict[str, Any], state: State) -> None:
        """Show one step's metrics; in a file, a line every LINE_SHARE of the run or LINE_SECONDS."""
        if not self.active:
            return
        end, done = self.config.run.tokens, self.config.trained(state.tokens)
        speed = record["tokens_per_second"]
        self.smooth = 0.9 * self.smooth + 0.1 * speed if self.smooth else speed
        share, now = min(1.0, done / end), time.monotonic()
        if self.console.is_terminal:
            tokens = f"{human(state.tokens)} of {human(self.config.end_tokens)} tokens"
            self.progress.update(
                self.task,
                completed=share * end,
                description=f"{self.config.run.name}  step {state.step:,}  {tokens}",
                left=duration(max(0, end - done) / self.smooth),
            )
            self.facts.plain = "  ".join(self._facts(record))
        elif now - self.logged >= LINE_SECONDS or done - self.logged_tokens >= LINE_SHARE * end or done >= end:
            self.logged, self.logged_tokens = now, done
            left = duration(max(0, end - done) / self.smooth)
            tokens = f"{human(state.tokens)} tokens ({share:.0%}, {left} left)"
            self.log("  ".join([f"step {state.step:>7,}", tokens, *self._facts(record)]))
        if state.step == 1 and self.config.run.init_from is None and record["lm_loss"] is not None:
            self._explain_first(record["lm_loss"])
        if "expert_load" in record:
            self._watch_routing(record["expert_load"], state)

    def _facts(self, record: dict[str, Any]) -> list[str]:
        """A step's metrics, as they are shown."""
        facts = [
            "skipped" if record["lm_loss"] is None else f"lm_loss {record['lm_loss']:.3f}",
            self._learning_rate(record),
            f"{human(self.smooth)} tokens/s",
        ]
        if record["mfu"] is not None:
            facts.append(f"MFU {record['mfu']:.0%}")
        if "expert_load" in record:
            facts.append(f"busiest expert {record['expert_load']['max_over_mean']:.2f} × mean")
        return facts

    def _explain_first(self, loss: float) -> None:
        """Log why the loss begins above that of a uniform guess, which looks like a mistake and is none."""
        from powertrain.train.model.mup import first_logits_std

        uniform, std = math.log(self.config.model.vocab_size), first_logits_std(self.config)
        if loss > uniform + NOTED_EXCESS:
            tied = " and, with tied embeddings, a token is guessed to follow itself"
            self.log(
                f"The loss begins at {loss:.2f}, above the {uniform:.2f} = ln {self.config.model.vocab_size} of a "
                f"uniform guess, as it should: the first logits are not all alike. Their standard deviation of "
                f"{std:.2f} costs {std**2 / 2:.2f} nats{tied * self.config.model.tie_word_embeddings} (docs/mup.md)."
            )

    def _watch_routing(self, load: dict[str, Any], state: State) -> None:
        """Warn when routing has been collapsed for COLLAPSE_STEPS steps, and log when it has not been for as many."""
        collapsed = bool(load.get("collapsed"))
        self.steps, self.collapsed_steps = self.steps + 1, self.collapsed_steps + collapsed
        self.in_a_row = self.in_a_row + 1 if collapsed == self.collapsed else 1
        self.collapsed = collapsed
        if self.in_a_row < COLLAPSE_STEPS or collapsed == self.warned:
            return
        self.warned = collapsed
        if collapsed:
            self.log(
                f"Warning: routing has collapsed, at step {state.step:,} in {load['collapsed']} of "
                f"{self.config.model.num_hidden_layers} layers: one expert gets nearly all tokens (the busiest "
                f"{load['max_over_mean']:.2f} × mean), or half of them get none. If it stays so, raise "
                "balance.router_aux_loss_coef or lower the learning rate (docs/balance.md)."
            )
        else:
            self.log(f"Routing is no longer collapsed in any layer, at step {state.step:,}.")

    def _learning_rate(self, record: dict[str, Any]) -> str:
        """The learning rate, the schedule's phase, and its share of a Power schedule's cap."""
        where = record["phase"]
        smooth = self.config.schedule.get("cap") == "smooth"
        if record["at_cap"] and where == "trunk" and not smooth:
            where = "at the cap"
        elif self.cap is not None:
            where += f", {record['lr'] / self.cap:.0%} of the cap"
            if record["at_cap"] and smooth:
                where += ", above the critical batch"
        return f"lr {record['lr']:.2e} ({where})"

    def log(self, text: str) -> None:
        """A line above the bar."""
        if self.active:
            with contextlib.suppress(OSError):  # a terminal that was closed, a full disk
                self.console.print(text, highlight=False, markup=False, soft_wrap=True)


def progress_lines(log: Callable[[str], None]) -> Callable[[str, int, int | None], None]:
    """A callback for `data.prepare`'s progress: logs when something begins, and then every PREPARATION_SECONDS."""
    begun: dict[str, tuple[float, int]] = {}
    logged: dict[str, float] = {}

    def progress(description: str, done: int, total: int | None) -> None:
        now = time.monotonic()
        if now - logged.setdefault(description, -math.inf) < PREPARATION_SECONDS:
            return
        logged[description] = now
        then, before = begun.setdefault(description, (now, done))
        so_far = f"{decimal(done)} of {decimal(total)}" if total else decimal(done)
        line = f"{description}: {so_far}" if done else description
        if done > before:
            speed = (done - before) / (now - then)
            line += f", {decimal(int(speed))}/s"
            if total is not None:
                line += f", {duration((total - done) / speed)} left"
        log(line)

    return progress


def human(count: float) -> str:
    """1234567 as 1.23M."""
    for unit, name in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= unit:
            return f"{count / unit:.3g}{name}"
    return f"{count:.0f}"


def duration(seconds: float) -> str:
    """3700 as 1 h 02 min."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    if minutes < 60:
        return f"{minutes} min"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{minutes / 1440:.1f} days"
