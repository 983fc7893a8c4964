"""The Power schedule: a learning rate that depends on the tokens seen and the batch size, and on no horizon."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from .decay import Answers, Decay, check_decay, equation_8, require

CAPS = ("hard", "smooth")


@dataclass(frozen=True, kw_only=True)
class Power(Answers):
    """The Power schedule, equations 7 and 8 of arXiv 2408.13359, with the values chosen there as defaults.

    Equation 7 is the trunk: min(max_lr, batch**batch_exponent * a * n**b), and max_lr at n = 0. With the cap "smooth"
    it is 1 / (1/max_lr + 1/(batch**batch_exponent * a * n**b)): the best learning rate below and above the critical
    batch (arXiv 1812.06162, section 2.2), at which both terms are equal. Equation 8 puts a linear warmup before the
    trunk and, if `decay` is given, a decay after it. The batch is always that of the current step: if it grows, warmup
    and decay scale with it as the trunk does.

    Args:
        a: learning rate per unit of batch at one token.
        b: exponent of the tokens seen.
        max_lr: the cap (eta_max).
        warmup_tokens: length of the warmup (N_w).
        batch_exponent: how the learning rate grows with the batch; 1 is the paper's proportionality.
        cap: "hard", equation 7's minimum, or "smooth".
        decay: the decay, or None for a trunk that never ends.

    Raises:
        ValueError: a value out of its range, or a decay that starts inside the warmup.
    """

    a: float = 4.0
    b: float = -0.51
    max_lr: float = 0.02
    warmup_tokens: int = 1_000_000_000
    batch_exponent: float = 1.0
    cap: str = "hard"
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
        if self.cap not in CAPS:
            raise ValueError(f"Power: there is no cap {self.cap!r}; it is {' or '.join(CAPS)}.")
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
        uncapped = self._uncapped(trunk_tokens, batch)
        if self.cap == "hard":
            return factor * min(self.max_lr, uncapped)
        low, high = sorted((self.max_lr, uncapped))
        return factor * low / (1.0 + low / high)  # the harmonic sum, in a form that 0 and infinity do not break

    @property
    def peak(self) -> float:
        """The cap."""
        return self.max_lr

    @property
    def power(self) -> "Power":
        """This schedule."""
        return self

    def at_cap(self, tokens: int, batch: float) -> bool:
        """Whether the batch of this step is above the critical batch: the power law alone would give more than max_lr.

        Under a smooth cap the learning rate is then between half of max_lr and max_lr. In warmup the trunk at the end
        of the warmup counts, in decay the trunk at the start of the decay, as for the learning rate.
        """
        trunk_tokens = equation_8(tokens, self.warmup_tokens, self.decay)[2]
        return self._uncapped(trunk_tokens, batch) > self.max_lr

    def critical_batch(self, tokens: int) -> float:
        """The batch, in units of 4096 tokens, at which the power law reaches max_lr after `tokens` tokens of the trunk:
        (max_lr / (a * n**b))**(1/batch_exponent); 0 at n = 0, and infinite or 0 if batch_exponent is 0.

        A larger batch needs more tokens for the same loss.

        Raises:
            ValueError: negative `tokens`.
        """
        if not tokens >= 0:
            raise ValueError(f"tokens is the count of tokens before this step, 0 or more; it is {tokens!r}.")
        try:
            ratio = self.max_lr / self.a * math.pow(tokens, -self.b)
            return math.pow(ratio, 1.0 / self.batch_exponent) if ratio else 0.0
        except ZeroDivisionError:  # the batch has no effect
            return math.inf if ratio >= 1 else 0.0
        except OverflowError:
            return math.inf

    def cap_release(self, batch: float) -> float:
        """The tokens after which `batch` is below the critical batch: (batch**batch_exponent * a / max_lr)**(1/|b|).

        Raises:
            ValueError: a `batch` that is not above 0.
        """
        try:
            return math.pow(self._gain(batch) / self.max_lr, -1.0 / self.b)
        except OverflowError:
            return math.inf

    def edges(self, batches: Iterable[float]) -> Iterator[float]:
        """Tokens at which the rate of one of `batches` begins to follow another formula."""
        yield from super().edges(batches)
        yield from map(self.cap_release, batches)

    def _uncapped(self, tokens: int, batch: float) -> float:
        gain = self._gain(batch)
        return gain * math.pow(tokens, self.b) if tokens > 0 and gain < math.inf else math.inf

    def _gain(self, batch: float) -> float:
        if not 0 < batch < math.inf:
            raise ValueError(f"batch is this step's size in units of 4096 tokens, above 0; it is {batch!r}.")
        try:
            return self.a * math.pow(batch, self.batch_exponent)
        except OverflowError:
            return math.inf
