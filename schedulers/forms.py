"""The forms of the law: log η as a function of log tokens, log batch and log parameters, and their fit.

The coefficients of a form, called its numbers, are (log γ, b, third, d) along the last axis: γ is the learning rate of
a batch of 1 where log tokens and log parameters are 0, `third` is log η_max of `hard` and `smooth`, c of `plane` and
unused in `power`, and d is the exponent of the parameters.
"""

from __future__ import annotations

import numpy as np
from scipy.optimize import least_squares

from .cells import Array

NUMBERS = {"power": 2, "hard": 3, "smooth": 3, "plane": 3}  # how many each form has; the preferred form first
CAPPED = ("hard", "smooth")
SCALE = 0.2  # of a log learning rate: larger residuals count less than squared (soft L1)
# The prior of b, which is −0.51 in arXiv 2408.13359. It weighs as much as one cell whose horizon is a factor e away
# from the mean, so it determines b in a sweep of a dozen cells and has no effect in one of a hundred.
PRIOR_B, PRIOR_B_SCALE = -0.5, 0.2


def log_lr(
    form: str, numbers: Array, log_tokens: Array, log_batch: Array, log_parameters: Array | float = 0.0
) -> Array:
    """log η, (..., n), of numbers (..., 4) at n points."""
    log_gamma, b, third, d = (numbers[..., index, None] for index in range(4))
    line = log_gamma + b * log_tokens + (third if form == "plane" else 1.0) * log_batch
    if form == "hard":
        line = np.minimum(line, third)
    elif form == "smooth":
        line = -np.logaddexp(-line, -third)
    return np.asarray(line + d * log_parameters)


def _slopes(form: str, numbers: Array, log_tokens: Array, log_batch: Array, log_parameters: Array) -> Array:
    """d log η / d numbers, (n, 4)."""
    log_gamma, b, third, _ = numbers
    below = log_gamma + b * log_tokens + log_batch - third  # log of batch over critical batch
    share = {"hard": (below < 0).astype(float), "smooth": 1 / (1 + np.exp(np.clip(below, -700, 700)))}.get(
        form, np.ones_like(log_tokens)
    )
    last = {"plane": log_batch, "power": np.zeros_like(share)}.get(form, 1 - share)
    return np.stack([share, share * log_tokens, last, log_parameters], axis=1)


def solve(
    form: str,
    log_tokens: Array,
    log_batch: Array,
    values: Array,
    log_parameters: Array | None = None,
    start: Array | None = None,
    prior_b: float = PRIOR_B,
) -> Array:
    """The numbers (4,) of a form fitted to `values` (n,) by robust least squares (soft L1); d is 0 without parameters.

    In a form with a cap, where few cells cannot separate b from the cap, b has a weak prior, `prior_b` ± PRIOR_B_SCALE.
    Without a `start` it tries several, because with a cap the cost has more than one minimum.
    """
    free = [0, 1, *([2] if form != "power" else []), *([3] if log_parameters is not None else [])]
    size = np.zeros_like(values) if log_parameters is None else log_parameters
    prior = SCALE / PRIOR_B_SCALE if form in CAPPED else 0.0
    of_prior = prior * np.eye(len(free))[1]
    if start is None:
        level = float(np.median(values - log_batch))
        caps = [*np.quantile(values, [0.4, 0.8]), values.max() + 0.7] if form in CAPPED else [0.5]
        starts = [np.array([level + 0.3, -0.5, cap, 0.0]) for cap in caps]
    else:
        starts = [start]
    found = []
    for first in starts:

        def whole(x: Array, first: Array = first) -> Array:
            numbers = first.copy()
            numbers[free] = x
            return numbers

        fitted = least_squares(
            lambda x: np.append(log_lr(form, whole(x), log_tokens, log_batch, size) - values, (x[1] - prior_b) * prior),
            first[free],
            jac=lambda x: np.vstack([_slopes(form, whole(x), log_tokens, log_batch, size)[:, free], of_prior]),
            loss="soft_l1",
            f_scale=SCALE,
        )
        found.append((float(fitted.cost), whole(fitted.x)))
    return min(found, key=lambda entry: entry[0])[1]
