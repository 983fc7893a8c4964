"""The bench: what it writes follows from what it measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from powertrain.data.tokens import TokenFile
from powertrain.launch import bench
from powertrain.train import metrics
from powertrain.train.compose import composed

TINY = (
    "model.vocab_size=64",
    "model.hidden_size=16",
    "model.intermediate_size=8",
    "model.num_hidden_layers=1",
    "model.num_attention_heads=2",
    "model.num_local_experts=4",
    "model.num_experts_per_tok=2",
    "data.sequence_length=16",
    "batch.sequences=4",
    "batch.micro_sequences=2",
)


@pytest.mark.slow
def test_everything_is_measured_and_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench, "SHAPES", {"tiny": TINY})
    experts = bench.EXPERTS
    monkeypatch.setattr(bench, "EXPERTS", (*experts, "no_such_thing"))
    monkeypatch.setattr(bench, "PRECISIONS", ("fp32",))
    out = tmp_path / "bench.json"
    with pytest.raises(SystemExit) as ended:
        bench.main(["--rounds", "2", "--steps", "2", "--out", str(out)])
    assert ended.value.code == 0
    (measured,) = json.loads(out.read_text())["shapes"]
    config = composed([*TINY, *bench.RUN])
    assert measured["flops_per_token"] == metrics.flops_per_token(config, metrics.parameters_of(config))
    assert all(measured["tried"][f"trainer/{name}/fp32"] > 0 for name in experts)
    assert "no_such_thing" in measured["tried"]["trainer/no_such_thing/fp32"]  # its error; the rest went on
    ours, theirs = measured["contenders"]
    assert ours.startswith("powertrain/") and theirs.startswith("trainer/")
    for what, runs in measured["runs"].items():
        assert [len(run["seconds"]) for run in runs] == [2, 2]
        speeds = [sum(4 * 16 / seconds for seconds in run["seconds"]) / 2 for run in runs]  # the median of two
        summary = measured["contenders"][what]
        assert summary["tokens_per_second"]["median"] == pytest.approx(sum(speeds) / 2)
        peak = max(measured["peak_flops"].values())
        assert summary["mfu"] == pytest.approx(sum(speeds) / 2 * measured["flops_per_token"] / peak)
    printed = capsys.readouterr().out
    assert f"{measured['speedup']['median']:.2f}" in printed and theirs in printed
    assert not list(tmp_path.glob("runs"))


@pytest.mark.parametrize("name", bench.SHAPES)
def test_every_shape_can_be_trained(name: str) -> None:
    shape = bench.Shape(name, [*bench.SHAPES[name], *bench.RUN], steps=1)
    assert shape.tokens_a_step == 4096 and shape.config.model.is_moe


def test_tokens_are_enough_and_hold_documents(tmp_path: Path) -> None:
    bench.write_tokens(tmp_path / "tokens", composed([*TINY, *bench.RUN]), 20_000)
    file = TokenFile(tmp_path / "tokens")
    assert file.num_tokens > 20_000 and 5 < file.num_documents < 60
    file.check(64)


def test_the_table_says_that_the_machine_was_busy() -> None:
    contender = {
        "tokens_per_second": bench.spread([900.0, 1000.0, 1100.0]),
        "mfu": 0.25,
        "peak_memory": 2**30,
        "seconds_to_first_step": 7.0,
    }
    measured = {
        "name": "small",
        "flops_per_token": 5e7,
        "tokens_a_step": 4096,
        "peak_flops": {"float32": 2e11, "bfloat16": 4e11},
        "contenders": {"powertrain/bf16": contender},
        "tried": {"powertrain/bf16": 1000.0, "trainer/eager/fp32": "out of memory"},
        "speedup": bench.spread([1.5, 2.0, 2.5]),
        "seconds_to_import": 4.0,
        "share_waiting_for_data": 0.001,
        "busy": [0.0, 0.0, 0.05],
    }
    quiet = bench.table(measured)
    assert "1,000" in quiet and "(900 … 1,100)" in quiet and "25.0%" in quiet and "2.00 (1.50 … 2.50)" in quiet
    assert "out of memory" in quiet and "busy" not in quiet
    assert "busy with something else before 1 of 3" in bench.table({**measured, "busy": [0.0, 0.5, 0.0]})
