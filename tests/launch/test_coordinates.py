from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from powertrain.launch.check import coordinates, probes
from powertrain.train.compose import composed
from powertrain.train.config import MODELS, Config
from powertrain.train.errors import ConfigError
from powertrain.train.model import mup

INTERNAL = ("attention", "attention_out", "router", "gate_up", "down", "shared_down")


def default(family: str, *more: str) -> Config:
    return composed([*coordinates.DEFAULTS, f"model.model_type={family}", *more])


@pytest.fixture
def one_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Enough for a broken table: it fails for each seed (docs/coordinates.md)."""
    monkeypatch.setattr(probes, "SEEDS", (0,))


def broken(role: str, **changes: Callable[[mup.Row, float], float]) -> probes.Rows:
    """muP's table but for one row, whose fields are changed by functions of (the row, m_width)."""

    def rows_of(config: Config) -> dict[str, mup.Row]:
        rows, m_width = mup.table(config), mup.width_multiplier(config)
        changed = {field: change(rows[role], m_width) for field, change in changes.items()}
        return {**rows, role: replace(rows[role], **changed)}

    return rows_of


def rate(exponent: float) -> Callable[[mup.Row, float], float]:
    return lambda row, m_width: row.rate_multiplier * m_width**exponent


def std(exponent: float) -> Callable[[mup.Row, float], float]:
    def change(row: mup.Row, m_width: float) -> float:
        assert row.std is not None
        return row.std * m_width**exponent

    return change


@pytest.mark.parametrize("family", ["granitemoeshared", "granite"])  # the first has all that granitemoe has
def test_the_table_passes_for_every_seed(family):
    results = probes.check(default(family, "batch.sequences=2"))
    assert [result.name for result in results if not result.passed] == []
    assert all(len(result.slopes) == 3 for result in results)
    watched = {result.row for result in results}
    assert watched == set(mup.table(default(family))) - ({"router"} if family == "granite" else set())


@pytest.mark.slow
@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("more", [(), ("mup.rule=fan_in",), ("model.tie_word_embeddings=false",)], ids=str)
def test_the_table_passes_as_the_command_runs_it(family, more):
    assert probes.at_fault(probes.check(default(family, *more))) == []


def test_a_router_at_the_full_rate_is_named(one_seed):
    results = probes.check(default("granitemoe"), broken("router", rate_multiplier=rate(1)))
    assert probes.at_fault(results) == ["router"]


@pytest.mark.slow
@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("role", INTERNAL)
@pytest.mark.parametrize(
    "changes",
    [{"rate_multiplier": rate(1)}, {"rate_multiplier": rate(0.5)}, {"std": std(0.5)}],
    ids=["η", "η/√m", "std"],
)
def test_a_broken_internal_row_is_named_alone(family, role, changes, one_seed):
    if (family, role) == ("granite", "router") or role not in mup.table(default(family)):
        pytest.skip("the family has no such tensor")
    assert probes.at_fault(probes.check(default(family), broken(role, **changes))) == [role]


@pytest.mark.slow
@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize(
    ("role", "changes"),
    [
        ("embedding", {"rate_multiplier": rate(-1)}),
        ("embedding", {"std": std(-0.5)}),
        ("head", {"rate_multiplier": rate(-1)}),
        ("head", {"std": std(-0.5)}),
        ("norm", {"rate_multiplier": rate(-1)}),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_a_row_that_must_not_shrink_with_width_is_named_alone(family, role, changes, one_seed):
    config = default(family, "model.tie_word_embeddings=false")
    assert probes.at_fault(probes.check(config, broken(role, **changes))) == [role]


@pytest.mark.slow
@pytest.mark.parametrize("family", MODELS)
def test_a_tied_embedding_is_named_together_with_its_head(family, one_seed):
    results = probes.check(default(family), broken("embedding", rate_multiplier=rate(-1)))
    assert probes.at_fault(results) == ["embedding", "head"]


@pytest.mark.slow
@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize(
    ("name", "value", "named"),
    [
        ("logits_scaling", lambda config: 1.0, ["head"]),
        ("attention_multiplier", lambda config: 1 / config.model.hidden_size, ["attention"]),
        ("embedding_multiplier", lambda config: 1 / mup.width_multiplier(config), ["embedding"]),
        # The head size is the same at every width, so its root is a constant too: documented as not visible.
        ("attention_multiplier", lambda config: 32**-0.5, []),
    ],
    ids=["no logits scaling", "attention ÷ width", "embedding ÷ m", "attention ÷ √head size"],
)
def test_a_wrong_forward_multiplier_is_named(family, name, value, named, monkeypatch, one_seed):
    right = mup.multipliers
    monkeypatch.setattr(mup, "multipliers", lambda config: {**right(config), name: value(config)})
    assert probes.at_fault(probes.check(default(family))) == named


def test_outputs_name_rows_only_where_no_tensor_does():
    def result(kind: str, row: str, slope: float) -> probes.Result:
        return probes.Result(kind, row, row, [1, 2], [[1.0, 2**slope]])

    inside, output, tensor = result("init", "norm", 0.2), result("output", "down", 0.7), result("update", "router", 0.4)
    assert probes.at_fault([inside]) == []
    assert probes.at_fault([inside, output]) == ["down"]
    assert probes.at_fault([inside, output, tensor]) == ["router"]


def test_a_tensor_that_did_not_move_fails():
    assert not probes.Result("update", "router", "router", [1, 2], [[0.0, 0.0]]).passed


def test_the_command_says_which_row_and_draws(tmp_path, capsys):
    plot = tmp_path / "plot.png"
    overrides = ["model.model_type=granite", "batch.sequences=2", "model.logits_scaling=1"]
    assert coordinates.main([*overrides, "--plot", str(plot)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "FAIL: at fault in the muP table: head (granite)."
    assert [line.split()[1] for line in lines if line.endswith("FAIL")] == ["logits", "lm_head"]
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_a_plot_without_a_folder_is_refused_before_anything_is_trained(tmp_path):
    with pytest.raises(ConfigError, match="there is no folder"):
        coordinates.main(["--plot", str(tmp_path / "none" / "plot.png")])
