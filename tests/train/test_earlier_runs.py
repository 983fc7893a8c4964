"""A run folder that an earlier version wrote resumes. tests/earlier/ is one of 0.1.0, with one checkpoint of step 6."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from conftest import tiny_overrides, train_here

from powertrain.train.track import read_lines

EARLIER = Path(__file__).parents[1] / "earlier"
SETTINGS = (
    *("run.name=earlier", "checkpoint.every=6", "checkpoint.keep=3"),
    *("model.hidden_size=16", "model.intermediate_size=8", "model.num_hidden_layers=1", "model.num_attention_heads=1"),
)


def test_a_run_of_an_earlier_version_resumes(
    words: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(EARLIER, tmp_path / "earlier")
    (tmp_path / "words").symlink_to(words)
    monkeypatch.chdir(tmp_path)  # where its corpus is words/*.txt
    folder = train_here(tiny_overrides(Path("words"), cache, tmp_path, *SETTINGS))
    whole, resumed = (read_lines(path / "metrics.jsonl") for path in (EARLIER, folder))
    assert [line["step"] for line in resumed] == list(range(1, 13))
    assert resumed[:6] == whole[:6]  # not trained again
    for line, wanted in zip(resumed[6:], whole[6:], strict=True):
        assert wanted.keys() <= line.keys()
        for name in ("step", "tokens", "samples", "lr", "batch", "phase", "skipped"):
            assert line[name] == wanted[name]
        for name in ("lm_loss", "balance_loss", "z_loss", "grad_norm"):  # another processor rounds otherwise
            assert line[name] == pytest.approx(wanted[name], rel=1e-4)
    starts = json.loads((folder / "run.json").read_text())["starts"]
    assert [start["from"] and Path(start["from"]).name for start in starts] == [None, "step-00000006"]
    assert starts[0]["versions"]["powertrain"] == "0.1.0"
