"""The memory that is estimated, against the storages of real training steps."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from powertrain.data.tokens import TokenFile
from powertrain.launch.bench import write_tokens
from powertrain.launch.bench.worker import assemble
from powertrain.launch.estimate.memory import BUCKET, Passes, Tally, needed
from powertrain.train.compose import composed
from powertrain.train.state import State
from powertrain.train.step import train_step

SHAPE = (
    "+experiment=quickstart",
    "data=none",
    "threads=1",
    "precision=bf16",
    "model.num_hidden_layers=3",
    "model.hidden_size=128",
    "model.intermediate_size=128",
    "model.num_attention_heads=2",
    "model.vocab_size=1024",
    "data.sequence_length=64",
    "batch.sequences=4",
    "batch.micro_sequences=1",
)
DENSE = ("model.model_type=granite", "model.num_local_experts=0", "model.num_experts_per_tok=0")
SHARED = ("model.model_type=granitemoeshared", "model.shared_intermediate_size=256")
CHECKPOINTING = ("data.sequence_length=256", "batch.micro_sequences=2", "engine.activation_checkpointing=true")


@pytest.mark.parametrize(
    "more", [SHARED, (*DENSE, *CHECKPOINTING), ("precision=fp32", *CHECKPOINTING[:2])], ids=" ".join
)
def test_a_step_takes_what_was_estimated(more: tuple[str, ...], tmp_path: Path) -> None:
    config = composed([*SHAPE, *more])
    write_tokens(tmp_path / "tokens", config, 3 * config.batch.sequences * config.data.sequence_length)
    tally, state = Tally(), State()
    with tally:
        ours = assemble(config, TokenFile(tmp_path / "tokens"))
        for _ in range(2):  # there are moments from the first one on
            tally.peaks()
            train_step(config, ours.engine, ours.schedule, ours.batches, ours.balance, state)
    estimated = needed(config, "plain", 1, Passes(config, 1, gpu=False)).total()
    assert estimated == pytest.approx(tally.peak.total(), rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), (*DENSE, *CHECKPOINTING)], ids=" ".join)
@pytest.mark.parametrize("engine", ["ddp", "zero1", "zero2", "zero3"])
def test_a_step_of_two_ranks_takes_what_was_estimated(engine: str, more: tuple[str, ...]) -> None:
    """With small buckets, which still hold the largest gradient: those of 2 GB would hide all else."""
    settings, bucket = [*SHAPE, *more], 400_000
    launcher = f"--config_file launch/accelerate/{engine}.yaml --num_processes 2 --main_process_port 0"
    command = [sys.executable, "-m", "accelerate.commands.launch", *launcher.split()]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": "."}
    if engine == "ddp":
        environment["ACCELERATE_USE_CPU"] = "true"
    measure = ["docs/results/memory/measure.py", str(bucket), *settings]
    ended = subprocess.run([*command, *measure], env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    measured = json.loads(next(line for line in ended.stdout.splitlines() if line.startswith("{")))["peak"]
    config = composed(settings)
    estimated = needed(config, engine, 2, Passes(config, 2, gpu=False), bucket).total()
    assert estimated == pytest.approx(measured, rel=0.1)


def test_a_tally_counts_storages_once_and_while_they_live() -> None:
    tally = Tally()
    with tally:
        tally.part = "activations"
        x = torch.zeros(1000)
        view = x[10:].view(-1, 10)
        assert tally.now == {"activations": 4000}
        tally.part = "backward"
        y = x + 1
        del x
        assert tally.now.total() == 8000  # the view keeps it
        del view
        assert tally.now.total() == 4000
        tally.move(y, "gradients")
        torch.zeros(10, device="meta")
        del y
    assert tally.now.total() == 0
    assert tally.peak == {"activations": 4000, "backward": 4000}


def test_the_state_is_split_over_ranks() -> None:
    """18 bytes a parameter in bf16; ZeRO 1 keeps bf16 weights and gradients whole, 2 the weights, 3 what passes."""
    config = composed(["+experiment=powermoe_3b", "model.num_hidden_layers=2"])
    ranks = 64
    passes = Passes(config, ranks, gpu=True)
    found = {engine: needed(config, engine, ranks, passes) for engine in ("plain", "zero1", "zero2", "zero3")}
    count = found["plain"]["masters"] // 4
    assert found["plain"]["moments"] == found["plain"]["gradients"] * 2 == 8 * count
    assert found["plain"]["copies"] == pytest.approx(2 * count, rel=0.01)
    for zero in ("zero1", "zero2"):
        assert found[zero]["copies"] == 2 * count
    assert found["zero1"]["gradients"] == 4 * count
    assert found["zero2"]["gradients"] == pytest.approx(4 * count / ranks, rel=1e-6)
    for zero in ("zero1", "zero2", "zero3"):
        assert found[zero]["masters"] == pytest.approx(4 * count / ranks, rel=1e-6)
        assert found[zero]["moments"] == pytest.approx(8 * count / ranks, rel=1e-6)
    # ZeRO 2's bucket is bf16, and 4 bytes an element more come with its reduction, when activations are being freed.
    assert found["zero2"]["buffers"] in (2 * BUCKET, 2 * BUCKET + 6 * BUCKET)
    assert found["zero3"]["buffers"] >= 4 * BUCKET
    averaged = copy.deepcopy(config)
    averaged.average.window = 0.1
    for engine, share in (("plain", 1), ("ddp", 1), ("zero1", ranks), ("zero2", ranks), ("zero3", ranks)):
        more = needed(averaged, engine, ranks, passes) - needed(config, engine, ranks, passes)
        assert more == {"average": pytest.approx(4 * count / share, rel=1e-6)}
    offloaded = [needed(each, "zero3_offload", ranks, passes) for each in (config, averaged)]
    assert offloaded[0] == offloaded[1]  # there it is in the machine's memory


def test_zero_1_and_2_keep_whole_float32_weights_in_fp32() -> None:
    config, ranks = composed([*SHAPE, "precision=fp32"]), 4
    passes = Passes(config, ranks, gpu=False)
    count = needed(config, "plain", ranks, passes)["masters"] // 4
    for zero in ("zero1", "zero2"):
        parts = needed(config, zero, ranks, passes)
        assert parts["masters"] == pytest.approx(4 * count * (1 + 1 / ranks), rel=1e-6) and not parts["copies"]


def test_activations_are_linear_in_the_micro_batch_and_checkpointing_saves_them() -> None:
    def activations(*overrides: str) -> int:
        config = composed(["+experiment=moe_1b", "model.num_hidden_layers=3", *overrides])
        return needed(config, "plain", 1, Passes(config, 1, gpu=True))["activations"]

    one, four = activations("batch.micro_sequences=1"), activations("batch.micro_sequences=4")
    assert four == pytest.approx(4 * one, rel=0.05)
    kept = activations("batch.micro_sequences=4", "engine.activation_checkpointing=true")
    assert kept < four / 5
