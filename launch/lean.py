"""The lean sweep: which trials to run next, from what is known so far.

A whole grid spends most of its tokens where it learns least. This design asks, again and again, which cell (model, batch,
horizon) tells most about the law for the tokens that it takes, brackets the best learning rate there, and stops when no
cell that the budget allows would help. It is a pure function of the losses: the same ledger gives the same next trials.

What it believes is the smooth law (schedulers.law), whose three numbers begin with wide priors, and an offset of each
model; how sure it is follows from the slopes of the law at the cells that are bracketed (a linear Gaussian posterior).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.optimize import least_squares

Array = npt.NDArray[np.float64]
Place = tuple[str, float, int]  # model, batch in units of 4096 tokens, horizon in tokens

RATES = 4  # that a parabola takes, and a cell costs
SCATTER = 0.2  # of a log best learning rate around the law, until the cells tell
LEAST_SCATTER = 0.1
DRIFT = 0.1  # variance of the law's log learning rate a factor e of the horizon away: it holds only nearly
CURVATURE = 0.03  # nats: a loss lies so much times log(η / best)² above the least one, until the cells tell
OFFSET = 0.1  # of a model's log learning rate from the others': small under muP
PRIOR_B, PRIOR_B_SCALE = -0.5, 0.2
WORTH = 0.05  # a cell has to lower the regret to expect by this share of it
ENOUGH = 3e-4  # nats: less regret than any seed's noise


@dataclass(frozen=True)
class Step:
    """Trials to run now, as (cell, learning rate), and why these, or why there are none."""

    trials: tuple[tuple[Place, float], ...]
    reason: str


def next_step(
    grid: Mapping[Place, Sequence[float]],
    losses: Mapping[tuple[Place, float], float],
    target: tuple[float, float] | None = None,
    budget: float = math.inf,
    decay_fraction: float = 0.1,
) -> Step:
    """What to train next.

    Args:
        grid: the learning rates that may be trained in each cell.
        losses: of the trials that are done; inf where it diverged.
        target: (batch, tokens) that the law is for; None for all cells of the grid alike.
        budget: tokens that may be trained in all.
        decay_fraction: of a horizon; the part before is the trunk that longer horizons share.
    """
    spent = trained_tokens(losses, decay_fraction)
    belief = _Belief(grid, losses, target)
    for place in belief.begun:  # first what is begun
        if rates := bracket(grid[place], _own(losses, place), belief.predicted(place)):
            return _affordable(place, rates, losses, spent, budget, decay_fraction, "brackets the best learning rate")
    expected = belief.regret()
    best: tuple[float, Place] | None = None
    gain_of_any = 0.0
    for place in grid:
        if place in belief.closed:
            continue
        cost = _cost(place, losses, decay_fraction)
        gain = expected - belief.regret(place)
        if spent + cost > budget:
            continue
        gain_of_any = max(gain_of_any, gain)
        if best is None or gain / cost > best[0]:
            best = gain / cost, place
    if best is None:
        return Step((), f"no cell is left that {budget - spent:,.0f} tokens could bracket")
    if belief.points and (expected < ENOUGH or gain_of_any < WORTH * expected):
        return Step((), f"no cell would lower the regret to expect, {expected:.4f} nats, by as much as {WORTH:.0%}")
    place = best[1]
    if gain_of_any and belief.points:
        # Of the cells that help, the one that helps most for its tokens.
        helping = [
            (gain / _cost(p, losses, decay_fraction), p)
            for p in grid
            if p not in belief.closed
            and spent + _cost(p, losses, decay_fraction) <= budget
            and (gain := expected - belief.regret(p)) >= WORTH * expected
        ]
        place = max(helping)[1]
    rates = bracket(grid[place], {}, belief.predicted(place))
    return _affordable(place, rates, losses, spent, budget, decay_fraction, "tells most for its tokens")


def bracket(rates: Sequence[float], losses: Mapping[float, float], predicted: float) -> list[float]:
    """The learning rates that a cell lacks: around the prediction, then until the best one has neighbours and a parabola
    four points. Empty when it is bracketed, or when its best rate is an end of the grid."""
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


def _own(losses: Mapping[tuple[Place, float], float], place: Place) -> dict[float, float]:
    return {rate: loss for (cell, rate), loss in losses.items() if cell == place}


def _cost(place: Place, losses: Mapping[tuple[Place, float], float], decay_fraction: float) -> float:
    """Tokens to bracket a cell, which begins where shorter horizons of its trunks ended."""
    model, batch, tokens = place
    before = [t for (m, b, t), _ in losses if (m, b) == (model, batch) and t < tokens]
    # The best rate has fallen since: about one of the trunks that there are is too high to be of use.
    shared = (RATES - 1) * (1 - decay_fraction) * max(before, default=0)
    return RATES * tokens - shared


def _affordable(
    place: Place,
    rates: Sequence[float],
    losses: Mapping[tuple[Place, float], float],
    spent: float,
    budget: float,
    decay_fraction: float,
    reason: str,
) -> Step:
    trials = [(place, rate) for rate in rates]
    after = trained_tokens([*losses, *trials], decay_fraction)
    if after > budget:
        return Step((), f"the budget of {budget:,.0f} tokens is used up but for {budget - spent:,.0f}")
    model, batch, tokens = place
    return Step(tuple(trials), f"{model}, batch {batch:g}, {tokens:,} tokens {reason}")


class _Belief:
    """The smooth law as the bracketed cells have it, and how sure it is at the target."""

    def __init__(
        self,
        grid: Mapping[Place, Sequence[float]],
        losses: Mapping[tuple[Place, float], float],
        target: tuple[float, float] | None,
    ) -> None:
        self.models = list(dict.fromkeys(model for model, _, _ in grid))
        self._center = float(np.mean([math.log(tokens) for _, _, tokens in grid]))
        rates = [rate for values in grid.values() for rate in values]
        batches = [math.log(batch) for _, batch, _ in grid]
        middle = float(np.median(np.log(rates)))
        self._prior = np.array([middle + 0.7 - np.median(batches), PRIOR_B, math.log(max(rates)) - 0.7])
        self._prior_scale = np.array([1.5, PRIOR_B_SCALE, 1.0])
        self._targets = [(m, *target) for m in self.models] if target else list(grid)
        self.begun: list[Place] = []
        self.points: dict[Place, float] = {}  # bracketed cell → log best rate
        curvatures = []
        for place in grid:
            own = _own(losses, place)
            if not own:
                continue
            if bracket(grid[place], own, 1.0):
                self.begun.append(place)
            if (found := _minimum(own)) is not None:
                self.points[place] = found[0]
                curvatures.append(found[1])
        self.closed = {place for place in grid if _own(losses, place)} - set(self.begun)
        self._curvature = float(np.median(curvatures)) if curvatures else CURVATURE
        self._scatter = SCATTER
        self._numbers = self._solve()
        if len(self.points) > 5:
            residuals = [value - self._law(self._numbers, place) for place, value in self.points.items()]
            spread = math.sqrt(float(np.square(residuals).sum()) / (len(residuals) - 3))
            self._scatter = max(LEAST_SCATTER, spread)
            self._numbers = self._solve()
        prior = np.diag(1 / np.concatenate([self._prior_scale, np.full(len(self.models), OFFSET)]) ** 2)
        self._horizons = np.log(sorted({tokens for _, _, tokens in self._targets}))
        self._information = np.repeat(prior[None], len(self._horizons), axis=0)  # (horizons of the target, n, n)
        for place in self.points:
            self._information += self._told_by(place)
        self._at = [
            np.array([self._slope(place) for place in self._targets if math.log(place[2]) == horizon])
            for horizon in self._horizons
        ]

    def predicted(self, place: Place) -> float:
        """The best learning rate to expect in a cell."""
        return math.exp(self._law(self._numbers, place))

    def regret(self, also: Place | None = None) -> float:
        """Nats above the least loss to expect at the target, when the best rate of `also` is known, too."""
        information = self._information + (0.0 if also is None else self._told_by(also))
        variances = [
            np.einsum("ti,ij,tj->t", at, inverse, at)
            for at, inverse in zip(self._at, np.linalg.inv(information), strict=True)
        ]
        return self._curvature * float(np.concatenate(variances).mean())

    def _told_by(self, place: Place) -> Array:
        """What a cell tells about the law at each horizon of the target: less, the further it is away."""
        slope = self._slope(place)
        variance = self._scatter**2 + DRIFT * np.abs(self._horizons - math.log(place[2]))
        return np.asarray(np.outer(slope, slope) / variance[:, None, None])

    def _law(self, numbers: Array, place: tuple[str, float, float]) -> float:
        model, batch, tokens = place
        line = numbers[0] + numbers[1] * (math.log(tokens) - self._center) + math.log(batch)
        return float(-np.logaddexp(-line, -numbers[2]) + numbers[3 + self.models.index(model)])

    def _slope(self, place: tuple[str, float, float]) -> Array:
        model, batch, tokens = place
        since = math.log(tokens) - self._center
        line = self._numbers[0] + self._numbers[1] * since + math.log(batch)
        share = 1 / (1 + math.exp(min(700.0, line - self._numbers[2])))
        slope = np.zeros(3 + len(self.models))
        slope[:3] = share, share * since, 1 - share
        slope[3 + self.models.index(model)] = 1.0
        return slope

    def _solve(self) -> Array:
        start = np.concatenate([self._prior, np.zeros(len(self.models))])

        def residuals(numbers: Array) -> Array:
            prior = (numbers[:3] - self._prior) / self._prior_scale
            found = [(value - self._law(numbers, place)) / self._scatter for place, value in self.points.items()]
            return np.concatenate([prior, numbers[3:] / OFFSET, found])

        return np.asarray(least_squares(residuals, start).x)


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
