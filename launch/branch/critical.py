"""The critical batch of a run, from the losses of branches with several batches at equal tokens.

Each branch ends in a decay to 0, so that losses compare: under a held learning rate a loss has a part that depends on
the learning rate and the batch, and that a decay removes. (arXiv 2505.23971 branches likewise, scales the learning rate
by the root of the batch, smooths losses under a held learning rate, and allows 0.01 nats.)

The smallest batch is trained twice, over all tokens and over half of them. In between its loss is taken as linear in
the log of tokens, which turns the loss of another batch into the tokens that the smallest one takes to the same loss.
The critical batch is the one that needs MORE times as many tokens as the smallest (a fifth more, as in arXiv
2410.21676).

Intervals are 95%: all is computed again for DRAWS resamples of the validation sequences, each the same for all
branches. So they are about these sequences, and not about another order of the training data.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

MORE = 1.2
MOST = 2.0  # times as many tokens: no loss of the smallest batch at fewer than half of its tokens is known
DRAWS = 2000

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """A value by all sequences, and the 95% interval of resamples around it."""

    low: float
    value: float
    high: float


@dataclass(frozen=True)
class Critical:
    """What the branches say. The first three have an entry for each batch.

    Attributes:
        losses: nats a target at equal tokens; inf where a branch diverged.
        differences: of the losses from the smallest batch's.
        needed: tokens for the same loss, over the smallest batch's; from MOST on they are MOST. None: by how much twice
            the tokens lower the smallest batch's loss is not known to within a half, so no loss is turned into tokens.
        batch: the critical batch in the unit of the batches; inf above the largest.
    """

    losses: tuple[float, ...]
    differences: tuple[Interval, ...]
    needed: tuple[Interval, ...] | None
    batch: Interval | None

    def bound(self, batches: Sequence[float]) -> float | None:
        """The batch to go by: the critical one, a lower limit of it where that is all that is known, or None."""
        if self.batch is None:
            return None
        if math.isfinite(self.batch.high):
            return self.batch.value
        return min(self.batch.low, batches[-1]) if self.batch.low >= batches[1] else None


def critical(batches: Sequence[float], sums: Sequence[Array | None], half: Array) -> Critical:
    """Estimate the critical batch.

    Args:
        batches: two or more, ascending.
        sums: of each batch (N, 2): nats and targets of every validation sequence; None for a branch that diverged,
            which none of the smallest batch did.
        half: likewise, of the smallest batch at half of the tokens.
    """
    assert sums[0] is not None
    draws = np.random.default_rng(0).multinomial(len(half), np.full(len(half), 1 / len(half)), DRAWS)
    weights = np.concatenate([np.ones((1, len(half))), draws])  # the first is no resample

    def loss(of: Array | None) -> Array:
        if of is None:
            return np.full(len(weights), math.inf)
        nats, targets = (weights @ of).T
        return nats / targets

    losses = np.stack([loss(each) for each in sums], axis=1)
    excess = losses - losses[:, :1]
    differences = tuple(map(_interval, excess.T))
    gain = loss(half) - losses[:, 0]  # nats, by twice the tokens
    if not _interval(gain).low > gain[0] / 2 > 0:
        return Critical(tuple(losses[0]), differences, None, None)
    log_needed = np.minimum(excess / np.maximum(gain, 1e-12)[:, None], 1.0) * math.log(MOST)
    needed = tuple(map(_interval, np.exp(log_needed).T))
    found = np.array([_crossing(np.log(batches), row, math.log(MORE)) for row in log_needed])
    return Critical(tuple(losses[0]), differences, needed, _interval(np.exp(found)))


def _crossing(x: Array, y: Array, level: float) -> float:
    """Where the polygon through (x, y), which begins below `level`, first reaches it; inf if it does not."""
    above = np.flatnonzero(y >= level)
    if not len(above):
        return math.inf
    i = above[0]
    return float(x[i - 1] + (x[i] - x[i - 1]) * (level - y[i - 1]) / (y[i] - y[i - 1]))


def _interval(values: Array) -> Interval:
    low, high = np.quantile(values[1:], [0.025, 0.975], method="inverted_cdf")
    return Interval(float(low), float(values[0]), float(high))
