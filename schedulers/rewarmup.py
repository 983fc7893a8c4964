"""A second warmup in front of the rest of a schedule."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .decay import Decay, Phase, require

if TYPE_CHECKING:
    from . import Power, Schedule


@dataclass(frozen=True, kw_only=True)
class Rewarmup:
    """From `start` on, a linear warmup over `tokens` tokens back to the learning rate of `schedule`.

    For weights that were last trained at a low learning rate: a run that continues after its decay, or a published
    model. Before `start` the learning rate is that of `schedule`.

    Args:
        schedule: the schedule to warm up to.
        start: tokens seen when the warmup begins.
        tokens: its length.

    Raises:
        ValueError: a value out of its range, or a decay that starts before the warmup ends.
    """

    schedule: "Schedule"
    start: int
    tokens: int

    def __post_init__(self) -> None:
        require(self, start="a whole number of tokens >= 0", tokens="a whole number of tokens > 0")
        if self.decay is not None and self.start <= self.decay.start < self.start + self.tokens:
            raise ValueError(
                f"The decay starts at {self.decay.start:,} tokens, inside the second warmup, which ends at "
                f"{self.start + self.tokens:,}: shorten the warmup or start the decay later."
            )

    def __call__(self, *, tokens: int, batch: float) -> float:
        """The learning rate of a step; arguments as in the schedule."""
        rate = self.schedule(tokens=tokens, batch=batch)
        if self.start <= tokens < self.start + self.tokens:
            rate *= (tokens - self.start) / self.tokens
        return rate

    def phase(self, tokens: int) -> Phase:
        """The part of the schedule that the step after `tokens` tokens is in."""
        return "warmup" if self.start <= tokens < self.start + self.tokens else self.schedule.phase(tokens)

    @property
    def warmup_tokens(self) -> int:
        """Length of the schedule's own warmup."""
        return self.schedule.warmup_tokens

    @property
    def decay(self) -> Decay | None:
        """The schedule's decay."""
        return self.schedule.decay

    @property
    def rewarmup(self) -> tuple[int, int]:
        """Tokens between which the second warmup lies."""
        return self.start, self.start + self.tokens

    @property
    def power(self) -> "Power | None":
        """The Power schedule that is warmed up to, or None."""
        return self.schedule.power

    @property
    def peak(self) -> float:
        """The schedule's highest rate."""
        return self.schedule.peak

    @property
    def fall(self) -> tuple[int, int] | None:
        """Tokens between which the schedule's rate falls to its end, or None."""
        return self.schedule.fall

    def at_cap(self, tokens: int, batch: float) -> bool:
        """Whether a cap binds the schedule's rate of this step."""
        return self.schedule.at_cap(tokens, batch)

    def edges(self, batches: Iterable[float]) -> Iterator[float]:
        """Tokens at which the rate of one of `batches` begins to follow another formula."""
        yield from self.rewarmup
        yield from self.schedule.edges(batches)
