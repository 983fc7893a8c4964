"""The forms of the law: log η as a function of log tokens, log batch and log parameters, and their fit.

The coefficients of a form, called its numbers, are (log γ, b, third, d) along the last axis: γ is the learning rate of
a batch of 1 where log tokens and log parameters are 0, `third` is log η_max of `hard` and `smooth`, c of `plane` and
unused in `power`, and d is the exponent of the parameters.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from .cells import Array

Rows = npt.NDArray[np.intp]

NUMBERS = {"power": 2, "hard": 3, "smooth": 3, "plane": 3}  # how many each form has; the preferred form first
CAPPED = ("hard", "smooth")
SCALE = 0.2  # of a log learning rate: larger residuals count less than squared (soft L1)
# The prior of b, which is −0.51 in arXiv 2408.13359. It weighs as much as one cell whose horizon is a factor e away
# from the mean, so it determines b in a sweep of a dozen cells and has no effect in one of a hundred.
PRIOR_B, PRIOR_B_SCALE = -0.5, 0.2
TOLERANCE = 1e-9  # a fit ends with a step that lowers its cost by less than this fraction
LEAST_DAMPING, MOST_DAMPING = 1e-5, 1e9  # beyond the latter no step lowers the cost: at a minimum, or a kink of `hard`
MOST_STEPS = 300


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
    """d log η / d numbers, (..., n, 4)."""
    log_gamma, b, third = (numbers[..., index, None] for index in range(3))
    below = log_gamma + b * log_tokens + log_batch - third  # log of batch over critical batch
    slopes = np.empty((*below.shape, 4))
    share = slopes[..., 0]
    share[:] = 1.0
    if form == "hard":
        share[:] = below < 0
    elif form == "smooth":
        share[:] = 1 / (1 + np.exp(np.clip(below, -700, 700)))
    slopes[..., 1] = share * log_tokens
    slopes[..., 2] = log_batch if form == "plane" else 1 - share
    slopes[..., 3] = log_parameters
    return slopes


def solve(
    form: str,
    log_tokens: Array,
    log_batch: Array,
    values: Array,
    log_parameters: Array | None = None,
) -> Array:
    """The numbers (4,) of a form fitted to `values` (n,) by robust least squares (soft L1); d is 0 without parameters.

    In a form with a cap, where few cells cannot separate b from the cap, b has a weak prior, PRIOR_B ± PRIOR_B_SCALE,
    and there are several starts, because the cost has more than one minimum.
    """
    from scipy.optimize import least_squares  # here: it takes longer than all of a --help

    free = [0, 1, *([2] if form != "power" else []), *([3] if log_parameters is not None else [])]
    size = np.zeros_like(values) if log_parameters is None else log_parameters
    prior = SCALE / PRIOR_B_SCALE if form in CAPPED else 0.0
    of_prior = prior * np.eye(len(free))[1]
    level = float(np.median(values - log_batch))
    caps = [*np.quantile(values, [0.4, 0.8]), values.max() + 0.7] if form in CAPPED else [0.5]
    found = []
    for cap in caps:
        first = np.array([level + 0.3, -0.5, cap, 0.0])

        def whole(x: Array, first: Array = first) -> Array:
            numbers = first.copy()
            numbers[free] = x
            return numbers

        fitted = least_squares(
            lambda x: np.append(log_lr(form, whole(x), log_tokens, log_batch, size) - values, (x[1] - PRIOR_B) * prior),
            first[free],
            jac=lambda x: np.vstack([_slopes(form, whole(x), log_tokens, log_batch, size)[:, free], of_prior]),
            loss="soft_l1",
            f_scale=SCALE,
        )
        found.append((float(fitted.cost), whole(fitted.x)))
    return min(found, key=lambda entry: entry[0])[1]


def solve_all(
    form: str,
    start: Array,
    log_tokens: Array,
    log_batch: Array,
    values: Array,
    log_parameters: Array | None,
    prior_b: Array,
) -> Array:
    """The same for each row of `values` (rows, n), of which a nan does not count, from the one `start` (4,): (rows, 4).

    Each row has a mean of b's prior, `prior_b` (rows,). The method is Levenberg-Marquardt's for all rows at once, which
    takes a fraction of the time that scipy takes for one after the other: a step that does not lower a row's cost is
    taken back, and tried again with more damping.
    """
    free = [0, 1, *([2] if form != "power" else []), *([3] if log_parameters is not None else [])]
    at = log_tokens, log_batch, np.zeros_like(log_tokens) if log_parameters is None else log_parameters
    counts = np.isfinite(values)
    targets = np.where(counts, values, 0.0)
    of_prior = 1 / PRIOR_B_SCALE if form in CAPPED else 0.0  # the slope of its residual

    def residuals(numbers: Array, rows: Rows) -> Array:
        """(rows, n + 1), in units of their scales; the last is the prior's."""
        off = counts[rows] * (log_lr(form, numbers, *at) - targets[rows]) / SCALE
        return np.concatenate([off, (numbers[:, 1:2] - prior_b[rows, None]) * of_prior], axis=1)

    def slopes(numbers: Array, rows: Rows) -> Array:
        """d residuals / d numbers, (rows, n + 1, 4)."""
        found = np.zeros((len(rows), len(log_tokens) + 1, 4))
        found[:, :-1] = _slopes(form, numbers, *at) * (counts[rows, :, None] / SCALE)
        found[:, -1, 1] = of_prior
        return found

    numbers, damping = np.tile(start, (len(values), 1)), np.full(len(values), LEAST_DAMPING)
    rows = np.arange(len(values))  # those that have not converged
    residual = residuals(numbers, rows)
    root = np.sqrt(1 + residual**2)
    costs = (residual**2 / (1 + root)).sum(axis=1)  # root - 1, without its rounding
    for _ in range(MOST_STEPS):
        by_number = slopes(numbers[rows], rows)[..., free]
        downhill = -((residual / root)[:, None] @ by_number)[:, 0]
        curvature = np.swapaxes(by_number / root[..., None] ** 3, 1, 2) @ by_number
        damped = curvature + damping[rows, None, None] * np.eye(len(free))
        step = np.linalg.solve(damped, downhill[..., None])[..., 0]
        tried = numbers[rows]
        tried[:, free] += step / np.maximum(1.0, np.abs(step).max(axis=1, keepdims=True))  # at most a factor e
        residual_there = residuals(tried, rows)
        root_there = np.sqrt(1 + residual_there**2)
        cost = (residual_there**2 / (1 + root_there)).sum(axis=1)
        gain = costs[rows] - cost
        better = gain > 0
        converged = better & (gain <= TOLERANCE * costs[rows])
        numbers[rows[better]] = tried[better]
        costs[rows[better]] = cost[better]
        residual[better], root[better] = residual_there[better], root_there[better]
        damping[rows] = np.where(better, np.maximum(damping[rows] / 10, LEAST_DAMPING), damping[rows] * 10)
        go_on = ~converged & (damping[rows] < MOST_DAMPING)
        rows, residual, root = rows[go_on], residual[go_on], root[go_on]
        if not rows.size:
            break
    return numbers
