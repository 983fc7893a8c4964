"""The lean sweep: which trials to run next, given the losses so far.

A whole grid spends most of its tokens where they tell least. This design repeatedly selects the cell (model, batch,
horizon) that is most informative about the law for its tokens, brackets the best learning rate there, and stops when
no cell that the budget allows would help. The same losses give the same next trials.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from powertrain.schedulers.cells import Array
from powertrain.schedulers.forms import PRIOR_B, PRIOR_B_SCALE
from powertrain.schedulers.law import MIN_HORIZONS

Place = tuple[str, float, int]  # model, batch in units of 4096 tokens, horizon in tokens

RATES = 4  # learning rates that a parabola takes, and so a cell
SCATTER = 0.2  # standard deviation of the log best learning rate of a cell
DISCREPANCY = 0.2  # standard deviation of the law's own error, …
DISTANCE = 1.0  # … and its correlation length in log batch and log tokens
OFFSET = 0.1  # of a model's log learning rate from the others': small under muP
EDGE = 0.35  # the best of a cell whose lowest loss is at an end of its rates is taken to lie so far beyond it, in log …
EDGE_SCATTER = 0.5  # … with this standard deviation
CURVATURE = 0.03  # nats: a loss is this times log(η / best)² above the lowest one, until it is estimated from cells
PRIOR_SCALE = np.array([1.5, PRIOR_B_SCALE, 1.0])  # of log γ, b and log η_max
WORTH = 0.02  # a cell has to lower the expected regret by this share of it
ENOUGH = 3e-4  # nats: less regret than any seed's noise


@dataclass(frozen=True)
class Step:
    """Trials to run now, as (cell, learning rate), and the reason for them, or for there being none."""

    trials: tuple[tuple[Place, float], ...]
    reason: str


class Design:
    """A lean sweep's steps.

    Args:
        grid: the learning rates that may be trained in each cell.
        target: (batch, tokens) that the law is for; None for all cells of the grid alike.
        budget: tokens that may be trained in all.
        decay_fraction: of a horizon; the part before is the trunk that longer horizons share.
    """

    def __init__(
        self,
        grid: Mapping[Place, Sequence[float]],
        target: tuple[float, float] | None = None,
        budget: float = math.inf,
        decay_fraction: float = 0.1,
    ) -> None:
        self.grid, self.target, self.budget, self.decay_fraction = grid, target, budget, decay_fraction
        self.losses: dict[tuple[Place, float], float] = {}  # of the steps that are complete
        self.step = self._next()

    @property
    def asked(self) -> set[tuple[Place, float]]:
        """All trials of the steps so far."""
        return {*self.losses, *self.step.trials}

    @property
    def trained(self) -> float:
        """Tokens that the complete steps took."""
        return trained_tokens(self.losses, self.decay_fraction)

    def advance(self, losses: Mapping[tuple[Place, float], float]) -> None:
        """Take the next steps while all trials of the current one are known (inf where one diverged).

        A step is taken as a whole, so neither the order in which its trials end nor a kill changes what comes next.
        """
        while self.step.trials and all(trial in losses for trial in self.step.trials):
            self.losses.update({trial: losses[trial] for trial in self.step.trials})
            self.step = self._next()

    def _next(self) -> Step:
        belief = _Belief(self.grid, self.losses, self.target)
        for place in belief.begun:  # first what is begun
            if rates := bracket(self.grid[place], belief.losses[place], belief.predicted(place)):
                return self._affordable(place, rates, "is to be bracketed")
        best: tuple[float, Place] | None = None
        affordable = False
        left = self.budget - self.trained
        # While a fit lacks cells, no token is spent on one that would leave too few for them.
        outside = {place for place in self.grid if not belief.within(place)} - belief.closed
        closed = belief.closed | outside
        reserved = 0 < self.of_a_law(belief.points, closed) <= left
        for place in self.grid:
            cost = self._cost(place)
            if place in closed or cost > left:
                continue
            if reserved and cost + self.of_a_law([*belief.points, place], closed) > left:
                continue
            affordable = True
            helps = belief.regret > ENOUGH and belief.gain(place) >= WORTH * belief.regret
            if helps or lacks(belief.points, place):
                best = max(best or (0.0, place), (belief.gain(place) / cost, place))
        if best is not None:
            place = best[1]
            rates = bracket(self.grid[place], {}, belief.predicted(place))
            return self._affordable(place, rates, "is the most informative for its tokens")
        reason = "All cells are trained."
        if affordable:
            reason = f"No cell would lower the expected regret, {belief.regret:.4f} nats, by {WORTH:.0%} of it."
        elif outside:
            reason = "All other cells are trained."
        elif left < math.inf:
            reason = f"No cell is left that could be bracketed with {left:,.0f} tokens."
        if any(lacks(belief.points, place) for place in self.grid):
            reason += f" That is too little for a law, which takes two batches and {MIN_HORIZONS} horizons."
        if missing := sum(place not in belief.points for place in belief.closed):
            reason += (
                f" {missing} of the {len(belief.closed)} trained cells have no best learning rate inside the grid: "
                "powertrain fit tells which learning rates to add."
            )
        if outside:
            above = sum(belief.predicted(place) > max(self.grid[place]) for place in outside)
            ends = [*["higher"] * (above > 0), *["lower"] * (above < len(outside))]
            reason += (
                f" {len(outside)} of the {len(self.grid)} cells are not trained, since their best learning rate is "
                f"expected outside the grid: add {' and '.join(ends)} learning rates."
            )
        return Step((), reason)

    def of_a_law(self, known: Iterable[Place] = (), closed: Collection[Place] = ()) -> float:
        """Tokens to bracket what a fit needs besides the `known` cells, the cheapest first, none of the `closed`."""
        places, total = list(known), 0.0
        while open_ := [place for place in self.grid if place not in closed and lacks(places, place)]:
            cost, place = min((self._cost(place, places), place) for place in open_)
            places.append(place)
            total += cost
        return total

    def _affordable(self, place: Place, rates: Sequence[float], reason: str) -> Step:
        trials = tuple((place, rate) for rate in rates)
        if trained_tokens([*self.losses, *trials], self.decay_fraction) > self.budget:
            return Step((), f"The next trials would need more than the {self.budget - self.trained:,.0f} tokens left.")
        model, batch, tokens = place
        return Step(trials, f"{model}, batch {batch:g}, {tokens:,} tokens {reason}.")

    def _cost(self, place: Place, others: Iterable[Place] = ()) -> float:
        """Tokens to bracket a cell, which begins where shorter horizons of its trunks ended, also those of `others`."""
        model, batch, tokens = place
        trained = (*(place for place, _ in self.losses), *others)
        before = [t for m, b, t in trained if (m, b) == (model, batch) and t < tokens]
        # The best learning rate has fallen since, so about one of the existing trunks is too high to be of use.
        return RATES * tokens - (RATES - 1) * (1 - self.decay_fraction) * max(before, default=0)


def lacks(known: Iterable[Place], place: Place) -> bool:
    """Whether a fit to the `known` cells, which takes several horizons and batches, lacks one and this cell has it."""
    horizons, batches = {tokens for _, _, tokens in known}, {batch for _, batch, _ in known}
    return (len(horizons) < MIN_HORIZONS and place[2] not in horizons) or (len(batches) < 2 and place[1] not in batches)


def bracket(rates: Sequence[float], losses: Mapping[float, float], predicted: float) -> list[float]:
    """The learning rates that a cell still needs: around the prediction, then until the best one has neighbours.

    A parabola takes a fourth. Empty when the cell is bracketed, or when its best learning rate is an end of the grid.
    """
    ladder = sorted(rates)
    if not losses:
        middle = min(range(len(ladder)), key=lambda i: abs(math.log(ladder[i] / predicted)))
        middle = min(max(middle, 1), max(1, len(ladder) - 2))
        return ladder[max(0, middle - 1) : middle + 2]
    best = ladder.index(min(losses, key=lambda rate: losses[rate]))
    beside = [ladder[i] for i in (best - 1, best + 1) if 0 <= i < len(ladder) and ladder[i] not in losses]
    if beside or len(losses) >= min(RATES, len(ladder)) or best in (0, len(ladder) - 1):
        return beside
    lower = losses[ladder[best - 1]] <= losses[ladder[best + 1]]
    for i in (best - 2, best + 2) if lower else (best + 2, best - 2):
        if 0 <= i < len(ladder) and ladder[i] not in losses:
            return [ladder[i]]
    return []


def trained_tokens(losses: Iterable[tuple[Place, float]], decay_fraction: float) -> float:
    """Tokens that these trials take when horizons share trunks."""
    trunks: dict[tuple[str, float, float], list[int]] = {}
    for (model, batch, tokens), rate in losses:
        trunks.setdefault((model, batch, rate), []).append(tokens)
    total = 0.0
    for horizons in trunks.values():
        ordered = sorted(horizons)
        total += sum(ordered) - (1 - decay_fraction) * sum(ordered[:-1])
    return total


class _Belief:
    """Log of the best learning rate of every cell: the smooth law, its possible error, and the uncertainty of both.

    A Gaussian process. Its mean is the smooth law, whose three parameters have wide priors; around it each model has an
    offset, and the law itself an error that is correlated between nearby cells. A cell therefore tells less about
    others the further away they are, and two that are close tell hardly more than one.
    """

    def __init__(
        self,
        grid: Mapping[Place, Sequence[float]],
        losses: Mapping[tuple[Place, float], float],
        target: tuple[float, float] | None,
    ) -> None:
        from scipy.optimize import least_squares  # here: it takes longer than all of a --help

        own: dict[Place, dict[float, float]] = {}
        for (place, rate), loss in losses.items():
            own.setdefault(place, {})[rate] = loss
        self.losses = own
        self.begun = [place for place in grid if place in own and bracket(grid[place], own[place], 1.0)]
        self.closed = set(own) - set(self.begun)
        found = {place: minimum for place, rates in own.items() if (minimum := _minimum(rates)) is not None}
        self.points = {place: log_lr for place, (log_lr, _) in found.items()}
        ends = {place: end for place in self.closed - set(self.points) if (end := _beyond(own[place])) is not None}
        curvatures = [curvature for _, curvature in found.values()]
        self._curvature = float(np.median(curvatures)) if curvatures else CURVATURE

        self._grid, self._places = grid, list(grid)
        models = list(dict.fromkeys(model for model, _, _ in self._places))
        targets = [(model, *target) for model in models] if target else list(grid)
        everything = [*self._places, *targets]
        model = np.array([models.index(name) for name, _, _ in everything])
        x = np.log([place[1:] for place in everything])  # (n, 2): log batch, log tokens
        x[:, 1] -= x[: len(grid), 1].mean()
        rates = np.log([rate for values in grid.values() for rate in values])
        prior = np.array([np.median(rates) + 0.7 - np.median(x[: len(grid), 0]), PRIOR_B, rates.max() - 0.7])
        known = [self._places.index(place) for place in (*self.points, *ends)]
        values = np.array([*self.points.values(), *ends.values()])
        scatter = np.repeat([SCATTER, EDGE_SCATTER], [len(self.points), len(ends)])

        def law(numbers: Array) -> tuple[Array, Array]:
            line = numbers[0] + numbers[1] * x[:, 1] + x[:, 0]
            share = 1 / (1 + np.exp(np.clip(line - numbers[2], -700, 700)))
            return -np.logaddexp(-line, -numbers[2]), np.stack([share, share * x[:, 1], 1 - share], axis=1)

        def residuals(numbers: Array) -> Array:
            return np.concatenate([(numbers - prior) / PRIOR_SCALE, (values - law(numbers)[0][known]) / scatter])

        numbers = least_squares(residuals, prior).x
        mean, slopes = law(numbers)
        mean = mean + slopes @ (prior - numbers)  # linear in the numbers, from their prior on
        apart = ((x[:, None] - x[None]) ** 2).sum(axis=2) / DISTANCE**2
        covariance = (
            (slopes * PRIOR_SCALE**2) @ slopes.T
            + OFFSET**2 * (model[:, None] == model[None])
            + DISCREPANCY**2 * np.exp(-apart / 2)
        )
        if known:
            gain = covariance[:, known] @ np.linalg.inv(covariance[np.ix_(known, known)] + np.diag(scatter**2))
            mean = mean + gain @ (values - mean[known])
            covariance = covariance - gain @ covariance[known]
        self._mean = mean
        to_targets = covariance[: len(self._places), len(self._places) :]
        variance = np.diag(covariance)
        self.regret = self._curvature * float(variance[len(self._places) :].mean())
        self._gains = self._curvature * (to_targets**2).mean(axis=1) / (variance[: len(self._places)] + SCATTER**2)

    def predicted(self, place: Place) -> float:
        """The expected best learning rate of a cell."""
        return math.exp(float(self._mean[self._places.index(place)]))

    def within(self, place: Place) -> bool:
        """Whether that is expected within the learning rates of the cell's grid, as it is until a cell is trained."""
        return not self.closed or min(self._grid[place]) <= self.predicted(place) <= max(self._grid[place])

    def gain(self, place: Place) -> float:
        """By how many nats the expected regret at the targets falls when a cell's best learning rate is known, too."""
        return float(self._gains[self._places.index(place)])


def _beyond(losses: Mapping[float, float]) -> float | None:
    """Log of the best learning rate of a cell whose lowest loss is at an end of its rates; None where it is at none."""
    finite = sorted(rate for rate, loss in losses.items() if math.isfinite(loss))
    best = min(losses, key=lambda rate: losses[rate])
    if not finite or best not in (finite[0], finite[-1]):
        return None
    return math.log(best) + (EDGE if best == finite[-1] else -EDGE)


def _minimum(losses: Mapping[float, float]) -> tuple[float, float] | None:
    """Log of the best learning rate and the curvature there, by the parabola through the best four; None without an
    inner minimum."""
    finite = sorted((rate, loss) for rate, loss in losses.items() if math.isfinite(loss))
    if len(finite) < 3:
        return None
    best = min(range(len(finite)), key=lambda i: finite[i][1])
    if best in (0, len(finite) - 1):
        return None
    nearest = sorted(finite, key=lambda point: abs(math.log(point[0] / finite[best][0])))[: RATES + 1]
    near = sorted(nearest, key=lambda point: point[1])[:RATES]
    x = np.log([rate for rate, _ in near])
    square, slope, _ = np.polyfit(x - x.mean(), [loss for _, loss in near], 2)
    if square <= 0:
        return None
    return float(np.clip(x.mean() - slope / (2 * square), x.min(), x.max())), float(square)
