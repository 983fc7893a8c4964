"""One mathematics: every engine starts from the same weights and follows the same losses.

Sums differ between engines in their last bits, and one day such a bit sends a token whose experts nearly tie to another
one. From then on single losses part by more than rounding: docs/reliability.md has figures. The model of these tests is
small enough that no token does so in its 20 steps, which they assert; that is why they can hold the losses to 1e-4.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import launch, tiny_overrides, train_here
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

from powertrain.train.checkpoint import Stored
from powertrain.train.compose import composed
from powertrain.train.engine import warn_of_unfinished_builds
from powertrain.train.errors import ConfigError
from powertrain.train.track import read_lines

Overrides = Callable[..., list[str]]

# MoE, lagged balance, z loss, accumulation, clipping, muP groups with rates and decays of their own, a batch ramp.
SETTINGS = (
    "run.tokens=6400",
    "batch.micro_sequences=1",
    "batch.ramp=[{from_tokens: 2048, sequences: 12}]",
    "optimizer.max_grad_norm=0.5",
    "optimizer.weight_decay=0.5",
    "optimizer.weight_decay_mode=independent",
    "mup.rule=fan_in",
    "balance.router_z_loss_coef=0.01",
    "evaluation.every=5",
    "checkpoint.every=1",
    "checkpoint.keep=40",
)


def checkpoint(folder: Path, step: int, what: str = "weights") -> Stored:
    return Stored(folder / f"checkpoints/step-{step:08d}", what)


@pytest.fixture(scope="module")
def alone(words: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run in one process."""
    folder = tmp_path_factory.mktemp("alone")
    return train_here(tiny_overrides(words, cache, folder, "run.name=alone", *SETTINGS))


@pytest.fixture(scope="module")
def alone_bf16(words: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("alone-bf16")
    return train_here(tiny_overrides(words, cache, folder, "run.name=alone", *SETTINGS, "precision=bf16"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("engine", "ranks"),
    [
        ("ddp", 2),
        ("zero1", 2),
        ("zero2", 2),
        ("zero3", 2),
        ("zero3_offload", 2),
        ("zero1", 4),
        ("zero2", 4),
        ("zero3", 4),
    ],
)
def test_every_engine_follows_one_process(
    alone: Path, tiny: Overrides, tmp_path: Path, engine: str, ranks: int
) -> None:
    done = launch(tiny("run.name=shared", *SETTINGS), ranks=ranks, engine=engine)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = assert_follows(tmp_path / "shared", alone)
    assert len(lines[0]["lr_per_group"]) == 7 and len(set(lines[5]["lr_per_group"].values())) == 3


@pytest.mark.slow
def test_a_shared_expert_under_zero3_follows_one_process(tiny: Overrides, tmp_path: Path) -> None:
    settings = (*SETTINGS, "model.model_type=granitemoeshared", "model.shared_intermediate_size=40")
    alone = train_here(tiny("run.name=alone", *settings))
    done = launch(tiny("run.name=shared", *settings), ranks=2, engine="zero3")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = assert_follows(tmp_path / "shared", alone)
    assert len(set(lines[5]["lr_per_group"].values())) == 4  # of its output, too: fan_in


def assert_follows(shared: Path, alone: Path) -> list[dict[str, Any]]:
    """The run on several ranks has the figures and the weights of the one alone, whose lines come back."""
    lines, others = (read_lines(folder / "metrics.jsonl") for folder in (alone, shared))
    assert len(lines) == 20 and max(line["grad_norm"] for line in lines) > 0.5  # it is clipped
    assert {line["batch"] for line in lines} == {0.0625, 0.09375}
    for line, other in zip(lines, others, strict=True):
        for exact in ("step", "tokens", "samples", "batch", "lr", "lr_per_group", "skipped", "expert_load"):
            assert line[exact] == other[exact], (line["step"], exact)
        for close in ("loss", "lm_loss", "balance_loss", "z_loss", "grad_norm"):
            assert other[close] == pytest.approx(line[close], rel=1e-4), (line["step"], close)
    shapes = shapes_of(alone)
    for name, size in shapes.items():
        # The first step has the rate 0, so the checkpoint after it holds the weights that the run began with.
        first, firsts = (checkpoint(folder, 1).read(name, 0, size) for folder in (alone, shared))
        assert torch.equal(first, firsts), name
        for what in ("weights", "exp_avg", "exp_avg_sq"):
            last, lasts = (checkpoint(folder, 20, what).read(name, 0, size) for folder in (alone, shared))
            assert (last - lasts).abs().max() <= 1e-4 * last.abs().max(), (name, what)
    return lines


def shapes_of(folder: Path) -> dict[str, int]:
    from safetensors.torch import load_file

    return {name: t.numel() for name, t in load_file(folder / "checkpoints/step-00000001/weights.safetensors").items()}


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "zero1", "zero2", "zero3"])
def test_bf16_follows_one_process(alone_bf16: Path, tiny: Overrides, tmp_path: Path, engine: str) -> None:
    done = launch(tiny("run.name=shared", *SETTINGS, "precision=bf16"), ranks=2, engine=engine)
    assert done.returncode == 0, done.stdout + done.stderr
    folders = alone_bf16, tmp_path / "shared"
    lines, others = (read_lines(folder / "metrics.jsonl") for folder in folders)
    assert [line["lm_loss"] for line in others] == pytest.approx([line["lm_loss"] for line in lines], rel=BF16)
    last, lasts = (read_lines(folder / "evals.jsonl")[-1]["loss"] for folder in folders)
    assert lasts == pytest.approx(last, rel=BF16)
    # Masters are float32 and the same to the last bit, not those that bf16 rounds to.
    name = "model.layers.0.self_attn.q_proj.weight"
    first, firsts = (checkpoint(folder, 1).read(name, 0, 1024) for folder in folders)
    assert torch.equal(first, firsts) and not torch.equal(first, first.bfloat16().float())


BF16 = 1e-4  # of a loss: some ten times what was seen over these 20 steps


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["zero1", "zero2"])
def test_gradients_in_bf16_are_summed_in_float32(tiny: Overrides, tmp_path: Path, engine: str) -> None:
    """Over micro-batches, and over ranks, even if their number is no power of two. (ZeRO 3 then rounds once more.)"""
    settings = (*SETTINGS, "precision=bf16", "batch.sequences=6", "batch.ramp=[]", "run.tokens=1920")
    folders = [train_here(tiny("run.name=alone", *settings)), tmp_path / "shared"]
    done = launch(tiny("run.name=shared", *settings), ranks=3, engine=engine)
    assert done.returncode == 0, done.stdout + done.stderr
    for name, size in shapes_of(folders[0]).items():
        gradient, other = (checkpoint(folder, 1, "exp_avg").read(name, 0, size) for folder in folders)
        assert (gradient - other).abs().max() <= 1e-5 * gradient.abs().max(), name


def test_a_lock_that_a_killed_build_left_is_pointed_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    for name, age in (("old", 600), ("new", 0)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "lock").touch()
        os.utime(tmp_path / name / "lock", (time.time() - age,) * 2)
    warn_of_unfinished_builds()
    (said,) = capsys.readouterr().out.splitlines()
    assert said.startswith(f"Warning: {tmp_path}/old/lock is 10 minutes old.") and "delete the file" in said


@pytest.mark.slow
@pytest.mark.parametrize(
    ("engine", "ranks", "expect", "said"),
    [
        ("zero2", 2, "zero3", "engine.expect is zero3, but zero2 was started, on 2 rank(s)"),
        ("plain", 1, "ddp", "engine.expect is ddp, but plain was started, on 1 rank(s)"),
    ],
)
def test_another_engine_than_expected_is_refused(
    tiny: Overrides, tmp_path: Path, engine: str, ranks: int, expect: str, said: str
) -> None:
    done = launch(tiny("run.name=other", f"engine.expect={expect}"), ranks=ranks, engine=engine)
    assert done.returncode != 0
    assert said in done.stderr
    assert not (tmp_path / "other").exists()


def test_stored_reads_any_range_of_any_split(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    values = torch.arange(6 * 5 * 4, dtype=torch.float32).reshape(6, 5, 4)
    whole, split = tmp_path / "whole", tmp_path / "split"
    whole.mkdir(), split.mkdir()
    save_file({"x": values}, whole / "weights.safetensors")
    for number, (start, stop) in enumerate(((0, 50), (50, 51), (51, 120))):
        piece = {f"x[{start}:{stop}]": values.flatten()[start:stop].clone()}
        save_file(piece, split / f"weights-{number + 1:05d}-of-00003.safetensors")
    (split / "weights-00004-of-00003.safetensors").write_bytes(b"a manifest does not list it")
    for folder, count in ((whole, 0), (split, 3)):
        names = [f"weights-{n + 1:05d}-of-00003.safetensors" for n in range(count)] or ["weights.safetensors"]
        (folder / "manifest.json").write_text(json.dumps({"files": {key: {} for key in names}}))
        stored = Stored(folder, "weights")
        for start, stop in ((0, 120), (0, 1), (3, 3), (19, 21), (49, 52), (119, 120)):
            assert torch.equal(stored.read("x", start, stop), values.flatten()[start:stop])
    (split / "manifest.json").write_text(json.dumps({"files": {names[0]: {}, names[2]: {}}}))
    with pytest.raises(ConfigError, match="holds 119 of the 120 elements of x from 0 on"):
        Stored(split, "weights").read("x", 0, 120)
    save_file({"x[0:50]": values.flatten()[:50].clone()}, split / names[1])  # one part twice is not the other part
    (split / "manifest.json").write_text(json.dumps({"files": {key: {} for key in names[:2]}}))
    with pytest.raises(ConfigError, match="holds 50 of the 100 elements"):
        Stored(split, "weights").read("x", 0, 100)
    for other in (values.transpose(0, 1).contiguous(), values.half(), values.long()):
        save_file({"x": other}, whole / "weights.safetensors")
        with pytest.raises(ConfigError, match="holds x as"):
            Stored(whole, "weights", {"x": values.shape})
    for key, part in (("x[0:50]", values.flatten()[:49]), ("x[80:121]", values.flatten()[:41])):
        save_file({key: part.clone()}, whole / "weights.safetensors")
        with pytest.raises(ConfigError, match="holds x"):
            Stored(whole, "weights", {"x": values.shape})
    with pytest.raises(ConfigError, match="is not a safetensors file"):
        (whole / "weights.safetensors").write_bytes(b"no")
        Stored(whole, "weights")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_activation_checkpointing_computes_twice_and_changes_nothing(
    tiny: Overrides, tmp_path: Path, precision: str
) -> None:
    routed: list[nn.Module] = []
    hook = register_module_forward_hook(
        lambda module, *_: routed.append(module) if type(module).__name__.endswith("TopKRouter") else None
    )
    counts, losses, weights = [], [], []
    for on in (False, True):
        name = f"run.name={on}"
        folder = train_here(tiny(name, f"precision={precision}", f"engine.activation_checkpointing={on}"))
        losses.append([line["loss"] for line in read_lines(folder / "metrics.jsonl")])
        weights.append((folder / "model/model.safetensors").read_bytes())
        counts.append(len(routed) - sum(counts))
    hook.remove()
    config = composed(tiny())
    micro_batches = config.batch.sequences // config.batch.micro_sequences
    assert counts[1] - counts[0] == config.model.num_hidden_layers * len(losses[0]) * micro_batches
    assert losses[0] == losses[1] and weights[0] == weights[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("option", "engine", "ranks"),
    [("activation_checkpointing", "ddp", 2), ("activation_checkpointing", "zero3", 2)],
)
def test_what_makes_a_step_smaller_follows_the_plain_run(
    alone: Path, tiny: Overrides, tmp_path: Path, option: str, engine: str, ranks: int
) -> None:
    done = launch(tiny("run.name=other", *SETTINGS, f"engine.{option}=true"), ranks=ranks, engine=engine)
    assert done.returncode == 0, done.stdout + done.stderr
    lines, others = (read_lines(folder / "metrics.jsonl") for folder in (alone, tmp_path / "other"))
    assert [line["loss"] for line in others] == pytest.approx([line["loss"] for line in lines], rel=1e-4)
    assert [line["grad_norm"] for line in others] == pytest.approx([line["grad_norm"] for line in lines], rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "bound"), [("fp32", 1e-4), ("bf16", 1e-2)])
def test_compiled_layers_follow_the_others(
    tiny: Overrides, capfd: pytest.CaptureFixture[str], precision: str, bound: float
) -> None:
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    settings, losses, graphs = (f"precision={precision}", "model.num_hidden_layers=4"), [], []
    for on in (False, True):
        counters.clear()
        folder = train_here(tiny(f"run.name={on}", *settings, f"engine.torch_compile={on}"))
        losses.append([line["loss"] for line in read_lines(folder / "metrics.jsonl")])
        graphs.append(counters["stats"]["unique_graphs"])
        assert (folder / "model/model.safetensors").exists()  # its logits are those of the trainer
    assert graphs[0] == 0 < graphs[1]
    assert "recompile_limit" not in capfd.readouterr().err
    assert losses[1] == pytest.approx(losses[0], rel=bound)


def test_every_rank_draws_a_dropout_of_its_own(tiny: Overrides, run: Callable[..., Path], tmp_path: Path) -> None:
    from powertrain.train.assemble import assemble
    from powertrain.train.engine import Engine
    from powertrain.train.state import State

    config = composed(tiny("model.attention_dropout=0.1"))

    def random_state(rank: int, start_from: Path | None = None) -> torch.Tensor:
        engine = Engine(config)
        engine.rank = rank
        assemble(config, engine, State(), start_from, lambda text: None)
        return torch.get_rng_state()

    begun = [random_state(rank) for rank in range(3)]
    torch.manual_seed(config.run.seed)
    assert torch.equal(begun[0], torch.get_rng_state())  # as it was with one process
    folder = run("model.attention_dropout=0.1", "checkpoint.every=6", "checkpoint.keep=9")
    resumed = [
        random_state(rank, folder / f"checkpoints/step-{step:08d}") for step in (6, 12) for rank in range(1, 3)
    ]  # the checkpoint has the state of rank 0 alone
    states = [state.numpy().tobytes() for state in (*begun, *resumed)]
    assert len(set(states)) == 7
    assert torch.equal(random_state(2), begun[2])
