"""Compare the estimated memory with that of real training steps, and write README.md's table.

usage: python docs/results/memory/measure.py

For each case five steps of a run's own engine and step are taken on random tokens, on the two ranks of an accelerate
launch, and storages are counted as powertrain.launch.estimate.memory does. DeepSpeed's buckets are made small in some
cases: they are 2 GB whatever the model, which would hide everything else here.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from powertrain.launch.estimate.memory import BUCKET, Passes, Tally, needed
from powertrain.train.compose import composed

HERE = Path(__file__).parent
SMALL_BUCKET = 1_500_000
SHAPE = [
    "+experiment=quickstart",
    "data=none",
    "threads=1",
    "precision=bf16",
    "model.num_hidden_layers=4",
    "model.hidden_size=256",
    "model.intermediate_size=256",
    "model.num_attention_heads=4",
    "model.num_local_experts=16",
    "data.sequence_length=128",
    "batch.sequences=4",
    "batch.micro_sequences=1",
]
DENSE = (
    "model.model_type=granite",
    "model.num_local_experts=0",
    "model.num_experts_per_tok=0",
    "model.intermediate_size=704",
)
LONG = ("batch.micro_sequences=2", "data.sequence_length=512")
CASES = {
    "MoE, bf16": (),
    "MoE, fp32, grouped_mm": ("model.experts_implementation=grouped_mm", "precision=fp32"),
    "MoE, bf16, 2 × 512": LONG,
    "MoE, bf16, 2 × 512, checkpointing": (*LONG, "engine.activation_checkpointing=true"),
    "dense, bf16": DENSE,
    "dense, fp32, 2 × 512": (*DENSE, *LONG, "precision=fp32"),
    "dense, bf16, 2 × 512, checkpointing": (*DENSE, *LONG, "engine.activation_checkpointing=true"),
}
ENGINES = ("plain", "ddp", "zero1", "zero2", "zero3")


def main() -> None:
    """Measure all cases, or one of them on a rank."""
    if sys.argv[1:]:
        return rank(int(sys.argv[1]), sys.argv[2:])
    results = []
    for name, overrides in CASES.items():
        runs = [(engine, SMALL_BUCKET) for engine in ENGINES]
        if not overrides:
            runs += [(engine, BUCKET) for engine in ENGINES if engine.startswith("zero")]
        for engine, bucket in runs:
            settings = [*SHAPE, *overrides]
            measured = launched(engine, bucket, settings)
            config, ranks = composed(settings), measured["ranks"]
            estimated = needed(config, engine, ranks, Passes(config, ranks, gpu=False), bucket).total()
            results.append({"case": name, "bucket": bucket, "estimated": estimated, **measured})
            # What is beside the buckets, or nothing could be wrong with it.
            beside = 4 * bucket if bucket == BUCKET else 0
            error = (estimated - beside) / (measured["peak"] - beside) - 1
            label = f"{engine}, 2 GB buckets" if beside else engine
            numbers = f"{measured['peak'] / 1e6:,.1f} | {estimated / 1e6:,.1f} | {error:+.1%}"
            print(f"| {name} | {label} | {numbers} |", flush=True)
    (HERE / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def launched(engine: str, bucket: int, settings: list[str]) -> dict[str, Any]:
    """What the first rank has printed."""
    command = [sys.executable]
    if engine != "plain":
        launcher = f"--config_file launch/accelerate/{engine}.yaml --num_processes 2 --main_process_port 0"
        command += ["-m", "accelerate.commands.launch", *launcher.split()]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": "."}
    if engine == "ddp":
        environment["ACCELERATE_USE_CPU"] = "true"
    ended = subprocess.run(
        [*command, __file__, str(bucket), *settings],
        env=environment,
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    printed = [line for line in ended.stdout.splitlines() if line.startswith("{")]
    if not printed:
        raise SystemExit(ended.stderr[-2000:])
    found: dict[str, Any] = json.loads(printed[-1])
    return found


def rank(bucket: int, overrides: list[str]) -> None:
    """Take five steps, and print the smallest peak after the first, which has no moments yet.

    The smallest, as gloo's threads by chance hold a bucket of DeepSpeed's a moment longer than its reduction takes.
    """
    from powertrain.data.tokens import TokenFile
    from powertrain.launch.bench import write_tokens
    from powertrain.launch.bench.worker import assemble
    from powertrain.train.engine import Engine
    from powertrain.train.state import State
    from powertrain.train.step import train_step

    config = composed(overrides)
    configure = Engine._configure_deepspeed

    def with_buckets(engine: Engine) -> None:
        configure(engine)
        engine.accelerator.deepspeed_plugin.deepspeed_config["zero_optimization"]["reduce_bucket_size"] = bucket

    Engine._configure_deepspeed = with_buckets
    tokens = Path(tempfile.mkdtemp()) / "tokens"
    write_tokens(tokens, config, 5 * config.batch.sequences * config.data.sequence_length)
    tally, state = Tally(), State()
    tally.part = "masters"
    with tally:
        ours = assemble(config, TokenFile(tokens))
    tally.follow(ours.engine.module, ours.engine.loss)
    moments = ours.engine.zero.optimizer if ours.engine.sharded else ours.engine.optimizer
    moments.register_step_pre_hook(lambda *_: setattr(tally, "part", "moments"))
    peaks = []
    for _ in range(5):
        tally.peaks()
        with tally:
            tally.part = "data"
            train_step(config, ours.engine, ours.schedule, ours.batches, ours.balance, state)
        peaks.append(tally.peak)
    peak = min(peaks[1:], key=Counter.total)
    if ours.engine.is_main:
        facts = {"engine": ours.engine.kind, "ranks": ours.engine.world_size, "state": tally.now.total()}
        print(json.dumps({**facts, "peak": peak.total(), "parts": peak}), flush=True)
    ours.engine.reduce(ours.balance.previous)
    os._exit(0)  # as train.cli.leave does


if __name__ == "__main__":
    main()
