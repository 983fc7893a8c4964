"""The law of the best learning rate, fitted to a sweep: eta = a · batch^c · tokens^b.

Two readings of one ledger. The paper's (arXiv 2408.13359, section 3) takes eta to be proportional to the batch, c = 1:
of every horizon the three best batches, their gamma = eta / batch averaged, and a line through log gamma over log
tokens. The other fits c together with a and b to all batches. Batches are in units of 4096 tokens.

Intervals are 95% ones from replicates of the whole fit, choice of batches included. In a replicate each trunk, the
run that all horizons of a (size, batch, rate, seed) share, gets noise as large as the ledger shows it, partly common to
its horizons; the best rates scatter around the law by as much as they do beyond that noise; and all of them may be off
by half of what the shape of the losses has moved them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Size = tuple[str, int]  # family, hidden_size

SAME_HORIZON = 1.03  # horizons within this factor are one, rounded to whole steps of several batches
MOST = 1e18  # of any number in a ledger
NEEDED = ("hidden_size", "batch", "lr", "tokens", "loss")
WINDOW = math.log(8) / 2  # rates within this factor of the best one, or the four nearest, make the parabola
MOST_LOPSIDED = 0.3  # beyond it the losses would turn down again within the window
BEST_BATCHES = 3
MIN_HORIZONS = 3
REPLICATES = 1000
PERCENTILES = (2.5, 97.5)


@dataclass(frozen=True)
class Cell:
    """One (size, horizon, batch): losses over rates, and the minimum of the parabola through those near the best.

    flag: "" when `lr` is well determined, else why it is not used ("edge low", "edge high", "diverges above",
    "no minimum", "too few rates") or, for "three rates", why it should be trusted less.
    """

    size: Size
    tokens: int
    batch: float
    rates: tuple[float, ...]
    losses: tuple[float, ...]  # inf where it diverged
    lr: float  # nan when there is no minimum
    loss: float  # at `lr`, by the parabola
    flag: str

    @property
    def usable(self) -> bool:
        return self.flag in ("", "three rates")


@dataclass(frozen=True)
class Estimate:
    """A value and its 95% interval."""

    value: float
    low: float
    high: float

    def contains(self, value: float) -> bool:
        """Whether `value` lies in the interval."""
        return self.low <= value <= self.high

    def __str__(self) -> str:
        return f"{self.value:.4g} [{self.low:.4g}, {self.high:.4g}]"


@dataclass(frozen=True)
class Reading:
    """eta = a · batch^c · tokens^b, as one way of fitting gives it.

    replicates: (1 + 2R, 3) of (log gamma at `central_tokens`, b, c): the estimate, R replicates, and these reflected at
    the estimate, since by as much as noise moves a replicate off the estimate it may have moved the estimate off the
    truth. An interval holds both. residual: standard deviation of the log rates (of log gamma in the paper's reading)
    around the law.
    """

    central_tokens: float
    replicates: Array
    residual: float

    def _estimate(self, values: Array) -> Estimate:
        low, high = np.nanpercentile(values[1:].reshape(2, -1), PERCENTILES, axis=1)
        return Estimate(float(values[0]), float(low.min()), float(high.max()))

    @property
    def a(self) -> Estimate:
        """Rate of a batch of 1 at one token: far outside any sweep, so its interval is wide; see `gamma`."""
        return self._estimate(np.exp(self.replicates[:, 0] - self.replicates[:, 1] * math.log(self.central_tokens)))

    @property
    def b(self) -> Estimate:
        return self._estimate(self.replicates[:, 1])

    @property
    def c(self) -> Estimate:
        return self._estimate(self.replicates[:, 2])

    @property
    def gamma(self) -> Estimate:
        """Rate of a batch of 1 at the central horizon, where the sweep knows it best."""
        return self._estimate(np.exp(self.replicates[:, 0]))

    def lr(self, batch: float, tokens: float) -> Estimate:
        """The best rate, with the interval that a, b and c have together."""
        at = np.array([1.0, math.log(tokens / self.central_tokens), math.log(batch)])
        return self._estimate(np.exp(self.replicates @ at))


@dataclass(frozen=True)
class Law:
    """What a ledger says.

    paper, sizes: the paper's reading, pooled and by size. plane: a, b and c through all batches. noise: standard
    deviation of a loss, by (size, horizon). shared: the part of its variance that the horizons of a trunk share.
    notes: what a reader has to know of the law, in sentences; flags: of the best rates that it comes from.
    """

    cells: tuple[Cell, ...]
    best: tuple[Cell, ...]  # those in the paper's reading
    paper: Reading
    sizes: Mapping[Size, Reading]
    plane: Reading
    noise: Mapping[tuple[Size, int], float]
    shared: float
    notes: tuple[str, ...]
    flags: tuple[str, ...]

    @property
    def proportional(self) -> bool:
        """Whether the interval of c contains 1, the paper's hypothesis."""
        return self.plane.c.contains(1.0)

    @property
    def chosen(self) -> Reading:
        """The paper's reading where the rate is proportional to the batch, else the plane."""
        return self.paper if self.proportional else self.plane

    def outside(self, batch: float, tokens: float) -> list[str]:
        """Which of these lie outside what was swept, and by how much."""
        out = []
        for name, value, swept in (
            ("batch", batch, [cell.batch for cell in self.cells if cell.usable]),
            ("tokens", tokens, [cell.tokens for cell in self.cells if cell.usable]),
        ):
            low, high = min(swept), max(swept)
            if not low <= value <= high:
                factor = value / high if value > high else low / value
                out.append(
                    f"{name} {value:,g} lies outside the swept {low:,g} to {high:,g}, by a factor of {factor:,.3g}"
                )
        return out


def fit(ledger: Iterable[Mapping[str, Any]], replicates: int = REPLICATES, seed: int = 0) -> Law:
    """Fit both readings to the trials of a ledger that have an `lr`.

    Args:
        ledger: hidden_size, batch, lr, tokens and loss (None when it diverged) of each trial; family, seed and
            schedule are used when they are there.
        replicates: how many times the fit is repeated for the intervals, one or more.

    Raises:
        ValueError: too little to fit, with what is missing.
    """
    trials = _Trials(ledger)
    draws = np.random.default_rng(seed)

    if not trials.cells:
        others = f" (its schedules: {', '.join(trials.others)})" if trials.others else ""
        raise ValueError(
            f"There is no trial of the schedule 'wsd' with a rate `lr`{others}, so there is nothing to fit."
        )
    fitted, moved = _parabolas(trials, np.zeros((1, len(trials.groups), trials.trunks)))
    cells = tuple(_cell(trials, index, parabola) for index, parabola in enumerate(fitted))
    _refuse(cells)
    sigma, shared = _noise(trials, fitted)

    # ---- replicates: everything again, with each trunk's noise drawn anew; row 0 is the ledger as it is
    repeated, _ = _parabolas(trials, trials.noise(sigma, shared, replicates, draws))
    log_lr = np.stack([p.log_lr for p in repeated], axis=1)  # (R, cells)
    best_loss = np.stack([p.loss for p in repeated], axis=1)
    usable = np.stack([p.usable for p in repeated], axis=1)

    log_tokens = np.log([cell.tokens for cell in cells])
    log_batch = np.log([cell.batch for cell in cells])
    center = float(log_tokens[usable[0]].mean())
    design = np.stack([np.ones(len(cells)), log_tokens - center, log_batch], axis=1)
    coefficients = _least_squares(design, log_lr, usable)
    residuals = (log_lr[0] - design @ coefficients[0])[usable[0]]
    freedom = max(1, len(residuals) - 3)
    kept = usable[0]
    by_noise = np.nanvar(np.where(usable, log_lr, np.nan)[:, kept], axis=0).mean()
    misfit = math.sqrt(max(0.0, float(residuals @ residuals) / freedom - float(by_noise)))
    # How lopsided losses are is known roughly: half of what it moved the best rates by is an error of all of them.
    scatter = draws.normal(0, misfit, (replicates, len(cells))) + draws.normal(0, abs(moved) / 2, (replicates, 1))
    log_lr = log_lr + np.vstack([np.zeros((1, len(cells))), scatter])
    plane = Reading(
        math.exp(center),
        _reflected(_least_squares(design, log_lr, usable)),
        float(np.sqrt(residuals @ residuals / freedom)),
    )

    # ---- the paper's reading
    gammas, points, best = _best_batches(cells, log_lr - log_batch, best_loss, usable)
    sizes = {size: _line(gammas, points, center, {size}) for size in dict.fromkeys(cell.size for cell in cells)}
    pooled = _line(gammas, points, center, set(sizes))
    if pooled is None:
        raise ValueError(_missing(cells))
    readings = {size: line for size, line in sizes.items() if line is not None}
    return Law(
        cells,
        best,
        pooled,
        readings,
        plane,
        sigma,
        shared,
        (*_agreement(readings), _proportionality(plane, pooled)),
        tuple(_flags(cells)),
    )


def expected_error(
    ledger: Iterable[Mapping[str, Any]], planned: Iterable[tuple[int, float]]
) -> tuple[float, float, float]:
    """What a sweep will know, from the shortest horizon of it: (noise of a loss, error of a log rate, error of b).

    Standard errors, by the curvature and the noise of what is there, as if they were the same at all horizons, and as
    if the law held exactly.

    Args:
        ledger: the trials of a pilot.
        planned: tokens and batch of each best rate that the whole sweep will give.

    Raises:
        ValueError: there is no best rate inside the grid of rates yet.
    """
    trials = _Trials(ledger)
    fitted, _ = _parabolas(trials, np.zeros((1, len(trials.groups), trials.trunks)))
    usable = [(p, trials.log_rates(index)) for index, p in enumerate(fitted) if p.usable[0] and len(p.residuals) > 3]
    if not usable:
        raise ValueError("no batch has its best rate inside the grid, with two rates on one side and one on the other.")
    sigma = math.sqrt(float(np.mean([s * s for s in _noise(trials, fitted)[0].values()])))
    errors = []
    for p, x in usable:
        window = x[p.first : p.first + len(p.residuals)]
        # d(minimum) / d(loss i) = u_i / (2 · curvature · Σ u²), to first order for a minimum in the middle
        errors.append(sigma / (2 * p.curvature[0] * math.sqrt(float(((window - window.mean()) ** 2).sum()))))
    error = float(np.median(errors))
    points = np.array([(1.0, math.log(tokens), math.log(batch)) for tokens, batch in planned])
    return sigma, error, error * math.sqrt(float(np.linalg.pinv(points.T @ points)[1, 1]))


# ----------------------------------------------------------------------------------------------------- the ledger


def _read(number: int, line: Mapping[str, Any]) -> tuple[Size, int, float, float, str, float]:
    """(size, tokens, batch, rate, seed, loss) of a line of the ledger; the loss is inf where it diverged."""
    if lacking := [name for name in NEEDED if name not in line]:
        raise ValueError(f"Line {number} of the ledger has no {', '.join(lacking)}; a fit needs {', '.join(NEEDED)}.")
    for name in ("hidden_size", "batch", "lr", "tokens", "loss"):
        value = line[name]
        if name == "loss" and (value is None or value in (math.inf, math.nan) or value != value):
            continue
        number_given = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number_given or not (-MOST if name == "loss" else 0) < value < MOST:
            limits = f"a number {f'between -{MOST:g} and' if name == 'loss' else 'above 0 and below'} {MOST:g}"
            raise ValueError(f"Line {number} of the ledger has {name} {str(value)[:40]}; it has to be {limits}.")
    loss = line["loss"]
    return (
        (str(line.get("family", "")), int(line["hidden_size"])),
        int(line["tokens"]),
        float(line["batch"]),
        float(line["lr"]),
        str(line.get("seed", 0)),
        float(loss) if loss is not None and math.isfinite(loss) else math.inf,
    )


def _horizons(tokens: set[int]) -> dict[int, int]:
    """Each number of tokens → the least one that is the same horizon."""
    same: dict[int, int] = {}
    for value in sorted(tokens):
        last = next(reversed(same.values()), 0)
        same[value] = last if last and value <= SAME_HORIZON * last else value
    return same


class _Trials:
    """A ledger as arrays: a trunk is (size, batch, rate, seed), a cell (size, tokens, batch)."""

    def __init__(self, ledger: Iterable[Mapping[str, Any]]) -> None:
        self.losses: dict[tuple[Size, int, float], dict[float, list[tuple[int, float]]]] = {}
        trunks: dict[tuple[Any, ...], int] = {}
        lines = [(number, line) for number, line in enumerate(ledger, 1) if line.get("lr") is not None]
        self.others = sorted({str(line["schedule"]) for _, line in lines if line.get("schedule", "wsd") != "wsd"})
        read = [_read(number, line) for number, line in lines if line.get("schedule", "wsd") == "wsd"]
        horizon = _horizons({tokens for _, tokens, _, _, _, _ in read})
        for size, own_tokens, batch, rate, seed, loss in read:
            trunk = trunks.setdefault((size, batch, rate, seed), len(trunks))
            cell = self.losses.setdefault((size, horizon[own_tokens], batch), {})
            cell[rate] = [*{**dict(cell.get(rate, [])), trunk: loss}.items()]  # of a trial given twice, the later line
        self.trunks = len(trunks)
        self.cells = sorted(self.losses)
        self.groups = list(dict.fromkeys((size, tokens) for size, tokens, _ in self.cells))

    def rates(self, cell: int) -> list[float]:
        return sorted(self.losses[self.cells[cell]])

    def log_rates(self, cell: int) -> Array:
        return np.log(self.rates(cell))

    def cell_losses(self, cell: int) -> Array:
        """(1, rates): the mean over seeds."""
        by_rate = self.losses[self.cells[cell]]
        return np.array([[np.mean([loss for _, loss in by_rate[rate]]) for rate in self.rates(cell)]])

    def noise(self, sigma: Mapping[Any, float], shared: float, replicates: int, draws: np.random.Generator) -> Array:
        """(1 + R, groups, trunks) with zeros first."""
        common = draws.normal(size=(replicates, 1, self.trunks)) * math.sqrt(shared)
        own = draws.normal(size=(replicates, len(self.groups), self.trunks)) * math.sqrt(1 - shared)
        scale = np.array([sigma[group] for group in self.groups])[None, :, None]
        return np.concatenate([np.zeros((1, len(self.groups), self.trunks)), (common + own) * scale])

    def in_cell(self, noise: Array, cell: int) -> Array:
        """(1 + R, rates): the mean of the noise over seeds."""
        size, tokens, _ = self.cells[cell]
        group, by_rate = self.groups.index((size, tokens)), self.losses[self.cells[cell]]
        return np.stack(
            [noise[:, group, [trunk for trunk, _ in by_rate[rate]]].mean(1) for rate in self.rates(cell)], axis=1
        )


# --------------------------------------------------------------------------------------------------- the parabola


@dataclass
class _Parabola:
    """Of each row of losses: the minimum (log_lr, loss), the curvature, and the cubic term beside it; of row 0: the
    first rate of the window, the residuals in it and the flag."""

    log_lr: Array  # (R,)
    loss: Array
    curvature: Array
    cubic: Array  # 0 with fewer than four rates
    usable: npt.NDArray[np.bool_]
    first: int
    residuals: Array
    flag: str


def _parabolas(trials: _Trials, noise: Array) -> tuple[list[_Parabola], float]:
    """One for each cell, with noise (R, groups, trunks) on the losses.

    Losses rise faster above the best rate than below it, and a parabola's minimum then lies beside theirs. How
    lopsided they are, the cubic term over the quadratic one, is taken to be the same in all cells, since a single one
    cannot tell it from noise.

    Returns:
        The parabolas, and by how much the lopsidedness moved the log of the best rates, on average.
    """
    losses = [trials.cell_losses(cell) + trials.in_cell(noise, cell) for cell in range(len(trials.cells))]
    plain = [_parabola(trials.log_rates(cell), y, np.zeros(len(y))) for cell, y in enumerate(losses)]
    product = square = np.zeros(len(noise))
    for p in plain:
        there = p.usable & (p.cubic != 0)
        product = product + np.where(there, p.cubic * p.curvature, 0.0)
        square = square + np.where(there, p.curvature**2, 0.0)
    lopsided = np.clip(product / np.where(square > 0, square, 1.0), -MOST_LOPSIDED, MOST_LOPSIDED)
    bent = [_parabola(trials.log_rates(cell), y, lopsided) for cell, y in enumerate(losses)]
    moves = [b.log_lr[0] - p.log_lr[0] for b, p in zip(bent, plain, strict=True) if b.usable[0] and p.usable[0]]
    return bent, float(np.mean(moves)) if moves else 0.0


def _parabola(log_rates: Array, losses: Array, lopsided: Array) -> _Parabola:
    """The minimum of curvature · (d² + lopsided · d³), d the distance from it, through the rates near the best one."""
    finite = np.isfinite(losses[0])
    diverges_above = not finite.all() and bool(finite.any()) and not finite[np.flatnonzero(finite)[-1] :].all()
    x, y = log_rates[finite], losses[:, finite]
    rows, count = y.shape
    log_lr, loss, curvature = (np.full(rows, np.nan) for _ in range(3))
    cubic = np.zeros(rows)
    if count < 3:
        return _Parabola(log_lr, loss, curvature, cubic, np.zeros(rows, bool), 0, np.zeros(0), "too few rates")

    # ---- the window of each row: rates within a factor of the best one, and the better neighbours up to four
    best = y.argmin(axis=1)
    first = np.searchsorted(x, x[best] - WINDOW - 1e-9)
    last = np.searchsorted(x, x[best] + WINDOW + 1e-9) - 1
    padded, row = np.pad(y, ((0, 0), (1, 1)), constant_values=np.inf), np.arange(rows)
    for _ in range(3):
        short = last - first + 1 < min(4, count)
        left = padded[row, first] <= padded[row, last + 2]  # the losses beside the window
        first, last = np.where(short & left, first - 1, first), np.where(short & ~left, last + 1, last)

    residuals = np.zeros(0)
    for begin, end in sorted({(int(f), int(e)) for f, e in zip(first, last, strict=True)}):
        chosen = (first == begin) & (last == end)
        u, v, skew = x[begin : end + 1] - x[begin : end + 1].mean(), y[chosen, begin : end + 1], lopsided[chosen, None]
        square = np.vander(u, 3)  # u², u, 1
        invert = np.linalg.pinv(square).T
        fitted = v @ invert
        if len(u) > 3:
            cubic[chosen] = v @ np.linalg.pinv(np.vander(u, 4)).T[:, 0]
        bent = np.zeros_like(v)
        for _ in range(4):  # the cubic part around the minimum so far is taken off, and the rest is a parabola
            with np.errstate(divide="ignore", invalid="ignore"):
                minimum = -fitted[:, 1:2] / (2 * fitted[:, 0:1])
                bent = np.nan_to_num(skew * np.maximum(fitted[:, 0:1], 0.0) * (u - minimum) ** 3, posinf=0, neginf=0)
            bent = np.where(np.abs(minimum) <= 2 * np.abs(u).max(), bent, 0.0)
            fitted = (v - bent) @ invert
        with np.errstate(divide="ignore", invalid="ignore"):
            shift = -fitted[:, 1] / (2 * fitted[:, 0])
        log_lr[chosen] = x[begin : end + 1].mean() + shift
        loss[chosen] = fitted[:, 2] + fitted[:, 1] * shift / 2
        curvature[chosen] = fitted[:, 0]
        if chosen[0]:
            residuals = v[0] - bent[0] - square @ fitted[0]

    inside = (curvature > 0) & (log_lr >= x[first]) & (log_lr <= x[last])
    flag = ""
    if best[0] == count - 1:
        flag = "diverges above" if diverges_above else "edge high"
    elif best[0] == 0:
        flag = "edge low"
    elif not inside[0]:
        flag = "no minimum"
    elif last[0] - first[0] + 1 < 4:
        flag = "three rates"
    usable = (best > 0) & (best < count - 1) & inside
    return _Parabola(log_lr, loss, curvature, cubic, usable, int(np.flatnonzero(finite)[first[0]]), residuals, flag)


def _cell(trials: _Trials, index: int, fitted: _Parabola) -> Cell:
    size, tokens, batch = trials.cells[index]
    losses = trials.cell_losses(index)[0]
    return Cell(
        size,
        tokens,
        batch,
        tuple(trials.rates(index)),
        tuple(losses.tolist()),
        float(np.exp(fitted.log_lr[0])),
        float(fitted.loss[0]),
        fitted.flag,
    )


def _noise(trials: _Trials, fitted: list[_Parabola]) -> tuple[dict[Any, float], float]:
    """Standard deviation of a loss by (size, tokens), and the share of its variance that a trunk's horizons share.

    From what the parabolas leave over, and from trials that differ in their seed alone.
    """
    squares, freedom = dict.fromkeys(trials.groups, 0.0), dict.fromkeys(trials.groups, 0.0)
    left: dict[tuple[Any, ...], dict[tuple[Size, int], float]] = {}  # trunk or (rate of a cell) → group → residual
    for index, parabola in enumerate(fitted):
        size, tokens, batch = trials.cells[index]
        rates, by_rate = trials.rates(index), trials.losses[trials.cells[index]]
        if len(parabola.residuals) > 3:
            squares[size, tokens] += float(parabola.residuals @ parabola.residuals)
            freedom[size, tokens] += len(parabola.residuals) - 3
            for offset, residual in enumerate(parabola.residuals):
                left.setdefault((size, batch, rates[parabola.first + offset]), {})[size, tokens] = float(residual)
        for entries in by_rate.values():
            values = np.array([loss for _, loss in entries])
            if len(values) > 1 and np.isfinite(values).all():
                squares[size, tokens] += float(((values - values.mean()) ** 2).sum())
                freedom[size, tokens] += len(values) - 1
                for (trunk, _), value in zip(entries, values - values.mean(), strict=True):
                    left.setdefault((trunk,), {})[size, tokens] = float(value)
    total = sum(squares.values()) / max(1.0, sum(freedom.values()))
    # A horizon with few degrees of freedom borrows two from all the others.
    sigma = {group: math.sqrt((squares[group] + 2 * total) / (freedom[group] + 2)) for group in trials.groups}
    product = square = 0.0
    for by_group in left.values():  # of one size, so that sorted groups are sorted horizons
        for one, next_one in itertools.pairwise(sorted(by_group)):
            u, v = by_group[one] / (sigma[one] or 1.0), by_group[next_one] / (sigma[next_one] or 1.0)
            product += u * v
            square += (u * u + v * v) / 2
    return sigma, min(1.0, max(0.0, product / square)) if square else 0.0


# -------------------------------------------------------------------------------------------------------- the fits


def _least_squares(design: Array, values: Array, weights: npt.NDArray[np.bool_]) -> Array:
    """Coefficients (R, p) of each row of values (R, n) on design (n, p), through the points that have weight."""
    w = weights.astype(float)
    normal = np.einsum("np,rn,nq->rpq", design, w, design)
    right = np.einsum("np,rn->rp", design, w * np.where(weights, values, 0.0))
    return np.asarray(np.einsum("rpq,rq->rp", np.linalg.pinv(normal, hermitian=True), right))


def _reflected(coefficients: Array) -> Array:
    return np.vstack([coefficients, 2 * coefficients[0] - coefficients[1:]])


def _best_batches(
    cells: tuple[Cell, ...], log_gamma: Array, best_loss: Array, usable: npt.NDArray[np.bool_]
) -> tuple[Array, list[tuple[Size, int]], tuple[Cell, ...]]:
    """Log of the mean gamma of the three best batches of each (size, horizon): (R, points), NaN with fewer than two."""
    points = list(dict.fromkeys((cell.size, cell.tokens) for cell in cells))
    columns, best = [], []
    for point in points:
        here = [i for i, cell in enumerate(cells) if (cell.size, cell.tokens) == point]
        ranked = np.argsort(np.where(usable[:, here], best_loss[:, here], np.inf), axis=1)[:, :BEST_BATCHES]
        kept = np.take_along_axis(usable[:, here], ranked, axis=1)
        gamma = np.exp(np.where(kept, np.take_along_axis(log_gamma[:, here], ranked, axis=1), -np.inf))
        with np.errstate(divide="ignore", invalid="ignore"):
            columns.append(np.where(kept.sum(1) >= 2, np.log(gamma.sum(1) / kept.sum(1)), np.nan))
        if kept[0].sum() >= 2:
            best += [cells[here[i]] for i, use in zip(ranked[0], kept[0], strict=True) if use]
    return np.stack(columns, axis=1), points, tuple(best)


def _line(gammas: Array, points: list[tuple[Size, int]], center: float, sizes: set[Size]) -> Reading | None:
    """The paper's line through the points of these sizes, or None when they have too few horizons."""
    own = [i for i, (size, _) in enumerate(points) if size in sizes and np.isfinite(gammas[0, i])]
    if len({points[i][1] for i in own}) < MIN_HORIZONS:
        return None
    log_tokens = np.log([points[i][1] for i in own])
    design = np.stack([np.ones(len(own)), log_tokens - center], axis=1)
    there = np.isfinite(gammas[:, own])
    coefficients = _least_squares(design, gammas[:, own], there)
    residuals = gammas[0, own] - design @ coefficients[0]
    residual = math.sqrt(float(residuals @ residuals) / max(1, len(own) - 2))
    coefficients = np.column_stack([coefficients, np.ones(len(coefficients))])  # c = 1
    return Reading(math.exp(center), _reflected(coefficients), residual)


# ----------------------------------------------------------------------------------------------------- in words


def _refuse(cells: tuple[Cell, ...]) -> None:
    usable = [cell for cell in cells if cell.usable]
    if len({cell.batch for cell in usable}) < 2 or len({cell.tokens for cell in usable}) < MIN_HORIZONS:
        raise ValueError(_missing(cells))


def _missing(cells: tuple[Cell, ...]) -> str:
    """Why there is no law in these cells, and what would give one."""
    usable = [cell for cell in cells if cell.usable]
    batches, horizons = sorted({c.batch for c in usable}), sorted({c.tokens for c in usable})
    said = (
        f"A law needs a best rate, inside the grid of rates, for two batches or more at {MIN_HORIZONS} horizons or "
        f"more; this ledger has one for {len(usable)} of its {len(cells)} (size, horizon, batch), with "
        f"{len(batches)} batches ({', '.join(f'{b:g}' for b in batches) or 'none'}) and "
        f"{len(horizons)} horizons ({', '.join(f'{t:,}' for t in horizons) or 'none'})."
    )
    if len({cell.batch for cell in cells}) == 1:
        said += " With a single batch size nothing can tell how the rate grows with the batch: sweep three or more."
    if len({cell.tokens for cell in cells}) < MIN_HORIZONS:
        said += f" It was swept at {len({cell.tokens for cell in cells})} of them: sweep more horizons."
    for flag, remedy in (
        ("edge high", "add higher rates"),
        ("edge low", "add lower rates"),
        ("diverges above", "add rates between the best one and the one that diverges"),
        ("no minimum", "add rates, or seeds: the losses do not curve"),
        ("too few rates", "add rates: a parabola takes three, and four to be trusted"),
    ):
        if flagged := [cell for cell in cells if cell.flag == flag]:
            example = flagged[0]
            said += f" {len(flagged)} × {flag} (T = {example.tokens:,}, batch {example.batch:g}): {remedy}."
    return said


def name_of(size: Size) -> str:
    """Family and width in words."""
    return f"{size[0]} {size[1]}".strip()


def _agreement(sizes: Mapping[Size, Reading]) -> list[str]:
    """Whether the sizes tell the same law."""
    apart = [
        f"{name_of(one)} and {name_of(other)}, {symbol} {getattr(a, name)} and {getattr(b, name)}"
        for (one, a), (other, b) in itertools.combinations(sizes.items(), 2)
        for name, symbol in (("b", "b"), ("gamma", "γ"))
        if getattr(a, name).low > getattr(b, name).high or getattr(b, name).low > getattr(a, name).high
    ]
    if apart:
        return [f"The sizes disagree, and one law for all of them is none: {'; '.join(apart)}."]
    return ["The sizes agree: the intervals of b and of γ overlap for every pair."] if len(sizes) > 1 else []


def _proportionality(plane: Reading, paper: Reading) -> str:
    """Whether the rate is proportional to the batch, in plain words."""
    c = plane.c
    if c.contains(1.0):
        return f"The rate is proportional to the batch as far as this sweep can tell: c = {c}."
    return (
        f"The rate is not proportional to the batch here: it grows as batch^{c.value:.2f}, and the interval of c, "
        f"{c.low:.2f} to {c.high:.2f}, excludes 1. The paper's reading, b = {paper.b.value:.3f}, then mixes how the "
        f"best batch grows with how the rate falls; at a fixed batch it falls as tokens^{plane.b.value:.3f}."
    )


def _flags(cells: tuple[Cell, ...]) -> list[str]:
    """Which best rates are not used or to be trusted less, and where the best batch may lie outside."""
    notes = []
    for flag, meaning in (
        ("edge high", "the best rate is the highest of the grid"),
        ("edge low", "the best rate is the lowest of the grid"),
        ("diverges above", "the best rate is next to one that diverges"),
        ("no minimum", "the losses near the best rate have no minimum"),
        ("too few rates", "there are fewer than three rates"),
        ("three rates", "the parabola goes through three rates only (used)"),
    ):
        if flagged := [cell for cell in cells if cell.flag == flag]:
            where = ", ".join(f"{name_of(cell.size)} T={cell.tokens:,} batch {cell.batch:g}" for cell in flagged[:4])
            notes.append(
                f"{len(flagged)} of {len(cells)} cells: {meaning} ({where}{', …' if len(flagged) > 4 else ''})."
            )
    edges = []
    for size, tokens in dict.fromkeys((cell.size, cell.tokens) for cell in cells):
        here = sorted((c for c in cells if (c.size, c.tokens) == (size, tokens)), key=lambda c: c.batch)
        best = min(here, key=lambda c: min(c.losses))
        if best in (here[0], here[-1]):
            edges.append(f"{name_of(size)} T={tokens:,} batch {best.batch:g}")
    if edges:
        notes.append(
            f"The best batch is the smallest or the largest one swept at {len(edges)} (size, horizon): "
            f"{', '.join(edges[:6])}{', …' if len(edges) > 6 else ''}."
        )
    return notes
