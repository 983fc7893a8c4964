"""The Power schedule: a rate that depends on tokens seen and batch size, and on no horizon."""

import math
from dataclasses import dataclass

from .decay import Decay, Phase, check_decay, equation_8, require


@dataclass(frozen=True, kw_only=True)
class Power:
    """The Power schedule, equations 7 and 8 of arXiv 2408.13359, with the values chosen there as defaults.

    Equation 7 is the trunk: min(max_lr, batch**batch_exponent * a * n**b), and max_lr at n = 0. Equation 8
    puts a linear warmup before it and, if `decay` is given, a decay after it. The batch is always that of
    the current step: a warmup or a decay under a growing batch scales with it as the trunk does.

    Args:
        a: rate per unit of batch at one token.
        b: exponent of the tokens seen.
        max_lr: the cap (eta_max).
        warmup_tokens: length of the warmup (N_w).
        batch_exponent: how the rate grows with the batch; 1 is the paper's proportionality.
        decay: the decay, or None for a trunk without an end.

    Raises:
        ValueError: a value out of its range, or a decay that starts inside the warmup.
    """

    a: float = 4.0
    b: float = -0.51
    max_lr: float = 0.02
    warmup_tokens: int = 1_000_000_000
    batch_exponent: float = 1.0
    decay: Decay | None = None

    def __post_init__(self) -> None:
        require(
            self,
            a="a finite number > 0",
            b="a finite number < 0",
            max_lr="a finite number > 0",
            warmup_tokens="a whole number of tokens >= 0",
            batch_exponent="a finite number",
        )
        check_decay(self.warmup_tokens, self.decay)

    def __call__(self, *, tokens: int, batch: float) -> float:
        """The learning rate of a step.

        Args:
            tokens: tokens trained before this step (n).
            batch: size of this step in units of 4096 tokens (beta).

        Raises:
            ValueError: negative `tokens`, or a `batch` that is not above 0.
        """
        _, factor, trunk_tokens = equation_8(tokens, self.warmup_tokens, self.decay)
        return factor * min(self.max_lr, self._uncapped(trunk_tokens, batch))

    def phase(self, tokens: int) -> Phase:
        """The part of equation 8 that the step after `tokens` tokens is in."""
        return equation_8(tokens, self.warmup_tokens, self.decay)[0]

    def at_cap(self, tokens: int, batch: float) -> bool:
        """Whether max_lr and not the power law sets the rate of this step.

        A step in warmup goes by the trunk at the end of the warmup, a step in decay by the trunk at the
        start of the decay, as its rate does.
        """
        trunk_tokens = equation_8(tokens, self.warmup_tokens, self.decay)[2]
        return self._uncapped(trunk_tokens, batch) > self.max_lr

    def cap_release(self, batch: float) -> float:
        """Tokens at which equation 7 leaves the cap: (batch**batch_exponent * a / max_lr)**(1/|b|)."""
        try:
            return math.pow(self._gain(batch) / self.max_lr, -1.0 / self.b)
        except OverflowError:
            return math.inf

    def _uncapped(self, tokens: int, batch: float) -> float:
        gain = self._gain(batch)
        return gain * math.pow(tokens, self.b) if tokens > 0 else math.inf

    def _gain(self, batch: float) -> float:
        if not 0 < batch < math.inf:
            raise ValueError(f"batch is this step's size in units of 4096 tokens, above 0; it is {batch!r}.")
        return self.a * math.pow(batch, self.batch_exponent)
