"""A constant learning rate after a warmup."""

from dataclasses import dataclass

from .decay import Answers, equation_8, require


@dataclass(frozen=True, kw_only=True)
class Constant(Answers):
    """Linear warmup to `lr`, then `lr` for good. `WSD` is this with a decay.

    Args:
        lr: the learning rate after the warmup.
        warmup_tokens: length of the warmup.

    Raises:
        ValueError: a value out of its range.
    """

    lr: float
    warmup_tokens: int

    def __post_init__(self) -> None:
        require(self, lr="a finite number > 0", warmup_tokens="a whole number of tokens >= 0")

    def __call__(self, *, tokens: int, batch: float) -> float:
        """The learning rate of the step after `tokens` tokens; `batch` is ignored."""
        return self.lr * equation_8(tokens, self.warmup_tokens, None)[1]

    @property
    def peak(self) -> float:
        """The highest learning rate."""
        return self.lr
