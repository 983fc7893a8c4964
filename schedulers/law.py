"""The law of the best learning rate, fitted to a sweep, with intervals and held-out regret.

Forms, fitted to the best learning rate η of every cell (size, horizon T, batch β in units of 4096 tokens):

    smooth   1/η = 1/η_max + 1/(a·β·T^b)
    hard     η = min(η_max, a·β·T^b)     equation 7 of arXiv 2408.13359, with T for n
    power    η = a·β·T^b                 both without the cap, where no cap is seen
    plane    η = a·β^c·T^b               for diagnosis: whether c is 1

The batch at which a·β·T^b reaches η_max is the critical batch β_c(T) = η_max / (a·T^b). The smooth form is
η_max / (1 + β_c/β): the best learning rate below and above the noise scale (arXiv 1812.06162, section 2.2), with a
noise scale that grows as T^-b. If sizes disagree, η is multiplied by a power of the number of parameters.

Intervals are 95%, from replicates of the whole fit (a parametric bootstrap). A replicate adds to the losses of each
trunk, the run that all horizons of a (size, batch, rate, seed) share, noise as large as the ledger shows, partly common
to its horizons. It adds to the best rates their scatter around the law beyond that noise, and a common error of half of
what the asymmetry of the losses moved them. And it draws the mean of b's weak prior (powertrain.schedulers.forms) from
that prior.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from . import forms
from .cells import MOST_LOPSIDED, Array, Cell, Size, Trials, cell_of, noise_of, parabolas
from .held_out import MATERIAL, Worth, worth

MIN_HORIZONS = 3
REPLICATES = 200
PERCENTILES = (2.5, 97.5)
DISAGREE = math.log(1.15)  # learning rates closer than this agree: of a size with the law, of a cell with the cap
CAP_BINDS = math.log(1.5)  # a cap is seen if it lowers some cell's learning rate by more than this


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
class Form:
    """One form, fitted.

    replicates: (1 + 2R, 4) numbers of `forms.log_lr`: the estimate, R replicates, and their reflections at the estimate
    (basic bootstrap: noise may have moved the estimate off the truth as far as it moves a replicate off the estimate).
    An interval covers both halves. residual: standard deviation of the log best rates around the form.
    central_parameters: None for one law for all sizes.
    """

    name: str
    central_tokens: float
    central_parameters: float | None
    replicates: Array
    residual: float

    @property
    def b(self) -> Estimate:
        return self._estimate(self.replicates[:, 1])

    @property
    def c(self) -> Estimate:
        """Exponent of the batch: 1 by construction in all forms but the plane."""
        return self._estimate(self.replicates[:, 2] if self.name == "plane" else np.ones(len(self.replicates)))

    @property
    def d(self) -> Estimate:
        """Exponent of the number of parameters."""
        return self._estimate(self.replicates[:, 3])

    @property
    def gamma(self) -> Estimate:
        """Learning rate of a batch of 1 at the central horizon and size, without a cap."""
        return self._estimate(np.exp(self.replicates[:, 0]))

    def a(self, parameters: float | None = None) -> Estimate:
        """Learning rate of a batch of 1 at one token. That is far outside any sweep, so the interval is wide: see
        `gamma`."""
        log_a = self.replicates[:, 0] - self.replicates[:, 1] * math.log(self.central_tokens)
        return self._estimate(np.exp(log_a + self._size(parameters)))

    def max_lr(self, parameters: float | None = None) -> Estimate:
        """The cap η_max; infinite in a form without one."""
        if self.name not in forms.CAPPED:
            return Estimate(math.inf, math.inf, math.inf)
        return self._estimate(np.exp(self.replicates[:, 2] + self._size(parameters)))

    def critical_batch(self, tokens: float) -> Estimate:
        """The batch, in units of 4096 tokens, above which the cap determines the learning rate and not the batch."""
        if self.name not in forms.CAPPED:
            return Estimate(math.inf, math.inf, math.inf)
        log_gamma, b, log_max = self.replicates[:, :3].T
        return self._estimate(np.exp(log_max - log_gamma - b * math.log(tokens / self.central_tokens)))

    def lr(self, batch: float, tokens: float, parameters: float | None = None) -> Estimate:
        """The best learning rate, with an interval from the joint replicates of all numbers.

        Args:
            batch: in units of 4096 tokens.
            tokens: the horizon.
            parameters: of the model; default: the central size of the sweep.
        """
        at = np.array([math.log(tokens / self.central_tokens)]), np.array([math.log(batch)])
        return self._estimate(np.exp(forms.log_lr(self.name, self.replicates, *at)[:, 0] + self._size(parameters)))

    def _size(self, parameters: float | None) -> Array | float:
        if self.central_parameters is None or parameters is None:
            return 0.0
        return np.asarray(self.replicates[:, 3] * math.log(parameters / self.central_parameters))

    def _estimate(self, values: Array) -> Estimate:
        low, high = np.nanpercentile(values[1:].reshape(2, -1), PERCENTILES, axis=1)
        return Estimate(float(values[0]), float(low.min()), float(high.max()))


@dataclass(frozen=True)
class Law:
    """The result of a fit.

    forms: by name. caps_seen: those of `forms.CAPPED` whose cap the ledger determines. flat: those of caps_seen of
    which it determines nothing else, since no cell is seen below the cap. worth: held-out regret; None if there are too
    few cells to hold any out. noise: standard deviation of a loss, by (size, horizon). shared: the fraction of its
    variance that the horizons of a trunk share. notes: what a user must know of the law, in sentences. flags: the same
    of the best rates that it was fitted to. named: the form that the caller of `fit` named, if any.
    """

    cells: tuple[Cell, ...]
    forms: Mapping[str, Form]
    caps_seen: tuple[str, ...]
    flat: tuple[str, ...]
    worth: Worth | None
    noise: Mapping[tuple[Size, int], float]
    shared: float
    notes: tuple[str, ...]
    flags: tuple[str, ...]
    named: str | None = None

    @property
    def chosen(self) -> Form:
        """The form for a schedule: as named, or by held-out regret; without either, the paper's if its cap is seen."""
        if self.named is not None:
            return self.forms[self.named]
        if self.worth is not None:
            return self.forms[self.worth.chosen]
        return self.forms[next(iter(self.caps_seen), "power")]

    def highest(self, parameters: float | None = None) -> float:
        """The highest best learning rate of the sweep's cells; if the law has an exponent of the parameters, with all
        of them scaled to this size (default: the central one)."""
        usable = [cell for cell in self.cells if cell.usable]
        if self.chosen.central_parameters is None:
            return max(cell.lr for cell in usable)
        size = parameters or self.chosen.central_parameters
        return max(cell.lr * (size / (cell.parameters or size)) ** self.chosen.d.value for cell in usable)

    def max_lr(self, parameters: float | None = None) -> float:
        """The cap for a schedule: the law's, or the highest best learning rate of the sweep if the form has none."""
        cap = self.chosen.max_lr(parameters).value
        return cap if math.isfinite(cap) else self.highest(parameters)

    def outside(self, batch: float, tokens: float) -> list[str]:
        """Sentences on which of these lie outside the swept range, and by how much."""
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


def fit(
    ledger: Iterable[Mapping[str, Any]], replicates: int = REPLICATES, seed: int = 0, form: str | None = None
) -> Law:
    """Fit all forms to the trials of a ledger that have an `lr`, and compute their held-out regret.

    Args:
        ledger: hidden_size, batch, lr, tokens and loss (None if it diverged) of each trial; family, parameters, seed
            and schedule are optional.
        replicates: how often the fit is repeated for the intervals, at least once.
        form: of `forms.NUMBERS`, for the law; default: chosen by held-out regret.

    Raises:
        ValueError: there is too little to fit, or `form` is not one that this ledger can choose; the message says what
            is missing.
    """
    trials = Trials(ledger)
    draws = np.random.default_rng(seed)
    if not trials.cells:
        others = f" (its schedules: {', '.join(trials.others)})" if trials.others else ""
        raise ValueError(
            f"There is no trial of the schedule 'wsd' with a learning rate `lr`{others}, so there is nothing to fit."
        )
    fitted, moved, asymmetry = parabolas(trials, np.zeros((1, len(trials.groups), trials.trunks)))
    cells = tuple(cell_of(trials, index, parabola) for index, parabola in enumerate(fitted))
    _refuse(cells)
    sigma, shared = noise_of(trials, fitted)

    # ---- replicates: the whole fit again with new noise for each trunk; row 0 has no noise added
    repeated, *_ = parabolas(trials, trials.noise(sigma, shared, replicates, draws))
    points = _Points(
        cells,
        np.stack([p.log_lr for p in repeated], axis=1),
        np.stack([p.usable for p in repeated], axis=1),
        draws.normal(size=(replicates, len(cells))),
        draws.normal(0, abs(moved) / 2, (replicates, 1)),
        draws.normal(forms.PRIOR_B, forms.PRIOR_B_SCALE, replicates),
    )
    kept = [index for index, cell in enumerate(cells) if cell.usable]

    def fitted_forms(with_parameters: bool) -> tuple[dict[str, Form], tuple[str, ...], Worth | None]:
        found = {name: points.form(name, with_parameters) for name in forms.NUMBERS}
        seen = tuple(name for name in forms.CAPPED if points.sees(found[name]))
        sizes = points.log_parameters[kept] if with_parameters and points.log_parameters is not None else None
        value = worth([cells[index] for index in kept], candidates(seen), sizes, _typical(sigma))
        if value is not None and value.chosen == "plane" and not seen and found["plane"].c.contains(1.0):
            # With c = 1 the plane is `power`, which has fewer numbers.
            value = dataclasses.replace(value, within=("power", "plane"), chosen="power")
        return found, seen, value

    found, caps_seen, value = fitted_forms(with_parameters=False)
    if points.log_parameters is not None and not points.form("smooth", with_parameters=True).d.contains(0.0):
        other = fitted_forms(with_parameters=True)
        # Unless the exponent of the parameters predicts the largest size better, and materially so, it is noise.
        if other[2] is not None and value is not None:
            gained = value.of_largest_size - other[2].of_largest_size
            if gained > MATERIAL * _typical(sigma):
                found, caps_seen, value = other
    if form is not None and form not in candidates(caps_seen):
        cap = f"a cap is seen (by {' and '.join(caps_seen)})" if caps_seen else "no cap is seen"
        raise ValueError(
            f"The form '{form}' is not one for this ledger: {cap}, so the forms are {', '.join(candidates(caps_seen))}."
        )
    flat = tuple(name for name in caps_seen if not points.sees_below(found[name]))
    law = Law(cells, found, caps_seen, flat, value, sigma, shared, (), tuple(_flags(cells, asymmetry)), form)
    return dataclasses.replace(law, notes=tuple(_notes(law, points)))


def candidates(caps_seen: Sequence[str]) -> list[str]:
    """The forms that a schedule can have: those whose cap is seen, or `power` where none is; and the plane."""
    return [*(caps_seen or ["power"]), "plane"]


class _Points:
    """The best rates of all cells in all replicates, and the fit of a form to each of them."""

    def __init__(
        self,
        cells: tuple[Cell, ...],
        log_lr: Array,
        usable: npt.NDArray[np.bool_],
        scatter: Array,
        common: Array,
        prior_b: Array,
    ) -> None:
        self.cells, self.log_lr, self.usable = cells, log_lr, usable
        self._scatter, self._common, self._prior_b = scatter, common, prior_b
        kept = usable[0]
        log_tokens = np.log([cell.tokens for cell in cells])
        self._central_tokens = float(log_tokens[kept].mean())
        self._log_tokens, self._log_batch = log_tokens - self._central_tokens, np.log([cell.batch for cell in cells])
        self._by_noise = float(np.nanvar(np.where(usable, log_lr, np.nan)[:, kept], axis=0).mean())
        self.log_parameters, self._central_parameters = None, 0.0
        counts = [cell.parameters for cell in cells]
        if all(counts[index] for index in np.flatnonzero(kept)) and len({counts[i] for i in np.flatnonzero(kept)}) > 1:
            logs = np.log([count or 1.0 for count in counts])
            self._central_parameters = float(logs[kept].mean())
            self.log_parameters = logs - self._central_parameters

    def form(self, name: str, with_parameters: bool) -> Form:
        """Fit a form to the ledger and to every replicate."""
        kept = self.usable[0]
        sizes = self.log_parameters if with_parameters else None
        estimate = forms.solve(
            name,
            self._log_tokens[kept],
            self._log_batch[kept],
            self.log_lr[0][kept],
            sizes[kept] if sizes is not None else None,
        )
        residuals = (self.log_lr[0] - self._law(name, estimate))[kept]
        freedom = max(1, len(residuals) - forms.NUMBERS[name] - with_parameters)
        variance = float(residuals @ residuals) / freedom
        misfit = math.sqrt(max(0.0, variance - self._by_noise))
        moved = self.log_lr[1:] + misfit * self._scatter + self._common
        drawn = forms.solve_all(
            name,
            estimate,
            self._log_tokens,
            self._log_batch,
            np.where(self.usable[1:], moved, np.nan),
            sizes,
            self._prior_b,
        )
        return Form(
            name,
            math.exp(self._central_tokens),
            math.exp(self._central_parameters) if with_parameters else None,
            np.vstack([estimate, drawn, 2 * estimate - drawn]),
            math.sqrt(variance),
        )

    def residuals(self, form: Form) -> Array:
        """Log best rate over the form's, of the usable cells."""
        return (self.log_lr[0] - self._law(form.name, form.replicates[0]))[self.usable[0]]

    def sees(self, form: Form) -> bool:
        """Whether the sweep reaches batches at which the cap binds."""
        return self._surely_below(form, lambda drawn, points: forms.log_lr("power", drawn, *points)) > CAP_BINDS

    def sees_below(self, form: Form) -> bool:
        """Whether it reaches batches at which the learning rate is below the cap."""
        return self._surely_below(form, lambda drawn, points: drawn[:, 2:3]) > DISAGREE

    def _surely_below(self, form: Form, upper: Callable[[Array, tuple[Array, Array]], Array]) -> float:
        """By how much at least the form lies below `upper`, both in log, at some cell, in 97.5% of the replicates."""
        drawn = form.replicates[1 : len(self.log_lr)]
        points = self._log_tokens[self.usable[0]], self._log_batch[self.usable[0]]
        below = upper(drawn, points) - forms.log_lr(form.name, drawn, *points)
        return float(np.percentile(below.max(axis=1), PERCENTILES[0]))

    def _law(self, name: str, numbers: Array) -> Array:
        sizes = self.log_parameters if self.log_parameters is not None else 0.0
        return forms.log_lr(name, numbers, self._log_tokens, self._log_batch, sizes)


def expected_error(
    ledger: Iterable[Mapping[str, Any]], planned: Iterable[tuple[int, float]]
) -> tuple[float, float, float]:
    """Predict the standard errors of a sweep from its pilot: (noise of a loss, error of a log best rate, error of b).

    Assumes that curvature and noise are the pilot's at all horizons, and that the law holds exactly.

    Args:
        ledger: the trials of the pilot.
        planned: tokens and batch of each best rate that the whole sweep will give.

    Raises:
        ValueError: no batch has its best rate inside the grid yet.
    """
    trials = Trials(ledger)
    fitted, *_ = parabolas(trials, np.zeros((1, len(trials.groups), trials.trunks)))
    usable = [(p, trials.log_rates(index)) for index, p in enumerate(fitted) if p.usable[0] and len(p.residuals) > 3]
    if not usable:
        raise ValueError("no batch has its best rate inside the grid, with two rates on one side and one on the other.")
    sigma = math.sqrt(float(np.mean([s * s for s in noise_of(trials, fitted)[0].values()])))
    errors = []
    for p, x in usable:
        window = x[p.first : p.first + len(p.residuals)]
        # d(minimum) / d(loss i) = u_i / (2 · curvature · Σ u²), to first order for a minimum in the middle
        errors.append(sigma / (2 * p.curvature[0] * math.sqrt(float(((window - window.mean()) ** 2).sum()))))
    error = float(np.median(errors))
    points = np.array([(1.0, math.log(tokens), math.log(batch)) for tokens, batch in planned])
    return sigma, error, error * math.sqrt(float(np.linalg.pinv(points.T @ points)[1, 1]))


# ----------------------------------------------------------------------------------------------------- in words


def _refuse(cells: tuple[Cell, ...]) -> None:
    usable = [cell for cell in cells if cell.usable]
    if len({cell.batch for cell in usable}) < 2 or len({cell.tokens for cell in usable}) < MIN_HORIZONS:
        raise ValueError(_missing(cells))


def _missing(cells: tuple[Cell, ...]) -> str:
    """Why these cells determine no law, and which trials to add."""
    usable = [cell for cell in cells if cell.usable]
    batches, horizons = sorted({c.batch for c in usable}), sorted({c.tokens for c in usable})
    said = (
        f"A law needs a best learning rate, inside the grid, for two batches or more at {MIN_HORIZONS} horizons or "
        f"more; this ledger has one for {len(usable)} of its {len(cells)} cells (size, horizon, batch), with "
        f"{len(batches)} batches ({', '.join(f'{b:g}' for b in batches) or 'none'}) and "
        f"{len(horizons)} horizons ({', '.join(f'{t:,}' for t in horizons) or 'none'})."
    )
    if len({cell.batch for cell in cells}) == 1:
        said += " A single batch size does not tell how the learning rate grows with the batch: sweep three or more."
    if len({cell.tokens for cell in cells}) < MIN_HORIZONS:
        said += f" It was swept at {len({cell.tokens for cell in cells})} of them: sweep more horizons."
    for flag, remedy in (
        ("edge high", "add higher learning rates"),
        ("edge low", "add lower learning rates"),
        ("diverges above", "add learning rates between the best one and the one that diverges"),
        ("no minimum", "add learning rates, or seeds: the losses have no curvature"),
        ("too few rates", "add learning rates that do not diverge: a parabola takes three, and four to be reliable"),
    ):
        if flagged := [cell for cell in cells if cell.flag == flag]:
            example = flagged[0]
            said += f" {len(flagged)} × {flag} (T = {example.tokens:,}, batch {example.batch:g}): {remedy}."
    return said


def name_of(size: Size) -> str:
    """Family and width as text."""
    return f"{size[0]} {size[1]}".strip()


def _notes(law: Law, points: _Points) -> list[str]:
    """What a user must know: which form, whether there is a cap, whether sizes agree, whether a law is worth having."""
    chosen, notes = law.chosen, []
    longest = max(cell.tokens for cell in law.cells if cell.usable)
    size = f" (for {chosen.central_parameters:,.0f} parameters)" if chosen.central_parameters is not None else ""
    if chosen.name in law.flat:
        notes.append(
            f"The best learning rate is the cap of {chosen.max_lr()}{size}, or near it, in all cells: no batch is seen "
            "below the critical one, so a and b are guesses, and below the swept batches or beyond the swept horizons "
            "the learning rate is not known. Smaller batches or longer horizons would show it."
        )
    elif chosen.name in forms.CAPPED:
        notes.append(
            f"Below a cap of {chosen.max_lr()}{size} the best learning rate is modelled as proportional to the batch, "
            f"and falls as tokens^{chosen.b.value:.3f}. The critical batch, at which it reaches the cap, is "
            f"{chosen.critical_batch(longest)} at {longest:,} tokens: a larger one needs more tokens for the same loss."
        )
    elif law.caps_seen:
        notes.append(
            f"A cap is seen (by {' and '.join(law.caps_seen)}), which the form '{chosen.name}' does not have. The "
            f"schedule uses {law.highest():.4g}{size}, the highest best learning rate of the sweep, as its cap."
        )
    else:
        notes.append(
            f"No cap is seen up to a learning rate of {law.highest():.4g}{size}, the highest best one of the sweep: "
            "larger batches or shorter horizons would show it. The schedule uses that learning rate as its cap."
        )
    if law.worth is None:
        notes.append(
            "There are too few cells to hold any out, so what this law is worth is not known: train more batches and "
            "horizons (a lean sweep: a larger sweep.budget_tokens)."
        )
    else:
        notes += _in_nats(law, law.worth)
    if chosen.name == "plane":
        c = chosen.c
        modelled = law.named is not None or c.contains(1.0)  # not because the other forms were worse
        notes.append(
            "The best learning rate is "
            + ("modelled" if modelled else "not proportional to the batch here, with or without a cap: it grows")
            + f" as batch^{c.value:.2f}, interval {c.low:.2f} to {c.high:.2f}."
        )
    notes += _sizes(law, points)
    return notes


def _typical(noise: Mapping[Any, float]) -> float:
    return math.sqrt(float(np.mean(np.square(list(noise.values())))))


def _in_nats(law: Law, value: Worth) -> list[str]:
    noise, name = _typical(law.noise), law.chosen.name
    said = (
        f"Held out, the form '{name}' costs {value.mean[name]:.4f} nats on average, the best learning "
        f"rate of the nearest swept cell {value.mean['nearest']:.4f}, one constant learning rate "
        f"{value.mean['constant']:.4f}; the noise of a loss is {noise:.4f}."
    )
    if name != value.chosen:
        said += f" It was named; held-out regret would choose '{value.chosen}', with {value.mean[value.chosen]:.4f}."
    elif value.cannot_tell:
        paper = "the paper's" if value.chosen == "hard" else "the one nearest to the paper's"
        said += (
            f" The ledger cannot distinguish it from {' and '.join(repr(name) for name in value.cannot_tell)}; "
            f"in that case the schedule uses {paper}."
        )
    notes = [said]
    if not value.worth_having:
        notes.append(
            "A law is not worth having here: no form is significantly better than both the best learning rate of the "
            "nearest swept cell and one constant learning rate."
        )
    return notes


def _sizes(law: Law, points: _Points) -> list[str]:
    """Whether one law fits all sizes."""
    usable = [cell for cell in law.cells if cell.usable]
    sizes = list(dict.fromkeys(cell.size for cell in usable))
    if len(sizes) < 2:
        return []
    if law.chosen.central_parameters is not None:
        return [
            "The sizes disagree: at the same batch and horizon the best learning rate scales as parameters^d, d = "
            f"{law.chosen.d}. The law has that exponent, and a prediction needs the number of parameters."
        ]
    residuals = points.residuals(law.chosen)
    apart, few = [], []
    for size in sizes:
        own = residuals[[cell.size == size for cell in usable]]
        if len(own) < 3:
            few.append(name_of(size))
        elif abs(own.mean()) > max(2.6 * own.std(ddof=1) / math.sqrt(len(own)), DISAGREE):
            apart.append(f"{name_of(size)} by a factor of {math.exp(own.mean()):.2f}")
    said = []
    if apart:
        said.append(f"The sizes disagree with one law for all of them: {', '.join(apart)}.")
        if lacking := dict.fromkeys(name_of(cell.size) for cell in usable if not cell.parameters):
            said.append(
                f"The ledger has no `parameters` of {', '.join(lacking)}; with those of all sizes the law can have an "
                "exponent of them."
            )
    elif len(few) < len(sizes):
        said.append("The sizes agree with one law for all of them.")
    if few:
        said.append(f"Fewer than three cells of a size cannot tell whether it agrees: {', '.join(few)}.")
    return [" ".join(said)]


def _flags(cells: tuple[Cell, ...], asymmetry: float) -> list[str]:
    """Which best rates are not used or less reliable, and where the best batch may lie outside the sweep."""
    notes = []
    for flag, meaning in (
        ("edge high", "the best learning rate is the highest of the grid"),
        ("edge low", "the best learning rate is the lowest of the grid"),
        ("diverges above", "the best learning rate is next to one that diverges"),
        ("no minimum", "the losses near the best learning rate have no minimum"),
        ("too few rates", "fewer than three learning rates have a finite loss"),
        ("three rates", "the parabola has only three learning rates (used)"),
    ):
        if flagged := [cell for cell in cells if cell.flag == flag]:
            where = ", ".join(f"{name_of(cell.size)} T={cell.tokens:,} batch {cell.batch:g}" for cell in flagged[:4])
            notes.append(
                f"{len(flagged)} of {len(cells)} cells: {meaning} ({where}{', …' if len(flagged) > 4 else ''})."
            )
    if abs(asymmetry) > MOST_LOPSIDED:
        faster, low = ("above", "low") if asymmetry > 0 else ("below", "high")
        notes.append(
            f"Losses rise so much faster {faster} the best learning rates than on the other side (asymmetry "
            f"{asymmetry:.2f}) that only {MOST_LOPSIDED:g} of it is corrected for: the best learning rates may be too "
            f"{low}, by more than the intervals show. Learning rates closer to each other would show them."
        )
    edges = []
    for size, tokens in dict.fromkeys((cell.size, cell.tokens) for cell in cells):
        here = sorted((c for c in cells if (c.size, c.tokens) == (size, tokens)), key=lambda c: c.batch)
        best = min(here, key=lambda c: min(c.losses))
        if best in (here[0], here[-1]):
            edges.append(f"{name_of(size)} T={tokens:,} batch {best.batch:g}")
    if edges:
        notes.append(
            f"The best batch is the smallest or the largest of the sweep at {len(edges)} (size, horizon): "
            f"{', '.join(edges[:6])}{', …' if len(edges) > 6 else ''}."
        )
    return notes
