"""The warmup-stable-decay schedule."""

from dataclasses import dataclass

from .decay import Answers, Decay, check_decay, equation_8, require


@dataclass(frozen=True, kw_only=True)
class WSD(Answers):
    """Linear warmup to `lr`, then `lr`, then the decay: equation 2 of arXiv 2408.13359.

    Args:
        lr: the learning rate of the stable part.
        warmup_tokens: length of the warmup.
        decay: the decay, or None for a trunk from which decays are branched later.

    Raises:
        ValueError: a value out of its range, or a decay that starts inside the warmup.
    """

    lr: float
    warmup_tokens: int
    decay: Decay | None = None

    def __post_init__(self) -> None:
        require(self, lr="a finite number > 0", warmup_tokens="a whole number of tokens >= 0")
        check_decay(self.warmup_tokens, self.decay)

    def __call__(self, *, tokens: int, batch: float) -> float:
        """The learning rate of the step after `tokens` tokens; `batch` is ignored."""
        return self.lr * equation_8(tokens, self.warmup_tokens, self.decay)[1]

    @property
    def peak(self) -> float:
        """The highest learning rate."""
        return self.lr
