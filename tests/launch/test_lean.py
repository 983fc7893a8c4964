"""The lean sweep, replayed on ledgers that have the whole grid."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from powertrain.launch.sweep.lean import Design, Place, bracket, trained_tokens
from powertrain.launch.sweep.progress import Progress, lean_design, place_of
from powertrain.launch.sweep.tables import summary
from powertrain.launch.sweep.trials import plan, sweep_config
from powertrain.schedulers.cells import Cell
from powertrain.schedulers.held_out import regret_of
from powertrain.schedulers.law import Form, fit
from powertrain.train.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
Losses = dict[tuple[Place, float], float]


def as_losses(ledger: list[dict[str, Any]]) -> Losses:
    return {
        ((f"{line['family']} {line['hidden_size']}", line["batch"], line["tokens"]), line["lr"]): (
            math.inf if line["loss"] is None else line["loss"]
        )
        for line in ledger
    }


def design_of(losses: Losses, **more: Any) -> Design:
    grid: dict[Place, list[float]] = {}
    for place, rate in losses:
        grid.setdefault(place, []).append(rate)
    return Design(grid, **more)


def regret(form: Form, cells: list[Cell]) -> float:
    """Mean nats above the least loss of each cell at the form's learning rate."""
    return float(np.mean([regret_of(c)(math.log(form.lr(c.batch, c.tokens, c.parameters).value)) for c in cells]))


def planted(seed: int, noise: float = 0.004) -> list[dict[str, Any]]:
    """A smooth law with numbers of its own: b, cap, level, curvature and scatter drawn, two sizes."""
    draw = np.random.default_rng(seed)
    b, cap, level = draw.uniform(-0.6, -0.4), draw.uniform(0.01, 0.03), draw.uniform(0.01, 0.04)
    rates = [0.0005 * 2**i for i in range(8)]
    lines = []
    for width in (32, 64):
        for tokens in (10**6, 2 * 10**6, 4 * 10**6, 8 * 10**6, 16 * 10**6, 32 * 10**6):
            for batch in (0.125, 0.25, 0.5, 1, 2, 4, 8):
                line = level * batch * (tokens / 5e6) ** b
                best = math.log(1 / (1 / cap + 1 / line)) + draw.normal(0, 0.1)
                least = 2 + (1e6 / tokens) ** 0.3 + 0.05 * abs(math.log(batch))
                for rate in rates:
                    away = math.log(rate) - best
                    loss = least + 0.03 * away**2 + draw.normal(0, noise)
                    lines.append({"family": "granite", "hidden_size": width, "batch": batch, "lr": rate,
                                  "tokens": tokens, "loss": loss, "parameters": 1000 * width})  # fmt: skip
    return lines


def test_five_percent_of_the_committed_sweep_are_worth_the_whole() -> None:
    lines = [json.loads(line) for line in (ROOT / "docs/results/law/ledger.jsonl").read_text().splitlines()]
    single = [line for line in lines if line["seed"] == 0]
    losses = as_losses(single)
    whole = trained_tokens(losses, 0.1)
    design = design_of(losses, budget=0.05 * whole)
    design.advance(losses)
    asked = [line for line in single if as_losses([line]).keys() <= design.losses.keys()]
    law = fit(lines, replicates=20)
    cells = [cell for cell in law.cells if cell.usable]
    assert trained_tokens(design.losses, 0.1) <= 0.05 * whole
    assert regret(fit(asked, replicates=20).chosen, cells) <= 1.1 * regret(law.chosen, cells)


def test_planted_laws_are_found_from_a_twentieth_of_the_tokens() -> None:
    lost = []
    for seed in range(4):
        ledger = planted(seed)
        losses = as_losses(ledger)
        design = design_of(losses, budget=0.05 * trained_tokens(losses, 0.1))
        design.advance(losses)
        asked = [line for line in ledger if as_losses([line]).keys() <= design.losses.keys()]
        whole, lean = fit(ledger, replicates=2), fit(asked, replicates=2)
        cells = [cell for cell in whole.cells if cell.usable]
        lost.append(regret(lean.forms["smooth"], cells) - regret(whole.forms["smooth"], cells))
    assert np.median(lost) < 0.0005 and max(lost) < 0.003  # 0.004 is the noise of a loss


def test_the_order_in_which_trials_end_changes_nothing() -> None:
    losses = as_losses(planted(0))
    at_once = design_of(losses, budget=5e7)
    at_once.advance(losses)
    one_by_one, draw, known = design_of(losses, budget=5e7), random.Random(0), {}
    while one_by_one.step.trials:
        assert {trial for trial in known if trial in one_by_one.step.trials} <= one_by_one.asked
        trial = draw.choice([trial for trial in one_by_one.step.trials if trial not in known])
        known[trial] = losses[trial]
        one_by_one.advance(known)
        if draw.random() < 0.1:  # killed: a new process knows the ledger alone
            one_by_one = design_of(losses, budget=5e7)
            one_by_one.advance(known)
    assert list(one_by_one.losses) == list(at_once.losses) == [*known] or one_by_one.losses == at_once.losses
    assert known.keys() == at_once.losses.keys()  # and nothing was trained that was not needed


@pytest.mark.parametrize("budget", [5e6, 5e7, 1e8])
def test_a_budget_is_kept_and_a_fit_can_be_made_of_what_it_buys(budget: float) -> None:
    ledger = planted(3)
    losses = as_losses(ledger)
    design = design_of(losses, budget=budget)
    design.advance(losses)
    assert 0 < trained_tokens(design.losses, 0.1) == design.trained <= budget
    assert "tokens" in design.step.reason or "No cell" in design.step.reason
    if budget > 1e7:
        fit([line for line in ledger if as_losses([line]).keys() <= design.losses.keys()], replicates=1)


LEAN: dict[str, Any] = {
    "name": "s", "design": "lean", "models": {"small": {"hidden_size": 32}}, "batch": [0.03125, 0.0625, 0.125],
    "tokens": [10_240, 20_480, 40_960], "schedules": {"wsd": {"lr": [0.002 * 2**i for i in range(6)]}}, "min_steps": 20,
}  # fmt: skip


@pytest.mark.parametrize("budget", [245_760, 262_144, 300_000, 400_000])
def test_what_a_fit_needs_comes_before_cells_that_tell_more(budget: int) -> None:
    # By hand: 4 rates of 10,240 tokens at two batches; then 20,480 and 40,960 behind it, three of four on a trunk:
    # 2 · 40,960 + (81,920 − 3 · 9,216) + (163,840 − 3 · 18,432) = 244,736. Greed alone buys two horizons.
    sweep = sweep_config({**LEAN, "budget_tokens": budget})
    design = lean_design(sweep, plan(sweep))
    design.advance({
        (place, rate): 3 + 0.05 * math.log(rate / (0.2 * place[1] * (place[2] / 20_480) ** -0.5)) ** 2
        for place, rates in design.grid.items() for rate in rates
    })  # fmt: skip
    assert design.trained <= budget
    assert len({tokens for (_, _, tokens), _ in design.losses}) == 3
    assert len({batch for (_, batch, _), _ in design.losses}) >= 2


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"budget_tokens": 240_000}, "take about 244,736 tokens"),
        ({"tokens": [10_240, 20_480]}, "has 2 of sweep.tokens and 3 of sweep.batch"),
        ({"batch": [0.0625]}, "has 3 of sweep.tokens and 1 of sweep.batch"),
        ({"max_steps": 50}, "20 to 50 steps"),
    ],
)
def test_a_lean_sweep_that_no_law_could_come_from_is_refused(changes: dict[str, Any], said: str) -> None:
    sweep = sweep_config({**LEAN, **changes})
    with pytest.raises(ConfigError, match=said):
        lean_design(sweep, plan(sweep))


def test_trials_that_other_settings_asked_for_are_not_counted() -> None:
    sweep = sweep_config({**LEAN, "budget_tokens": 10**6})
    trials = plan(sweep)
    design = lean_design(sweep, trials)
    asked = [trial for trial in trials if place_of(trial) in design.asked]
    other = next(trial for trial in trials if trial.tokens == 40_960)
    progress = Progress(trials, {trial.name: {"loss": 3.0 + dict(trial.fields)["lr"]} for trial in [*asked, other]})
    held: Any = SimpleNamespace(sweep=sweep, trials=trials, design=design)
    assert summary(held, progress).startswith(
        f"3 trials done, {sum(trial.tokens for trial in asked):,} of 1,000,000 tokens trained "
        "(1 more that these settings"
    )


def test_a_sweep_that_ends_without_a_law_says_so() -> None:
    sweep = sweep_config(LEAN)
    design = lean_design(sweep, plan(sweep))
    design.advance(
        {(place, rate): rate for place, rates in design.grid.items() for rate in rates}
    )  # the lowest is best
    assert not design.step.trials and "too little for a law" in design.step.reason
    assert "bracketed" not in design.step.reason  # none is
    assert "4 of the 4 trained cells have no best learning rate inside the grid" in design.step.reason
    assert "5 of the 9 cells are not trained" in design.step.reason  # since their best one is expected to be lower yet
    assert "outside the grid: add lower learning rates" in design.step.reason


@pytest.mark.parametrize("seed", range(3))
def test_no_tokens_are_spent_where_the_best_rate_is_expected_outside_the_grid(seed: int) -> None:
    """Of these learning rates, half the cells have their best one below the lowest: long horizons, small batches."""
    lines = [line for line in planted(seed) if line["lr"] >= 0.004]
    losses = as_losses(lines)
    design = design_of(losses, budget=0.1 * trained_tokens(losses, 0.1))
    design.advance(losses)
    cells = fit([line for line in lines if as_losses([line]).keys() <= design.losses.keys()], replicates=2).cells
    assert sum(cell.usable for cell in cells) > 0.5 * len(cells)


def test_a_target_draws_the_trials_towards_it() -> None:
    losses = as_losses(planted(1))

    def longest(target: tuple[float, float]) -> int:
        design = design_of(losses, target=target, budget=3e8)
        design.advance(losses)
        return max(tokens for (_, _, tokens), _ in design.losses)

    assert longest((4, 1e9)) > longest((0.5, 1e6))


def test_it_ends_when_no_cell_helps_and_when_all_are_bracketed() -> None:
    losses = as_losses(planted(2))
    design = design_of(losses)
    design.advance(losses)
    assert len(design.losses) < 0.5 * len(losses)
    assert "No cell would lower the expected regret" in design.step.reason
    few = {trial: loss for trial, loss in losses.items() if trial[0][1] == 1 and trial[0][0].endswith("32")}
    design = design_of(few)
    design.advance(few)
    assert not design.step.trials


@pytest.mark.parametrize(
    ("losses", "asked"),
    [
        ({}, [0.02, 0.04, 0.08]),  # around the prediction
        ({0.02: 3.0, 0.04: 2.0, 0.08: 2.5}, [0.16]),  # a fourth for the parabola: on the lower side
        ({0.02: 2.2, 0.04: 2.0, 0.08: 2.5}, [0.01]),
        ({0.02: 2.0, 0.04: 2.1, 0.08: 2.5}, [0.01]),  # the best has no neighbour below
        ({0.02: math.inf, 0.04: math.inf, 0.08: math.inf}, [0.01]),  # all diverged: lower
        ({0.02: 3.0, 0.04: 2.0, 0.08: 2.5, 0.16: 2.9}, []),
        ({0.04: 3.0, 0.08: 2.5, 0.16: 2.4}, []),  # an end of the grid cannot be bracketed
    ],
)
def test_the_best_rate_is_bracketed(losses: Mapping[float, float], asked: list[float]) -> None:
    assert bracket([0.01, 0.02, 0.04, 0.08, 0.16], losses, predicted=0.045) == asked


def test_shared_trunks_are_counted_once() -> None:
    # By hand: 100, then from its decay's start at 90 to 200, then from 180 to 400; another trunk by itself.
    losses = [(("m", 1.0, tokens), 0.1) for tokens in (400, 100, 200)] + [(("m", 1.0, 100), 0.2)]
    assert trained_tokens(losses, 0.1) == pytest.approx(100 + 110 + 220 + 100)


def test_a_sweep_runs_what_its_design_asks_for_and_nothing_else() -> None:
    sweep = sweep_config({
        "name": "s", "design": "lean", "models": {"small": {"hidden_size": 32}}, "batch": [0.25, 0.5, 1],
        "tokens": [409_600, 819_200, 1_638_400], "schedules": {"wsd": {"lr": [0.01, 0.02, 0.04, 0.08, 0.16, 0.32]}},
    })  # fmt: skip
    trials = plan(sweep)
    results: dict[str, dict[str, Any]] = {}
    while ready := Progress(trials, results, (), lean_design(sweep, trials)).ready():
        design = lean_design(sweep, trials)
        progress = Progress(trials, results, (), design)
        assert {place_of(trial) for trial in ready} <= set(design.step.trials)
        assert all(
            progress.skip_reason(trial) == "not asked" for trial in trials if place_of(trial) not in design.asked
        )
        trial = ready[-1]
        (_, batch, tokens), rate = place_of(trial)
        best = math.log(0.08 * batch * (tokens / 409_600) ** -0.5)
        # Above 0.2 a trial diverges.
        results[trial.name] = {"loss": None if rate > 0.2 else 2 + 0.05 * (math.log(rate) - best) ** 2}
    progress = Progress(trials, results, (), lean_design(sweep, trials))
    assert not progress.open() and 9 <= len(results) < len(trials)
    # One that breaks keeps the sweep from going on, since what comes next depends on it.
    first = Progress(trials, {}, (), lean_design(sweep, trials)).ready()
    assert first[0] not in Progress(trials, {}, {first[0].name}, lean_design(sweep, trials)).ready()
