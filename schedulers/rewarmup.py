"""A second warmup in front of the rest of a schedule."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .decay import Decay, Phase, require

if TYPE_CHECKING:
    from . import Schedule


@dataclass(frozen=True, kw_only=True)
class Rewarmup:
    """From `start` on, the rate of `schedule` is reached again linearly over `tokens` tokens.

    For weights whose rate had been low: a run that goes on after its decay, or somebody else's model. Before
    `start` the rate is the schedule's own.

    Args:
        schedule: what is warmed up to.
        start: reading of the clock when it begins.
        tokens: its length.

    Raises:
        ValueError: a value out of its range, or a decay that starts before the rate is back.
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
        return getattr(self.schedule, "decay", None)
