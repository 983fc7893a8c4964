"""The cosine schedule, the baseline that needs its horizon in advance."""

from dataclasses import dataclass

from .decay import Answers, Decay, equation_8, require


@dataclass(frozen=True, kw_only=True)
class Cosine(Answers):
    """Linear warmup to `lr`, then half a cosine down to `floor * lr` at `total_tokens`, and `floor * lr` after.

    Args:
        lr: the learning rate at the end of the warmup.
        warmup_tokens: length of the warmup.
        total_tokens: tokens at which the cosine ends, warmup included.
        floor: the final learning rate as a fraction of `lr`.

    Raises:
        ValueError: a value out of its range, or a warmup that is not shorter than `total_tokens`.
    """

    lr: float
    warmup_tokens: int
    total_tokens: int
    floor: float = 0.1

    def __post_init__(self) -> None:
        require(
            self,
            lr="a finite number > 0",
            warmup_tokens="a whole number of tokens >= 0",
            total_tokens="a whole number of tokens > 0",
            floor="a fraction from 0 to 1",
        )
        if self.total_tokens <= self.warmup_tokens:
            raise ValueError(
                f"Cosine: the warmup of {self.warmup_tokens:,} tokens is not shorter than total_tokens, "
                f"{self.total_tokens:,}."
            )

    def __call__(self, *, tokens: int, batch: float) -> float:
        """The learning rate of the step after `tokens` tokens; `batch` is ignored."""
        length = self.total_tokens - self.warmup_tokens
        curve = Decay(start=self.warmup_tokens, tokens=length, shape="cosine", floor=self.floor)
        return self.lr * equation_8(tokens, self.warmup_tokens, curve)[1]

    @property
    def peak(self) -> float:
        """The highest learning rate."""
        return self.lr

    @property
    def fall(self) -> tuple[int, int]:
        """The whole trunk; no part of it is a decay that was branched off."""
        return self.warmup_tokens, self.total_tokens
