"""The ledger of a sweep as cells: one (size, horizon, batch) each, its best learning rate and how reliable that is.

Batches are in units of 4096 tokens, learning rates (called rates) those of the trunk, losses in nats.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Size = tuple[str, int]  # family, hidden_size

MOST = 1e18  # the upper limit of any number in a ledger
SAME_HORIZON = 1.03  # horizons within this factor are the same one, rounded to whole steps of different batches
NEEDED = ("hidden_size", "batch", "lr", "tokens", "loss")
WINDOW = math.log(8) / 2  # log factor around the best rate; at least its four nearest
MOST_LOPSIDED = 0.3  # with more, the losses would turn down again within the window


@dataclass(frozen=True)
class Cell:
    """One (size, horizon, batch): losses over rates, and the minimum of the parabola through those near the best.

    flag: "" when `lr` is well determined, else why it is not used ("edge low", "edge high", "diverges above",
    "no minimum", "too few rates") or why it is less reliable ("three rates").
    """

    size: Size
    tokens: int
    batch: float
    rates: tuple[float, ...]
    losses: tuple[float, ...]  # inf where it diverged
    lr: float  # nan when there is no minimum
    loss: float  # at `lr`, by the parabola
    flag: str
    parameters: float | None = None  # of a model of this size, if the ledger has them

    @property
    def usable(self) -> bool:
        return self.flag in ("", "three rates")


# ----------------------------------------------------------------------------------------------------- the ledger


def is_number(value: Any, above: float = -MOST) -> TypeGuard[float]:
    """Whether what a line of a ledger holds is a number between `above` and MOST, which any of them is."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and above < value < MOST


def _read(number: int, line: Mapping[str, Any]) -> tuple[Size, int, float, float, str, float, float | None]:
    """(size, tokens, batch, learning rate, seed, loss, parameters) of a line of the ledger; the loss is inf if it
    diverged.

    Raises:
        ValueError: a field is missing or out of its range.
    """
    if lacking := [name for name in NEEDED if name not in line]:
        raise ValueError(f"Line {number} of the ledger lacks {', '.join(lacking)}; a fit needs {', '.join(NEEDED)}.")
    for name in ("hidden_size", "batch", "lr", "tokens", "loss"):
        value = line[name]
        if name == "loss" and (value is None or value in (math.inf, math.nan) or value != value):
            continue
        if not is_number(value, -MOST if name == "loss" else 0):
            limits = f"a number {f'between -{MOST:g} and' if name == 'loss' else 'above 0 and below'} {MOST:g}"
            raise ValueError(f"Line {number} of the ledger has {name} {str(value)[:40]}; it must be {limits}.")
    for name in ("hidden_size", "tokens"):
        if line[name] != int(line[name]):
            raise ValueError(
                f"Line {number} of the ledger has {name} {line[name]!r}; it must be a whole number (tokens, not "
                "millions of them)."
            )
    loss, count = line["loss"], line.get("parameters")
    if count is not None and not is_number(count, 0):
        raise ValueError(
            f"Line {number} of the ledger has parameters {str(count)[:40]}; it must be a number above 0 and below "
            f"{MOST:g}, or absent."
        )
    return (
        (str(line.get("family") or ""), int(line["hidden_size"])),
        int(line["tokens"]),
        float(line["batch"]),
        float(line["lr"]),
        str(line.get("seed") or 0),
        float(loss) if loss is not None and math.isfinite(loss) else math.inf,
        None if count is None else float(count),
    )


def _schedule(line: Mapping[str, Any]) -> str:
    return str(line.get("schedule") or "wsd")


def _horizons(tokens: set[int]) -> dict[int, int]:
    """Each token count → the smallest count of the same horizon."""
    same: dict[int, int] = {}
    for value in sorted(tokens):
        last = next(reversed(same.values()), 0)
        same[value] = last if last and value <= SAME_HORIZON * last else value
    return same


class Trials:
    """A ledger as arrays: a trunk is (size, batch, rate, seed), a cell (size, tokens, batch)."""

    def __init__(self, ledger: Iterable[Mapping[str, Any]]) -> None:
        self.losses: dict[tuple[Size, int, float], dict[float, list[tuple[int, float]]]] = {}
        trunks: dict[tuple[Any, ...], int] = {}
        lines = [(number, line) for number, line in enumerate(ledger, 1) if line.get("lr") is not None]
        self.others = sorted({_schedule(line) for _, line in lines} - {"wsd"})
        read = [_read(number, line) for number, line in lines if _schedule(line) == "wsd"]
        horizon = _horizons({tokens for _, tokens, *_ in read})
        counts: dict[Size, set[float]] = {}
        for size, *_, count in read:
            counts.setdefault(size, set()).update([] if count is None else [count])
        self.parameters: dict[Size, float] = {}
        for (family, width), own_tokens, batch, rate, seed, loss, count in read:
            size = family, width
            if count is not None:
                if len(counts[size]) > 1:  # models of one width, such as of two depths
                    size = f"{family} ({count:,.0f} parameters)".strip(), width
                self.parameters[size] = count
            trunk = trunks.setdefault((size, batch, rate, seed), len(trunks))
            cell = self.losses.setdefault((size, horizon[own_tokens], batch), {})
            cell[rate] = [*{**dict(cell.get(rate, [])), trunk: loss}.items()]  # the last line of a repeated trial
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
        trunks = [[trunk for trunk, _ in by_rate[rate]] for rate in self.rates(cell)]
        counts = np.array([len(each) for each in trunks])
        sums = np.add.reduceat(noise[:, group, list(itertools.chain(*trunks))], np.cumsum(counts) - counts, axis=1)
        return np.asarray(sums / counts)


# --------------------------------------------------------------------------------------------------- the parabola


@dataclass
class Parabola:
    """For each row of losses: the minimum (log_lr, loss), the curvature and the cubic term. For row 0 also: the first
    rate of the window, the residuals in the window and the flag."""

    log_lr: Array  # (R,)
    loss: Array
    curvature: Array
    cubic: Array  # 0 with fewer than four rates
    usable: npt.NDArray[np.bool_]
    first: int
    residuals: Array
    flag: str


def parabolas(trials: Trials, noise: Array) -> tuple[list[Parabola], float, float]:
    """One for each cell, with noise (R, groups, trunks) added to the losses.

    Losses rise faster above the best rate than below it, which shifts the minimum of a plain parabola. The asymmetry,
    the cubic over the quadratic term, is assumed to be the same in all cells, because one cell cannot separate it from
    noise.

    Returns:
        The parabolas, by how much the asymmetry moved the log of the best rates, on average, and the asymmetry itself,
        of which no more than MOST_LOPSIDED is corrected for.
    """
    losses = [trials.cell_losses(cell) + trials.in_cell(noise, cell) for cell in range(len(trials.cells))]
    plain = [_parabola(trials.log_rates(cell), y, np.zeros(len(y))) for cell, y in enumerate(losses)]
    product = square = np.zeros(len(noise))
    for p in plain:
        there = p.usable & (p.cubic != 0)
        product = product + np.where(there, p.cubic * p.curvature, 0.0)
        square = square + np.where(there, p.curvature**2, 0.0)
    asymmetry = product / np.where(square > 0, square, 1.0)
    lopsided = np.clip(asymmetry, -MOST_LOPSIDED, MOST_LOPSIDED)
    bent = [_parabola(trials.log_rates(cell), y, lopsided) for cell, y in enumerate(losses)]
    moves = [b.log_lr[0] - p.log_lr[0] for b, p in zip(bent, plain, strict=True) if b.usable[0] and p.usable[0]]
    return bent, float(np.mean(moves)) if moves else 0.0, float(asymmetry[0])


@functools.lru_cache(1024)  # most cells have the same windows, and each is fitted several times
def _inverse(u: tuple[float, ...], numbers: int) -> Array:
    """(points, numbers): losses at u times this are the coefficients of the polynomial through them, the highest power
    first."""
    return np.asarray(np.linalg.pinv(np.vander(u, numbers)).T)


def _parabola(log_rates: Array, losses: Array, lopsided: Array) -> Parabola:
    """Fit curvature · (d² + lopsided · d³), d the distance from the minimum, to the rates near the best one."""
    finite = np.isfinite(losses[0])
    diverges_above = not finite.all() and bool(finite.any()) and not finite[np.flatnonzero(finite)[-1] :].all()
    x, y = log_rates[finite], losses[:, finite]
    rows, count = y.shape
    log_lr, loss, curvature = (np.full(rows, np.nan) for _ in range(3))
    cubic = np.zeros(rows)
    if count < 3:
        return Parabola(log_lr, loss, curvature, cubic, np.zeros(rows, bool), 0, np.zeros(0), "too few rates")

    # ---- the window of each row: rates within a factor of the best one, widened by the better neighbour up to four
    best = y.argmin(axis=1)
    first = np.searchsorted(x, x[best] - WINDOW - 1e-9)
    last = np.searchsorted(x, x[best] + WINDOW + 1e-9) - 1
    padded, row = np.pad(y, ((0, 0), (1, 1)), constant_values=np.inf), np.arange(rows)
    for _ in range(3):
        short = last - first + 1 < min(4, count)
        if not short.any():
            break
        left = padded[row, first] <= padded[row, last + 2]  # the losses beside the window
        first, last = np.where(short & left, first - 1, first), np.where(short & ~left, last + 1, last)

    residuals = np.zeros(0)
    for begin, end in sorted({(int(f), int(e)) for f, e in zip(first, last, strict=True)}):
        chosen = (first == begin) & (last == end)
        u, v, skew = x[begin : end + 1] - x[begin : end + 1].mean(), y[chosen, begin : end + 1], lopsided[chosen, None]
        invert = _inverse(tuple(u.tolist()), 3)
        fitted = v @ invert
        if len(u) > 3:
            cubic[chosen] = v @ _inverse(tuple(u.tolist()), 4)[:, 0]
        bent = np.zeros_like(v)
        for _ in range(4):  # subtract the cubic part around the current minimum, then fit a parabola to the rest
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
            residuals = v[0] - bent[0] - np.vander(u, 3) @ fitted[0]

    inside = (curvature > 0) & (log_lr >= x[first]) & (log_lr <= x[last])
    flag = ""
    if not np.ptp(y[0]):
        flag = "no minimum"
    elif best[0] == count - 1:
        flag = "diverges above" if diverges_above else "edge high"
    elif best[0] == 0:
        flag = "edge low"
    elif not inside[0]:
        flag = "no minimum"
    elif last[0] - first[0] + 1 < 4:
        flag = "three rates"
    usable = (best > 0) & (best < count - 1) & inside
    return Parabola(log_lr, loss, curvature, cubic, usable, int(np.flatnonzero(finite)[first[0]]), residuals, flag)


def cell_of(trials: Trials, index: int, fitted: Parabola) -> Cell:
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
        trials.parameters.get(size),
    )


def noise_of(trials: Trials, fitted: list[Parabola]) -> tuple[dict[Any, float], float]:
    """Standard deviation of a loss by (size, tokens), and the fraction of its variance that a trunk's horizons share.

    Estimated from the residuals of the parabolas and from trials that differ only in their seed.
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
    # Shrinkage: the pooled variance counts as two degrees of freedom in each group.
    sigma = {group: math.sqrt((squares[group] + 2 * total) / (freedom[group] + 2)) for group in trials.groups}
    product = square = 0.0
    for by_group in left.values():  # of one size, so that sorted groups are sorted horizons
        for one, next_one in itertools.pairwise(sorted(by_group)):
            u, v = by_group[one] / (sigma[one] or 1.0), by_group[next_one] / (sigma[next_one] or 1.0)
            product += u * v
            square += (u * u + v * v) / 2
    return sigma, min(1.0, max(0.0, product / square)) if square else 0.0
