"""What `make gpu` records, without a GPU: parts that fail, hang or are not reached, and that its commands are right."""

from __future__ import annotations

import json
import sys
import time
import types
import warnings
from pathlib import Path

import psutil
import pytest
import torch

from powertrain.launch import bench
from powertrain.launch.bench import gpu
from powertrain.launch.estimate.memory import Passes, needed
from powertrain.train.check import check_batch
from powertrain.train.compose import composed

TINY = (
    "model.vocab_size=64",
    "model.hidden_size=16",
    "model.intermediate_size=8",
    "model.num_hidden_layers=1",
    "model.num_attention_heads=2",
    "model.num_key_value_heads=null",
    "model.num_local_experts=4",
    "model.num_experts_per_tok=2",
    "data.sequence_length=16",
    "batch.sequences=4",
    "batch.micro_sequences=2",
    *bench.RUN,
)


def script(name: str, code: str, limit: float = 60) -> gpu.Part:
    return gpu.Part("hardware", name, limit, [sys.executable, "-c", code])


def test_without_a_gpu_it_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["gpu", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as ended:
        gpu.main()
    assert ended.value.code == 2
    assert "No CUDA device was found" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_part_that_fails_or_hangs_does_not_end_the_rest(tmp_path: Path) -> None:
    child = tmp_path / "child"
    hang = (
        "import subprocess, sys, time, pathlib\n"
        "started = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        f"pathlib.Path({str(child)!r}).write_text(str(started.pid)); time.sleep(600)"
    )
    so_far = f"import json; print(json.dumps({{'so far': list(json.load(open({str(tmp_path / 'gpu.json')!r})))}}))"
    parts = [
        script("fails", "raise MemoryError('CUDA out of memory')"),
        script("hangs", hang, limit=8),
        script("prints nothing", ""),
        script("reads", "print('a warning')\n" + so_far),
        script("is not reached", "print('{}')"),
    ]
    found = gpu.run_all(parts[:4], tmp_path, 300)
    assert found["fails"]["error"] == "MemoryError: CUDA out of memory"
    assert found["hangs"]["error"] == "stopped after 8 s"
    assert "error" in found["prints nothing"]
    assert found["reads"]["result"] == {"so far": ["fails", "hangs", "prints nothing"]}
    assert json.loads((tmp_path / "gpu.json").read_text()) == found
    assert "| hangs | **failed**: stopped after 8 s | 8 s |" in (tmp_path / "gpu.md").read_text()
    started = int(child.read_text())
    deadline = time.monotonic() + 30
    while psutil.pid_exists(started) and psutil.Process(started).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
    assert "not run" in gpu.run_all(parts[4:], tmp_path, 0)["is not reached"]["error"]


def test_every_part_is_one_that_its_command_takes() -> None:
    parts = list(gpu.parts(Path("small"), Path("large")))
    assert len({part.name for part in parts}) == len(parts)
    assert sum(part.kind == "speed" for part in parts) == len(gpu.MODELS) + 3  # three of Trainer
    commands = {
        (part.kind == "speed", *(argument for argument in part.command if "=" in argument and " " not in argument))
        for part in parts
    }
    for large, *overrides in filter(lambda command: len(command) > 1, commands):
        config = composed(list(map(str, overrides)))
        check_batch(config, 1)
        if large:
            assert config.batch.sequences * config.data.sequence_length == gpu._TOKENS_A_STEP


def test_the_table_says_what_was_measured() -> None:
    def part(kind: str, **result: object) -> dict[str, object]:
        return {"kind": kind, "seconds": 12.3, "result": result}

    found = {
        "tests": part("tests", status=1, summary="1 failed, 9 passed in 3 s", failed=["FAILED a"]),
        "peak": part("peak", float32=5e13, bfloat16=8e14),
        gpu.REFERENCE: part("losses", losses=[9.0, 8.0, 7.0]),
        "losses: GPU, bf16": part("losses", losses=[9.0, 8.25, 7.125]),
        "losses: GPU, fp32": part("losses", losses=[9.0, None, None]),
        "waits: bf16": part("waits", waits=4, lines={"train/step.py:84": 3, "train/engine.py:9": 1}),
        "moe_1b: estimate": part("memory", bytes=2**35, kernels={"a": "sdpa", "e": "grouped_mm"}, flops_per_token=5e9),
        "moe_1b: powertrain": part("speed", seconds=[0.5, 0.25, 0.25], peak_memory=2**34),
        "moe_1b, compiled: powertrain": part("speed", seconds=[0.125], peak_memory=2**35),
        "moe_1b: trainer/grouped_mm/bf16": part("speed", seconds=[1.0], peak_memory=2**34),
        "powermoe_3b: powertrain": {"kind": "speed", "seconds": 90.0, "error": "OutOfMemoryError: | 2 GiB"},
    }
    said = gpu.table(found)
    assert "| tests | **failed**: 1 failed, 9 passed in 3 s | 12 s |" in said
    assert (
        "losses: GPU, bf16 | 9.0000 → 7.1250 in 3 steps; from the CPU's in float32 0.0e+00 at the first, 2.5e-01"
        in said
    )
    assert "**not finite** from step 2 on" in said
    assert "4 in a step: train/step.py:84 × 3, train/engine.py:9 × 1" in said
    assert "moe_1b: powertrain | 65,536 tokens/s, 41.0% of the peak, 16.0 GiB (0.50 × the estimate)" in said
    assert "moe_1b, compiled: powertrain | 131,072 tokens/s, 81.9% of the peak, 32.0 GiB (1.00 × the estimate)" in said
    assert "trainer/grouped_mm/bf16 | 16,384 tokens/s, 10.2% of the peak, 16.0 GiB |" in said
    assert "OutOfMemoryError: ∣ 2 GiB" in said


def test_waits_are_counted_in_the_third_step_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def step(*_: object) -> None:
        for _ in range(2):
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        warnings.warn("something else", stacklevel=1)

    ours = types.SimpleNamespace(engine=None, schedule=None, batches=None, balance=None)
    modes: list[str] = []
    monkeypatch.setattr("powertrain.launch.bench.worker.assemble", lambda *_: ours)
    monkeypatch.setattr("powertrain.train.step.train_step", step)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    bench.write_tokens(tmp_path / "tokens", composed([*TINY]), 100)
    gpu.waits(str(tmp_path / "tokens"), *TINY)
    found = json.loads(capsys.readouterr().out)
    assert found["waits"] == 2 and modes == ["warn", "default"]
    (line,) = found["lines"]
    assert line.startswith("launch/test_gpu_kit.py:")


@pytest.mark.slow
def test_the_parts_that_take_no_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(gpu, "SMALL", TINY)
    monkeypatch.setattr(gpu, "MODELS", dict.fromkeys(gpu.MODELS, TINY))
    monkeypatch.setattr(gpu, "LOSS_STEPS", 3)
    bench.write_tokens(tmp_path / "tokens", composed([*TINY]), 1000)
    names = {gpu.REFERENCE, "moe_1b: powertrain", "moe_1b: trainer/grouped_mm/bf16", "moe_1b: estimate"}
    parts = [part for part in gpu.parts(tmp_path / "tokens", tmp_path / "tokens") if part.name in names]
    found = gpu.run_all(parts, tmp_path, 500)
    assert set(found) == names and not any("error" in part for part in found.values()), found
    assert len(found[gpu.REFERENCE]["result"]["losses"]) == 3
    assert len(found["moe_1b: powertrain"]["result"]["seconds"]) == gpu.BENCH_STEPS
    assert 0 < found["moe_1b: powertrain"]["result"]["seconds_to_first_step"] < 500
    config = composed([*TINY, "model.attn_implementation=sdpa"])
    assert found["moe_1b: estimate"]["result"]["bytes"] == needed(config, "plain", 1, Passes(config, 1, True)).total()
