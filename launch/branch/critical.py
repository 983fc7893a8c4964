"""The critical batch of a run, from the losses of branches with several batches at equal tokens.

Each branch ends in a decay to 0, so that losses can be compared: before a decay, a part of the loss depends on the
learning rate and the batch, and the decay removes it. (arXiv 2505.23971 measures with branches too, scales the learning
rate by the root of the batch, compares smoothed losses without a decay, and allows a difference of 0.01 nats.)

The batch with the lowest loss is trained twice, with all tokens and with half of them. Between the two its loss is
taken as linear in the log of the tokens, which turns the loss of another batch into the tokens that the best one takes
to the same loss. The critical batch is the one, larger than the best, that needs MORE times as many (a fifth more, as
in arXiv 2410.21676). At its own best learning rate no smaller batch would need more tokens than the best.

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
MOST = 2.0  # times as many tokens: no loss of the best batch at fewer than half of its tokens is known
DRAWS = 2000
FEWEST = 8  # validation sequences that are resampled: one alone would have an interval of no width

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """A value by all sequences, and the 95% interval of resamples around it."""

    low: float
    value: float
    high: float


@dataclass(frozen=True)
class Critical:
    """What the branches say. Three of the fields have an entry for each batch.

    Attributes:
        best: which of the batches has the lowest loss.
        losses: nats a target at equal tokens; inf where a branch diverged.
        differences: of the losses from the best batch's.
        needed: tokens for the same loss, over the best batch's; from MOST on they are MOST. None: by how much twice the
            tokens lower the best batch's loss is not known to within a half, or the sequences are fewer than FEWEST, so
            no loss is turned into tokens.
        critical: the critical batch; inf above the largest. None with `needed`.
        bound: the batch to go by: the critical one, a lower limit of it where that is all that is known, or None.
    """

    best: int
    losses: list[float]
    differences: list[Interval]
    needed: list[Interval] | None
    critical: Interval | None
    bound: float | None


def best_of(sums: Sequence[Array | None]) -> int | None:
    """Which batch has the lowest loss, or None where all diverged; arguments as in `critical`."""
    losses = {i: float(each[:, 0].sum()) for i, each in enumerate(sums) if each is not None}
    return min(losses, key=losses.__getitem__, default=None)


def critical(batches: Sequence[float], sums: Sequence[Array | None], best: int, half: Array) -> Critical:
    """Estimate the critical batch.

    Args:
        batches: two or more, ascending.
        sums: of each batch (N, 2): nats and targets of every validation sequence; None for a branch that diverged.
        best: as `best_of` says.
        half: as `sums`, of the best batch at half of the tokens.
    """
    draws = np.random.default_rng(0).multinomial(len(half), np.full(len(half), 1 / len(half)), DRAWS)
    weights = np.concatenate([np.ones((1, len(half))), draws])  # the first is no resample

    def loss(of: Array | None) -> Array:
        if of is None:
            return np.full(len(weights), math.inf)
        nats, targets = (weights @ of).T
        return nats / targets

    losses = np.stack([loss(each) for each in sums], axis=1)
    excess = losses - losses[:, best, None]
    said = best, losses[0].tolist(), list(map(_interval, excess.T))
    gain = loss(half) - losses[:, best]  # nats, by twice the tokens
    if len(half) < FEWEST or not _interval(gain).low > gain[0] / 2 > 0:
        return Critical(*said, None, None, None)
    log_needed = np.minimum(excess / np.maximum(gain, 1e-12)[:, None], 1.0) * math.log(MOST)
    above = np.log(batches[best:])
    found = _interval(np.exp([_crossing(above, row, math.log(MORE)) for row in log_needed[:, best:]]))
    bound = None
    if math.isfinite(found.high):
        bound = found.value
    elif found.low >= batches[min(best + 1, len(batches) - 1)]:
        bound = min(found.low, batches[-1])
    return Critical(*said, list(map(_interval, np.exp(log_needed).T)), found, bound)


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
