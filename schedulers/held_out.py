"""What a law is worth: its regret, in nats above the lowest loss, on cells held out of its fit.

The forms are compared with two baselines that need no law: the best swept learning rate of the nearest cell, and the
one constant learning rate that is best for all cells together. Losses are interpolated between swept learning rates
(Akima) and extrapolated beyond them along the last slope.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from . import forms
from .cells import Array, Cell

LEAST_CELLS = 6  # to fit a form to
DRAWS = 1000  # of the bootstrap
LOW = 2.5  # percentile of a difference that must lie above 0
MATERIAL = 0.1  # of the noise of a loss: a smaller gain is not worth a sweep, and decides between no forms
WITHOUT_LAW = ("nearest", "constant")
LARGEST_SIZE = "the largest size"


@dataclass(frozen=True)
class Split:
    """Cells held out together. regrets: nats by form and by baseline, one for each cell in `held_out`."""

    name: str
    held_out: tuple[Cell, ...]
    distances: tuple[float, ...]  # log of the factor by which each lies outside the fitted cells
    regrets: dict[str, Array]


@dataclass(frozen=True)
class Worth:
    """Held-out regret of all splits, and the form chosen by it.

    mean: nats by form, the mean over splits. within: the forms that are not significantly worse than the best one (95%,
    bootstrap over (size, batch), whose horizons share trunks) by more than a tenth of the noise of a loss. chosen: of
    these, the form with the fewest numbers, then the paper's. worth_having: whether the best form beats both baselines
    significantly, and by more than a tenth of the noise of a loss.
    """

    splits: tuple[Split, ...]
    mean: dict[str, float]
    within: tuple[str, ...]
    chosen: str
    worth_having: bool

    @property
    def of_largest_size(self) -> float:
        """Regret of the best form on the largest size; infinite if that was not held out."""
        split = next((split for split in self.splits if split.name.startswith(LARGEST_SIZE)), None)
        return min(float(split.regrets[form].mean()) for form in self.within) if split else math.inf

    @property
    def cannot_tell(self) -> tuple[str, ...]:
        """Other forms with as few numbers as the chosen one that do as well."""
        return tuple(
            form for form in self.within if form != self.chosen and forms.NUMBERS[form] == forms.NUMBERS[self.chosen]
        )

    def expected(self, form: str, distance: float) -> tuple[float, float, int] | None:
        """Mean and worst regret of a form over the held-out cells at least this far outside the fit, and how many they
        are; None if there are none."""
        found = [
            regret
            for split in self.splits
            for regret, away in zip(split.regrets[form], split.distances, strict=True)
            if away >= distance - 1e-9
        ]
        return (float(np.mean(found)), float(np.max(found)), len(found)) if found else None


def regret_of(cell: Cell) -> Callable[[Array | float], Array]:
    """Nats above the cell's lowest loss, as a function of the log learning rate."""
    from scipy.interpolate import Akima1DInterpolator  # here: it takes longer than all of a --help

    finite = np.isfinite(cell.losses)
    x, y = np.log(cell.rates)[finite], np.array(cell.losses)[finite]
    curve = Akima1DInterpolator(x, y)
    least = float(np.min(curve(np.linspace(x[0], x[-1], 400))))
    below, above = curve.derivative()(x[[0, -1]])

    def regret(log_lr: Array | float) -> Array:
        at = np.asarray(log_lr, float)
        beyond = np.minimum(at - x[0], 0) * min(below, 0.0) + np.maximum(at - x[-1], 0) * max(above, 0.0)
        return np.maximum(curve(np.clip(at, x[0], x[-1])) + beyond - least, 0.0)  # the least one is of a fine grid

    return regret


def distance(cells: Sequence[Cell], batch: float, tokens: float) -> float:
    """Log of the factor by which (batch, tokens) lies outside these cells, both factors multiplied."""
    total = 0.0
    for value, swept in ((batch, [cell.batch for cell in cells]), (tokens, [cell.tokens for cell in cells])):
        total += max(0.0, math.log(value / max(swept)), math.log(min(swept) / value))
    return total


def worth(
    cells: Sequence[Cell], candidates: Sequence[str], log_parameters: Array | None, noise: float, seed: int = 0
) -> Worth | None:
    """Held-out regret of the candidates; None if there are too few cells to hold any out.

    Args:
        cells: the usable ones.
        candidates: names of forms.
        log_parameters: of each cell, centred, if the law has an exponent of the parameters.
        noise: standard deviation of a loss in nats.
    """
    log_tokens, log_batch, best = (
        np.log([getattr(cell, name) for cell in cells]) for name in ("tokens", "batch", "lr")
    )
    log_tokens = log_tokens - log_tokens.mean()
    curves = [regret_of(cell) for cell in cells]
    splits, indices = [], []
    for name, fitted, held in _splits(cells):
        chosen = np.flatnonzero(held).tolist()
        train = [cells[index] for index in np.flatnonzero(fitted).tolist()]
        sizes = None if log_parameters is None else log_parameters[fitted]
        regrets = {}
        for form in candidates:
            numbers = forms.solve(form, log_tokens[fitted], log_batch[fitted], best[fitted], sizes)
            at = log_parameters[held] if log_parameters is not None else 0.0
            predicted = forms.log_lr(form, numbers, log_tokens[held], log_batch[held], at)
            # As in a schedule, whose cap is the highest best rate if the form has none.
            scaled = best[fitted] - (numbers[3] * sizes if sizes is not None else 0.0)
            predicted = np.minimum(predicted, scaled.max() + numbers[3] * at)
            regrets[form] = np.array([curves[index](value) for index, value in zip(chosen, predicted, strict=True)])
        regrets["nearest"] = np.array([curves[i](math.log(_nearest(train, cells[i]))) for i in chosen])
        rates = np.linspace(best[fitted].min(), best[fitted].max(), 50)
        constant = rates[np.argmin(np.mean([curves[index](rates) for index in np.flatnonzero(fitted)], axis=0))]
        regrets["constant"] = np.array([curves[index](constant) for index in chosen])
        away = tuple(distance(train, cells[index].batch, cells[index].tokens) for index in chosen)
        splits.append(Split(name, tuple(cells[index] for index in chosen), away, regrets))
        indices.append(chosen)
    return _judged(cells, tuple(splits), indices, candidates, noise, seed) if splits else None


def _splits(cells: Sequence[Cell]) -> list[tuple[str, npt.NDArray[np.bool_], npt.NDArray[np.bool_]]]:
    """(name, cells to fit, cells held out): the largest third of the horizons, of the batches, and the largest size."""
    tokens, batches = (sorted({getattr(cell, name) for cell in cells}) for name in ("tokens", "batch"))
    longest, largest = (values[-max(1, round(len(values) / 3))] for values in (tokens, batches))
    sizes = sorted({cell.size for cell in cells}, key=lambda size: _magnitude(cells, size))
    long = np.array([cell.tokens >= longest for cell in cells])
    large = np.array([cell.batch >= largest for cell in cells])
    wide = np.array([cell.size == sizes[-1] for cell in cells])
    found = [
        (f"horizons from {longest:,} tokens on", ~long, long),
        (f"batches from {largest:g} on", ~large, large),
        (f"{LARGEST_SIZE}, {' '.join(map(str, sizes[-1])).strip()}", ~wide, wide),
        ("such a horizon and such a batch", ~(long | large), long & large),
    ]
    return [entry for entry in found if entry[1].sum() >= LEAST_CELLS and entry[2].any()]


def _magnitude(cells: Sequence[Cell], size: tuple[str, int]) -> tuple[float, int, str]:
    known = next((cell.parameters for cell in cells if cell.size == size and cell.parameters), 0.0)
    return known, size[1], size[0]


def _nearest(train: Sequence[Cell], cell: Cell) -> float:
    """The best swept learning rate of the nearest cell."""

    def away(other: Cell) -> float:
        size = abs(math.log((other.parameters or other.size[1]) / (cell.parameters or cell.size[1])))
        return abs(math.log(other.batch / cell.batch)) + abs(math.log(other.tokens / cell.tokens)) + size

    near = min(train, key=away)
    return near.rates[int(np.argmin(near.losses))]


def _judged(
    cells: Sequence[Cell],
    splits: tuple[Split, ...],
    indices: Sequence[list[int]],
    candidates: Sequence[str],
    noise: float,
    seed: int,
) -> Worth:
    """Means over splits, for the cells as they are and for each draw of the bootstrap over (size, batch)."""
    columns = list(dict.fromkeys((cell.size, cell.batch) for cell in cells))
    column = np.array([columns.index((cell.size, cell.batch)) for cell in cells])
    count = len(columns)
    drawn = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=DRAWS)
    weights = np.vstack([np.ones(count), drawn]) + 1e-9  # row 0: no draw. A draw may miss all cells of a split
    means = {}
    for name in (*candidates, *WITHOUT_LAW):
        by_split = []
        for split, chosen in zip(splits, indices, strict=True):
            w = weights[:, column[chosen]]
            by_split.append((w @ split.regrets[name]) / w.sum(axis=1))
        means[name] = np.mean(by_split, axis=0)
    best = min(candidates, key=lambda form: means[form][0])
    within = tuple(
        form
        for form in candidates
        if form == best or np.percentile((means[form] - means[best])[1:], LOW) <= MATERIAL * noise
    )
    chosen_form = min(within, key=lambda form: (forms.NUMBERS[form], list(forms.NUMBERS).index(form)))
    gained = [np.percentile((means[name] - means[best])[1:], LOW) for name in WITHOUT_LAW]
    return Worth(
        splits,
        {name: float(values[0]) for name, values in means.items()},
        within,
        chosen_form,
        bool(min(gained) > MATERIAL * noise),
    )
