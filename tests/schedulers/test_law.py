"""The fit of the law: exact where it has to be, honest where it cannot know, and right about how sure it is."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from schedulers import law

Line = dict[str, Any]


def planted(
    a: float,
    b: float,
    c: float,
    *,
    batches: Sequence[float],
    tokens: Sequence[int],
    rates: Sequence[float],
    sizes: Sequence[int] = (32,),
    curvature: float = 0.03,
    lopsided: float = 0.0,
    noise: float = 0.0,
    shared: float = 0.5,
    seed: int = 0,
) -> list[Line]:
    """A ledger whose best rates are a · batch^c · tokens^b.

    Losses rise by curvature · d² (1 ± lopsided) at a distance d = log(rate / best) above and below the best rate, the
    best batch grows with the horizon, rates twelve times too high diverge, and a trunk's noise is partly common.
    """
    draw = np.random.default_rng(seed)
    ledger = []
    for size in sizes:
        for batch in batches:
            for rate in rates:
                common = draw.normal()
                for horizon in tokens:
                    distance = math.log(rate / (a * batch**c * horizon**b))
                    middle = batches[len(batches) // 2] * (horizon / tokens[len(tokens) // 2]) ** 0.4
                    loss = 2 + 3 * (horizon / tokens[0]) ** -0.2 + 0.003 * math.log(batch / middle) ** 2
                    loss += curvature * distance**2 * (1 + lopsided * math.tanh(distance))
                    loss += noise * (math.sqrt(shared) * common + math.sqrt(1 - shared) * draw.normal())
                    line = {"hidden_size": size, "batch": batch, "lr": rate, "tokens": horizon}
                    ledger.append({**line, "loss": None if distance > math.log(12) else loss})
    return ledger


BATCHES = [0.25, 0.5, 1.0, 2.0, 4.0]
TOKENS = [2**k * 1_000_000 for k in range(6)]
RATES = [0.0005 * 2**k for k in range(10)]


def around(b: float, c: float) -> float:
    """The a that puts the best rate of the middle batch and horizon at 0.01."""
    return 0.01 / (BATCHES[2] ** c * TOKENS[3] ** b)


def test_without_noise_both_readings_return_what_was_planted() -> None:
    for b, c in ((-0.5, 1.0), (-0.1, 0.1)):
        found = law.fit(planted(around(b, c), b, c, batches=BATCHES, tokens=TOKENS, rates=RATES), replicates=50)
        assert found.plane.b.value == pytest.approx(b, abs=1e-9)
        assert found.plane.c.value == pytest.approx(c, abs=1e-9)
        assert found.plane.lr(1.0, TOKENS[3]).value == pytest.approx(0.01, rel=1e-9)
        assert found.proportional == (c == 1.0)
        if c == 1.0:
            assert found.paper.b.value == pytest.approx(b, abs=1e-9)
            assert found.paper.a.value == pytest.approx(around(b, c), rel=1e-6)


def test_the_papers_own_grid_returns_the_papers_law() -> None:
    """4.6 · tokens^-0.51 at the batches, horizons, rates and widths of its table 3, with noise and lopsided losses."""
    ledger = planted(
        4.6,
        -0.51,
        1.0,
        batches=[16, 32, 64, 128, 256, 512],
        tokens=[2**k * 10**9 for k in range(1, 9)],
        rates=[0.0002 * 2**k for k in range(8)],
        sizes=(128, 256, 512),
        noise=0.002,
        lopsided=0.2,
    )
    found = law.fit(ledger)
    assert found.paper.b.value == pytest.approx(-0.51, abs=0.02)
    assert all(size.b.value == pytest.approx(-0.51, abs=0.02) for size in found.sizes.values())
    assert found.proportional and found.chosen is found.paper
    # The paper's example: 1e13 tokens at a batch of 1024 give a rate of about 0.0011.
    assert found.paper.lr(1024, 1e13).value == pytest.approx(0.0011, rel=0.15)


def test_a_parabola_goes_through_the_four_best_rates_as_numpys_does() -> None:
    draw = np.random.default_rng(3)
    rates = [0.001 * 2**k for k in range(8)]
    ledger = planted(around(-0.3, 0.6), -0.3, 0.6, batches=BATCHES, tokens=TOKENS, rates=rates)
    for line in ledger:
        line["loss"] = line["loss"] and line["loss"] + 0.002 * draw.normal()
    trials = law._Trials(ledger)
    for index in range(len(trials.cells)):
        x, y = trials.log_rates(index), trials.cell_losses(index)
        parabola = law._parabola(x, y, np.zeros(1))
        best = int(y[0].argmin())
        if not parabola.usable[0]:
            continue
        window = [best - 1, best, best + 1]
        beside = [i for i in (best - 2, best + 2) if 0 <= i < len(x) and np.isfinite(y[0, i])]
        window = sorted([*window, min(beside, key=lambda i: y[0, i])])
        square, slope, _ = np.polyfit(x[window], y[0, window], 2)
        assert parabola.log_lr[0] == pytest.approx(-slope / (2 * square), rel=1e-6)
        assert parabola.curvature[0] == pytest.approx(square, rel=1e-6)


def test_the_plane_is_ordinary_least_squares_through_the_usable_best_rates() -> None:
    ledger = planted(around(-0.3, 0.6), -0.3, 0.6, batches=BATCHES, tokens=TOKENS, rates=RATES, noise=0.004, seed=5)
    found = law.fit(ledger, replicates=20)
    usable = [cell for cell in found.cells if cell.usable]
    design = np.array([[1.0, math.log(cell.tokens), math.log(cell.batch)] for cell in usable])
    expected = np.linalg.lstsq(design, np.log([cell.lr for cell in usable]), rcond=None)[0]
    assert [math.log(found.plane.a.value), found.plane.b.value, found.plane.c.value] == pytest.approx(
        expected, rel=1e-6
    )


def test_the_papers_reading_averages_gamma_over_the_three_batches_of_least_loss() -> None:
    ledger = planted(around(-0.3, 0.6), -0.3, 0.6, batches=BATCHES, tokens=TOKENS, rates=RATES, noise=0.004, seed=6)
    found = law.fit(ledger, replicates=20)
    points = []
    for tokens in TOKENS:
        here = sorted((c for c in found.cells if c.tokens == tokens and c.usable), key=lambda c: c.loss)[:3]
        assert {c.batch for c in here} == {c.batch for c in found.best if c.tokens == tokens}
        points.append((math.log(tokens), math.log(sum(c.lr / c.batch for c in here) / 3)))
    slope, _ = np.polyfit(*zip(*points, strict=True), 1)
    assert found.paper.b.value == pytest.approx(slope, rel=1e-6)


def test_lopsided_losses_do_not_move_the_best_rate() -> None:
    """A parabola alone would put it a tenth too low: losses rise faster above the best rate."""
    grid = {"batches": BATCHES, "tokens": TOKENS, "rates": RATES, "lopsided": 0.3}
    found = law.fit(planted(around(-0.5, 1.0), -0.5, 1.0, **grid), replicates=20)
    assert found.paper.lr(1.0, TOKENS[3]).value == pytest.approx(0.01, rel=0.04)


def test_a_seed_more_at_a_point_counts_as_a_mean_and_tells_the_noise() -> None:
    grid = {"batches": BATCHES, "tokens": TOKENS, "rates": RATES}
    ledger = planted(around(-0.5, 1.0), -0.5, 1.0, **grid)
    repeated = [{**line, "seed": 1} for line in ledger if line["batch"] == 1.0 and line["lr"] == RATES[4]]
    for line, sign in zip(repeated, (1, -1) * 3, strict=True):
        line["loss"] += 0.1 * sign
    found = law.fit([*ledger, *repeated], replicates=50)
    cell = next(c for c in found.cells if c.batch == 1.0 and c.tokens == TOKENS[0])
    plain = next(c for c in law.fit(ledger, replicates=1).cells if c.batch == 1.0 and c.tokens == TOKENS[0])
    assert cell.losses[4] == pytest.approx(plain.losses[4] + 0.05)
    assert max(found.noise.values()) > 0.01


def intervals(number: int) -> tuple[Line, law.Law]:
    """A random sweep and its fit."""
    draw = np.random.default_rng(1000 + number)
    b = draw.uniform(-0.6, -0.1)
    c = 1.0 if draw.random() < 0.5 else draw.uniform(0.0, 1.0)
    spacing = 2.0 if draw.random() < 0.5 else math.sqrt(2)
    count = 9 if spacing == 2.0 else 17
    shift = draw.uniform(0.7, 1.4)
    truth = {"a": around(b, c), "b": b, "c": c}
    ledger = planted(
        **truth,
        batches=BATCHES,
        tokens=TOKENS,
        rates=[0.01 * shift * spacing ** (k - count // 2) for k in range(count)],
        sizes=(32, 64) if draw.random() < 0.5 else (32,),
        curvature=draw.uniform(0.015, 0.05),
        lopsided=draw.uniform(0.0, 0.4),
        noise=draw.choice([0.0005, 0.002, 0.006]),
        shared=draw.uniform(0, 1),
        seed=number,
    )
    return truth, law.fit(ledger, replicates=300)


@pytest.mark.slow
def test_intervals_of_two_hundred_sweeps_contain_the_truth() -> None:
    hits: dict[str, list[bool]] = {"a": [], "b": [], "c": [], "paper b": [], "paper a": []}
    for number in range(200):
        truth, found = intervals(number)
        for name in ("a", "b", "c"):
            hits[name].append(getattr(found.plane, name).contains(truth[name]))
        if truth["c"] == 1.0:
            hits["paper b"].append(found.paper.b.contains(truth["b"]))
            hits["paper a"].append(found.paper.a.contains(truth["a"]))
    shares = {name: sum(hit) / len(hit) for name, hit in hits.items()}
    assert len(hits["paper b"]) > 60
    assert min(shares.values()) >= 0.9, shares


def test_intervals_are_not_wider_than_they_have_to_be() -> None:
    """Against the errors of b over sweeps that differ in their noise: endless intervals contain every truth."""
    errors, widths = [], []
    for seed in range(25):
        ledger = planted(
            around(-0.5, 1), -0.5, 1, batches=BATCHES, tokens=TOKENS, rates=RATES, noise=0.004, shared=0.3, seed=seed
        )
        b = law.fit(ledger, replicates=100, seed=seed).plane.b
        errors.append(b.value + 0.5)
        widths.append(b.high - b.low)
    assert 0.6 < np.median(widths) / (2 * 1.96 * np.std(errors)) < 2.0


def usable_flags(ledger: list[Line]) -> set[str]:
    return {cell.flag for cell in law.fit(ledger, replicates=5).cells}


def test_a_minimum_at_the_edge_of_the_rates_is_flagged_and_not_used() -> None:
    ledger = planted(around(-0.5, 1.0), -0.5, 1.0, batches=BATCHES, tokens=TOKENS, rates=RATES[3:8])
    found = law.fit(ledger, replicates=5)
    for cell in found.cells:
        best = 0.01 * cell.batch * (cell.tokens / TOKENS[3]) ** -0.5
        if sum(map(math.isfinite, cell.losses)) < 3:
            continue
        if best < RATES[3] / math.sqrt(2):
            assert cell.flag == "edge low"
        if best > RATES[7] * math.sqrt(2):
            assert cell.flag == "edge high"
    assert {"", "edge low", "edge high"} <= {cell.flag for cell in found.cells}
    assert all(cell.usable for cell in found.best)
    assert any("highest of the grid" in note for note in found.flags)
    assert found.plane.b.value == pytest.approx(-0.5, abs=1e-6)


def test_a_best_rate_next_to_one_that_diverged_is_no_minimum() -> None:
    ledger = planted(around(-0.5, 1.0), -0.5, 1.0, batches=BATCHES, tokens=TOKENS, rates=RATES)
    for line in ledger:
        if line["batch"] == 1.0 and line["tokens"] == TOKENS[3] and line["lr"] > 0.011:
            line["loss"] = None
    cell = next(c for c in law.fit(ledger, replicates=5).cells if (c.batch, c.tokens) == (1.0, TOKENS[3]))
    assert cell.flag == "diverges above" and not cell.usable


def test_three_rates_are_used_with_a_flag() -> None:
    ledger = planted(around(-0.2, 0.1), -0.2, 0.1, batches=BATCHES, tokens=TOKENS, rates=[0.005, 0.01, 0.02])
    assert "three rates" in usable_flags(ledger)


def without(condition: Callable[[Line], bool]) -> list[Line]:
    ledger = planted(around(-0.5, 1.0), -0.5, 1.0, batches=BATCHES, tokens=TOKENS, rates=RATES)
    return [line for line in ledger if not condition(line)]


@pytest.mark.parametrize(
    ("ledger", "said"),
    [
        ([], "nothing to fit"),
        (without(lambda line: line["batch"] != 1.0), "single batch size"),
        (without(lambda line: line["tokens"] not in TOKENS[:2]), "2 of them: sweep more horizons"),
        (without(lambda line: line["lr"] > 0.002), "add higher rates"),
        (without(lambda line: line["lr"] < 0.05), "add lower rates"),
        (without(lambda line: line["lr"] not in RATES[4:6]), "parabola takes three"),
        ([{**line, "loss": None} for line in without(lambda line: False)], "too few rates"),
        ([{"lr": 0.1, "batch": 1, "tokens": 5}], "hidden_size, loss"),
        ([{**without(lambda line: False)[0], "batch": -1}], "above 0"),
    ],
)
def test_what_cannot_be_fitted_is_refused_with_what_is_missing(ledger: list[Line], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        law.fit(ledger, replicates=5)


def test_trials_of_other_schedules_are_left_out_and_a_line_given_twice_counts_once() -> None:
    ledger = planted(around(-0.5, 1.0), -0.5, 1.0, batches=BATCHES, tokens=TOKENS, rates=RATES)
    cosine = [{**line, "schedule": "cosine", "loss": 9.0} for line in ledger]
    power = [{"schedule": "power", "a": 1, "b": -0.5, "tokens": 10, "loss": 9.0}]
    expected = law.fit(ledger, replicates=5).paper.b.value
    assert law.fit([*ledger, *cosine, *power, *ledger], replicates=5).paper.b.value == expected


def test_outside_the_swept_range_is_told() -> None:
    found = law.fit(planted(around(-0.5, 1.0), -0.5, 1.0, batches=BATCHES, tokens=TOKENS, rates=RATES), replicates=5)
    assert found.outside(1.0, 4e6) == []
    (told,) = found.outside(1024, 4e6)
    assert "1,024" in told and "256" in told  # 1024 is 256 times the largest batch
    assert len(found.outside(1024, 1e12)) == 2


def test_the_error_foretold_by_a_pilot_is_the_error_of_the_sweep() -> None:
    grid = {"batches": BATCHES, "rates": RATES, "noise": 0.004, "shared": 0.0}
    pilots, errors = [], []
    for seed in range(20):
        ledger = planted(around(-0.3, 0.5), -0.3, 0.5, tokens=TOKENS, seed=seed, **grid)
        pilot = [line for line in ledger if line["tokens"] == TOKENS[0]]
        pilots.append(law.expected_error(pilot, [(t, b) for t in TOKENS for b in BATCHES])[2])
        errors.append(law.fit(ledger, replicates=5).plane.b.value + 0.3)
    assert np.median(pilots) == pytest.approx(np.std(errors), rel=0.6)


def test_a_pilot_without_a_minimum_cannot_foretell() -> None:
    ledger = planted(around(-0.5, 1), -0.5, 1, batches=BATCHES, tokens=TOKENS[:1], rates=RATES[:3])
    with pytest.raises(ValueError, match="inside the grid"):
        law.expected_error(ledger, [(10, 1.0), (20, 2.0)])
