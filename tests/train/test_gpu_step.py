"""What a step does on a GPU, as far as a machine without one can tell: tensors with shapes and no contents."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from powertrain.launch.bench import write_tokens
from powertrain.train.compose import composed

HERE = Path(__file__).parent
TORCH = Path(torch.__file__).parent
SHAPE = (
    "+experiment=quickstart",
    "data=none",
    "threads=1",
    "precision=bf16",
    "model.num_hidden_layers=2",
    "model.hidden_size=128",
    "model.intermediate_size=128",
    "model.num_attention_heads=2",
    "model.vocab_size=1024",
    "data.sequence_length=64",
    "batch.sequences=4",
    "batch.micro_sequences=2",
)
END = ["clip_grad_norm_", "end_step(skipped).cpu()", "reduce(sums).cpu()"]  # the norm, the experts' load, the loss
SORTED = "torch.bincount(flat"  # which goes by how many tokens an expert has


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if torch.version.cuda is not None:
        pytest.skip("this PyTorch has CUDA, where the tests marked gpu see the same")
    path = tmp_path_factory.mktemp("library") / "fake_cuda.so"
    paths = [f"-I{TORCH}/include", f"-L{TORCH}/lib", "-lc10", "-ltorch_cpu"]
    compiler = os.environ.get("CXX", "g++")
    subprocess.run([compiler, "-std=c++20", "-shared", "-fPIC", HERE / "fake_cuda.cpp", *paths, "-o", path], check=True)
    return path


@pytest.mark.slow
@pytest.mark.parametrize(
    ("more", "waits"),
    [
        ((), END),
        (("engine.activation_checkpointing=true", "batch.micro_sequences=4"), END),
        (("precision=fp32", "batch.micro_sequences=4"), [SORTED, *END]),
    ],
    ids=" ".join,
)
def test_a_step_stays_on_the_gpu_and_waits_at_its_end(
    library: Path, tmp_path: Path, more: tuple[str, ...], waits: list[str]
) -> None:
    write_tokens(tmp_path / "tokens", composed([*SHAPE, *more]), 4096)
    command = [sys.executable, HERE / "traced_step.py", tmp_path / "tokens", *SHAPE, *more]
    environment = os.environ | {"LD_PRELOAD": str(library), "LD_LIBRARY_PATH": f"{TORCH}/lib"}
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert ended.returncode == 0, ended.stderr
    found = json.loads(ended.stdout.splitlines()[-1])
    assert len(found) == len(waits) and all(wait in line for wait, line in zip(waits, found, strict=True)), found
