"""`powertrain merge`: a weighted mean of checkpoints, which acts as a decay."""

from __future__ import annotations

import itertools
import json
import math
import re
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import launch, tiny_overrides, train_here
from safetensors.torch import load_file, save_file
from test_verbs import verb

from powertrain.data.files import sha256
from powertrain.launch.merge import merge_weights
from powertrain.train import checkpoint
from powertrain.train.track import read_lines

EVERY = ("checkpoint.every=2", "checkpoint.keep=9")


@pytest.fixture(scope="module")
def trunk(words: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with checkpoints of steps 2, 4 … 12."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("powertrain.train.report.runs_page", lambda folders: "not drawn")
        return train_here(tiny_overrides(words, cache, tmp_path_factory.mktemp("trunk"), "run.name=trunk", *EVERY))


# Each shape by hand, at the share x of the decay that has passed.
SHAPES: dict[str, Callable[[float], float]] = {
    "linear": lambda x: 1 - x,
    "exponential": lambda x: (math.exp(1 - x) - 1) / (math.e - 1),
    "sqrt": lambda x: 1 - x**0.5,
    "cosine": lambda x: (1 + math.cos(math.pi * x)) / 2,
    "uniform": lambda x: 1 - x,
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("tokens", [[100, 200], [300, 400, 500, 600, 700], [10, 20, 60, 61, 110]])
def test_a_merge_is_the_first_checkpoint_and_decayed_updates(tmp_path: Path, shape: str, tokens: list[int]) -> None:
    """Against the updates themselves, each times the decay's factor, in float64."""
    torch.manual_seed(0)
    count = len(tokens)
    model = torch.nn.Linear(5, 3)
    start, *updates = [
        {name: torch.randn(p.shape, dtype=torch.float64) for name, p in model.named_parameters()} for _ in tokens
    ]
    weights, folders = start, {}
    for number, factor in enumerate(merge_weights(shape, tokens)):
        if number:
            weights = {name: value + updates[number - 1][name] for name, value in weights.items()}
        folder = tmp_path / f"step-{number + 1:08d}"
        folder.mkdir()
        write_weights(folder, {name: value.float() for name, value in weights.items()}, parts=1 + number % 3)
        folders[folder] = factor
    checkpoint.load_weights(folders, model)

    spans = [b - a for a, b in itertools.pairwise(tokens)]
    whole = sum(spans) * count / (count - 1)  # the decay is over a mean interval after the last checkpoint
    for name, parameter in model.named_parameters():
        expected = start[name].clone()
        for number, update in enumerate(updates, 1):
            x = number / count if shape == "uniform" else sum(spans[:number]) / whole
            expected += SHAPES[shape](x) * update[name]
        torch.testing.assert_close(parameter.detach().double(), expected, rtol=0, atol=2e-6)


def test_one_tensor_of_one_checkpoint_is_in_memory_at_a_time(trunk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from powertrain.train.compose import load
    from powertrain.train.model import granite

    read, alive, most = checkpoint.Stored.read, weakref.WeakSet(), []

    def counted(self: checkpoint.Stored, name: str, start: int, stop: int) -> torch.Tensor:
        found = read(self, name, start, stop)
        alive.add(found)
        most.append(len(alive))
        return found

    monkeypatch.setattr(checkpoint.Stored, "read", counted)
    model = granite.build(load(trunk / "config.yaml"))
    checkpoint.load_weights(dict.fromkeys(checkpoint.available(trunk / "checkpoints"), 1 / 6), model)
    assert len(most) == 6 * len(list(model.parameters())) and max(most) == 1


def write_weights(folder: Path, weights: dict[str, torch.Tensor], parts: int) -> None:
    """A checkpoint's weights as `parts` ranks write them (1: one that is not sharded), and a manifest of all files."""
    for old in folder.glob("weights*.safetensors"):
        old.unlink()
    if parts == 1:
        save_file(weights, folder / "weights.safetensors")
    for part in range(parts if parts > 1 else 0):
        pieces = {}
        for name, value in weights.items():
            start, stop = (value.numel() * i // parts for i in (part, part + 1))
            pieces[f"{name}[{start}:{stop}]"] = value.flatten()[start:stop].clone()
        save_file(pieces, folder / f"weights-{part + 1:05d}-of-{parts:05d}.safetensors")
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "manifest.json"]
    entries = {
        path.relative_to(folder).as_posix(): {"size": path.stat().st_size, "sha256": sha256(path)} for path in files
    }
    manifest = {"step": checkpoint.step_of(folder), "files": entries}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def mean_of_exports(run: Path, steps: list[int], weights: list[float], scratch: Path) -> dict[str, torch.Tensor]:
    """In float64."""
    total: dict[str, torch.Tensor] = {}
    for step, weight in zip(steps, weights, strict=True):
        assert verb("export", str(run), "--step", str(step), "--out", str(scratch / f"{step}")) == 0
        for name, value in load_file(scratch / f"{step}/model.safetensors").items():
            total[name] = total.get(name, 0) + weight * value.double()
    return total


def assert_close(folder: Path, expected: dict[str, torch.Tensor]) -> None:
    merged = load_file(folder / "model.safetensors")
    assert merged.keys() == expected.keys() and len(merged) > 10
    for name, value in merged.items():
        torch.testing.assert_close(value.double(), expected[name], rtol=1e-6, atol=1e-7)


def test_the_model_is_the_mean_of_the_exports_and_says_so(
    trunk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in trunk.rglob("*")}
    out = tmp_path / "merged"
    assert verb("merge", str(trunk), "--last", "3", "--out", str(out)) == 0
    assert "checkpoints of steps 8 (0.3333), 10 (0.3333), 12 (0.3333), --weights uniform" in capsys.readouterr().out
    assert_close(out, mean_of_exports(trunk, [8, 10, 12], [1 / 3] * 3, tmp_path))
    record = json.loads((out / "merge.json").read_text())
    assert (record["steps"], record["tokens"], record["weights"]) == ([8, 10, 12], [2048, 2560, 3072], [1 / 3] * 3)
    assert "| merged from | checkpoints of steps 8 (0.3333), 10" in (out / "README.md").read_text(encoding="utf-8")
    assert verb("generate", str(out), "abc", "--max-new-tokens", "3") == 0

    # Uneven steps in any order; x = 0, 2/3 · 2/8, 2/3.
    out = tmp_path / "sqrt"
    assert verb("merge", str(trunk), "--steps", "12", "4", "6", "--weights", "sqrt", "--out", str(out)) == 0
    falls = [1.0, 1 - math.sqrt(1 / 6), 1 - math.sqrt(2 / 3), 0.0]
    weights = [a - b for a, b in itertools.pairwise(falls)]
    assert json.loads((out / "merge.json").read_text())["weights"] == pytest.approx(weights)
    assert_close(out, mean_of_exports(trunk, [4, 6, 12], weights, tmp_path / "again"))
    assert {path: path.stat().st_mtime_ns for path in trunk.rglob("*")} == before


def test_sharded_checkpoints_give_the_same_bytes(trunk: Path, tmp_path: Path) -> None:
    sharded = tmp_path / "sharded"
    shutil.copytree(trunk, sharded)
    for path, parts in zip(checkpoint.available(sharded / "checkpoints")[-3:], (2, 1, 5), strict=True):
        state = json.loads((path / "state.json").read_text())
        if parts > 1:
            state["engine"] = {"kind": "zero3", "ranks": parts}
            for rank in range(parts):
                save_file({}, path / f"rng/rank-{rank:05d}.safetensors")
                for moment in ("exp_avg", "exp_avg_sq"):  # of which nothing is read here
                    save_file({}, path / f"{moment}-{rank + 1:05d}-of-{parts:05d}.safetensors")
        (path / "state.json").write_text(json.dumps(state))
        write_weights(path, load_file(path / "weights.safetensors"), parts)
    for run in (trunk, sharded):
        assert (
            verb("merge", str(run), "--last", "4", "--weights", "exponential", "--out", f"{tmp_path}/{run.name}-m") == 0
        )
    assert (tmp_path / "trunk-m/model.safetensors").read_bytes() == (
        tmp_path / "sharded-m/model.safetensors"
    ).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "zero2", "zero3"])
def test_checkpoints_of_another_engine_are_merged_with_those_of_one_process(
    tiny: Callable[..., list[str]], tmp_path: Path, engine: str
) -> None:
    settings = ("run.name=changed", *EVERY, "schedule.decay.tokens=0")
    train_here(tiny(*settings, "run.tokens=1536"))
    done = launch(tiny(*settings), ranks=2, engine=engine)
    assert done.returncode == 0, done.stdout + done.stderr
    run = tmp_path / "changed"
    assert verb("merge", str(run), "--last", "6", "--out", str(tmp_path / "merged")) == 0
    assert_close(tmp_path / "merged", mean_of_exports(run, [2, 4, 6, 8, 10, 12], [1 / 6] * 6, tmp_path))


def test_the_validation_loss_is_what_a_run_from_the_merged_model_begins_with(
    trunk: Path, run: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "merged"
    assert verb("merge", str(trunk), "--steps", "10", "12", "--evaluate", "--out", str(out)) == 0
    lines = json.loads((out / "merge.json").read_text())["evaluations"]
    begun = run("run.name=from-it", f"run.init_from={out}", "evaluation.every=100")
    first = {line["corpus"]: line for line in read_lines(begun / "evals.jsonl") if line["step"] == 0}
    assert {line["corpus"] for line in lines} == {"words", "overall"}
    for line in lines:
        assert (line["step"], line["tokens"]) == (12, 3072)
        for name in ("loss", "bits_per_byte", "targets"):
            assert line[name] == pytest.approx(first[line["corpus"]][name], rel=1e-6)
    assert f"validation loss {lines[-1]['loss']:.4f}" in capsys.readouterr().out
    card = (out / "README.md").read_text(encoding="utf-8")
    assert f"| validation loss, overall | {lines[-1]['loss']:.4f} nats a token" in card


def test_what_is_refused(trunk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "copy"
    shutil.copytree(trunk, run)

    def refused(*arguments: str, out: Path = tmp_path / "new") -> str:
        there = out.exists()
        capsys.readouterr()
        assert verb("merge", str(run), *arguments, "--out", str(out)) == 2
        assert out.exists() == there
        return capsys.readouterr().err

    assert "--last is 1, and" in refused("--last", "1")
    assert "has checkpoints of steps [2, 4, 6, 8, 10, 12]" in refused("--last", "7")
    assert "--steps is 4: a merge takes two or more" in refused("--steps", "4")
    assert "each once" in refused("--steps", "4", "6", "4")
    assert "no checkpoint of step 5; it has those of steps [2, 4, 6, 8, 10, 12]" in refused("--steps", "4", "5")
    assert "replaces nothing" in refused("--last", "2", out=run / "model")
    assert "one of the arguments --last --steps is required" in refused()

    ten = run / "checkpoints/step-00000010"
    for name, old, new, said in (
        (
            "config.yaml",
            "rms_norm_eps: 1.0e-06",
            "rms_norm_eps: 1.0e-05",
            "another model than.*rms_norm_eps 1e-05, not",
        ),
        ("config.yaml", "num_local_experts: 4", "num_local_experts: 8", "num_local_experts 8, not 4"),
        ("config.yaml", "precision: fp32", "precision: bf16", "precision bf16, not fp32"),
        ("state.json", '(tokenizer)": "', '(tokenizer)": "0', "another tokenizer"),
    ):
        text = (ten / name).read_text()
        assert old in text, old
        (ten / name).write_text(text.replace(old, new))
        assert f"{name} " in refused("--last", "2")  # its hash is another one
        weights = load_file(ten / "weights.safetensors")
        write_weights(ten, weights, 1)
        assert re.search(said, refused("--last", "2"))
        (ten / name).write_text(text)
        write_weights(ten, weights, 1)
    weights["model.norm.weight"] = weights["model.norm.weight"][:-1].clone()
    write_weights(ten, weights, 1)
    assert "holds model.norm.weight as F32 of the shape (31,)" in refused("--last", "2")
    (ten / "weights.safetensors").write_bytes((ten / "weights.safetensors").read_bytes()[:-1])
    assert "step-00000010 is not valid: weights.safetensors has" in refused("--last", "3")
    (ten / "exp_avg.safetensors").unlink()
    assert "exp_avg.safetensors is missing" in refused("--steps", "10", "12")
    assert verb("merge", str(run), "--steps", "8", "12", "--out", str(tmp_path / "new")) == 0
