"""How fast this machine trains, compared with its peak and with transformers.Trainer.

usage: powertrain bench [--rounds N] [--steps N] [--out FILE] [--config-dir DIR] [+experiment=NAME] …

Without an experiment two GraniteMoe shapes are measured: hidden 256, 6 layers, top-8 of 32 experts that are 128 wide,
vocabulary 8192, 8 × 512 tokens a step, and one twice as wide; on two cores that takes a quarter of an hour. First
everything is tried once: our precisions, and Trainer with each of its expert implementations and precisions. Then the
best of each is measured in turn with the machine's matrix products, round by round, each time in a new process with a
thread for each core. In our batches attention stays inside documents; Trainer has the same tokens without that.

examples:
  powertrain bench
  powertrain bench --out bench.json --rounds 3
  powertrain bench +experiment=powermoe_3b batch.micro_sequences=1 batch.sequences=4
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from powertrain.data.tokens import TokenWriter, dtype_for
from powertrain.launch.parser import verb_parser
from powertrain.train.check import check_batch
from powertrain.train.cli import guard
from powertrain.train.compose import composed
from powertrain.train.config import Config
from powertrain.train.errors import RunFailed
from powertrain.train.hardware import available_cores, version

_SHAPE = (
    "data.sequence_length=512",
    "batch.sequences=8",
    "batch.micro_sequences=8",
    "model.vocab_size=8192",
    "model.num_hidden_layers=6",
    "model.num_key_value_heads=null",
    "model.num_local_experts=32",
    "model.num_experts_per_tok=8",
)
SHAPES = {
    "hidden 256": (*_SHAPE, "model.hidden_size=256", "model.intermediate_size=128", "model.num_attention_heads=4"),
    "hidden 512": (*_SHAPE, "model.hidden_size=512", "model.intermediate_size=256", "model.num_attention_heads=8"),
}
# A budget that no measurement reaches; the schedule does not matter.
RUN = ("run.tokens=1_000_000_000_000_000", "run.name=bench")
OURS = ("powertrain/bf16", "powertrain/fp32")
EXPERTS, PRECISIONS = ("eager", "grouped_mm", "batched_mm"), ("fp32", "autocast", "bf16")
GPU_EXPERTS = ("sonicmoe", "deepgemm")
BUSY = 0.1  # of the machine, while nothing of ours runs
VERSIONS = ("torch", "transformers", "accelerate")


def main(arguments: list[str] | None = None) -> None:
    """Measure, print a table, write JSON."""
    parser = verb_parser("bench", __doc__)
    parser.add_argument("--rounds", type=_positive, default=5, help="measurements of each, in turn")
    parser.add_argument(
        "--steps", type=_positive, default=4, help="in a measurement, after the first, which is discarded"
    )
    parser.add_argument("--out", type=Path, help="write everything measured as JSON")
    sys.exit(guard(lambda: _bench(*parser.parse_known_args(arguments))))


def _positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{value} is not a positive number")
    return value


def _bench(options: argparse.Namespace, given: list[str]) -> int:
    if options.out is not None:
        options.out.open("ab").close()  # an error here, not after all measurements
    shapes: dict[str, tuple[str, ...]] = dict(SHAPES)
    if named := [override for override in given if override.startswith("+experiment=")]:
        shapes = {named[0].partition("=")[2]: ()}
    measured = []
    for name, overrides in shapes.items():
        own = [override for override in given if override not in named]
        shape = Shape(" ".join([name, *own]), [*overrides, *given, *RUN], options.steps)
        measured.append(shape.measured(options.rounds))
        print(table(measured[-1]))
        if options.out is not None:
            options.out.write_text(
                json.dumps({"hardware": hardware(), "shapes": measured}, indent=1) + "\n", encoding="utf-8"
            )
    return 0


class Shape:
    """One model and batch, and everything that is measured on it."""

    def __init__(self, name: str, overrides: list[str], steps: int) -> None:
        self.name, self.overrides, self.steps = name, overrides, steps
        self.config = composed(overrides)
        check_batch(self.config, 1)
        self.tokens_a_step = self.config.batch.sequences * self.config.data.sequence_length
        self.busy: list[float] = []

    def measured(self, rounds: int) -> dict[str, Any]:
        """Try everything once, then measure the best of each in turn."""
        import torch

        from powertrain.train import metrics

        flops = metrics.flops_per_token(self.config, metrics.parameters_of(self.config))
        experts = (
            (*EXPERTS, *(GPU_EXPERTS if torch.cuda.is_available() else ())) if self.config.model.is_moe else ("dense",)
        )
        theirs = [f"trainer/{e}/{p}" for e in experts for p in PRECISIONS]
        with tempfile.TemporaryDirectory() as folder:
            tokens = Path(folder) / "tokens"
            write_tokens(tokens, self.config, (self.steps + 1) * self.tokens_a_step)
            tried = {what: self._measure(what, tokens, steps=2) for what in (*OURS, *theirs)}
            best = [self._fastest(tried, "powertrain"), self._fastest(tried, "trainer")]
            peaks: list[dict[str, float]] = []
            runs: dict[str, list[dict[str, Any]]] = {what: [] for what in best}
            for _ in range(rounds):
                peaks.append(_done("peak", self._run("peak")))
                for what in best:
                    runs[what].append(_done(what, self._measure(what, tokens, self.steps)))
        peak = {dtype: statistics.median(each[dtype] for each in peaks) for dtype in peaks[0]}
        fastest = max(peak.values())
        contenders = {what: self._summary(of, flops / fastest) for what, of in runs.items()}
        own = runs[best[0]]
        ours, trainers = ([statistics.median(run["tokens_per_second"]) for run in runs[what]] for what in best)
        return {
            "name": self.name,
            "overrides": self.overrides,
            "tokens_a_step": self.tokens_a_step,
            "flops_per_token": flops,
            "peak_flops": peak,
            "busy": self.busy,
            "tried": {
                what: run.get("error") or statistics.median(run["tokens_per_second"]) for what, run in tried.items()
            },
            "contenders": contenders,
            "seconds_to_import": statistics.median(run["seconds_to_import"] for run in own),
            "share_waiting_for_data": (
                sum(sum(run["data_seconds"][1:]) for run in own) / sum(sum(run["seconds"]) for run in own)
            ),
            "speedup": spread([a / b for a, b in zip(ours, trainers, strict=True)]),
            "peaks": peaks,
            "runs": runs,
        }

    def _measure(self, what: str, tokens: Path, steps: int) -> dict[str, Any]:
        name, _, precision = what.partition("/")
        own = [f"precision={precision}"] if name == "powertrain" else []
        measured = self._run(name if own else what, str(tokens), str(steps + 1), *self.overrides, *own)
        if "error" not in measured:
            measured["tokens_per_second"] = [self.tokens_a_step / seconds for seconds in measured["seconds"]]
        return measured

    def _run(self, *arguments: str) -> dict[str, Any]:
        print(f"{self.name}: {arguments[0]} …", file=sys.stderr)
        self.busy.append(psutil.cpu_percent(interval=1.0) / 100)
        command = [sys.executable, "-P", "-m", "powertrain.launch.bench.worker", str(time.time()), *arguments]
        one_gpu = {"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]}
        environment = os.environ | one_gpu | {"PYTHONIOENCODING": "utf-8"}
        ended = subprocess.run(command, capture_output=True, encoding="utf-8", check=False, env=environment)
        if ended.returncode < 0:
            return {"error": f"killed by {signal.Signals(-ended.returncode).name}"}
        if ended.returncode:
            last = (ended.stderr.strip() or f"exit status {ended.returncode}").splitlines()[-1]
            return {"error": last}
        measured: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
        return measured

    def _fastest(self, tried: dict[str, dict[str, Any]], name: str) -> str:
        ran = {what: run for what, run in tried.items() if what.startswith(name) and "error" not in run}
        if not ran:
            errors = "; ".join(f"{what}: {run['error']}" for what, run in tried.items() if what.startswith(name))
            raise RunFailed(f"Nothing of {name} runs at this shape. {errors}")
        return max(ran, key=lambda what: statistics.median(ran[what]["tokens_per_second"]))

    def _summary(self, runs: list[dict[str, Any]], mfu_of_a_token: float) -> dict[str, Any]:
        speed = spread([statistics.median(run["tokens_per_second"]) for run in runs])
        return {
            "tokens_per_second": speed,
            "mfu": speed["median"] * mfu_of_a_token,
            "peak_memory": statistics.median(run["peak_memory"] for run in runs),
            "seconds_to_first_step": statistics.median(run["seconds_to_first_step"] for run in runs),
        }


def _done(what: str, run: dict[str, Any]) -> dict[str, Any]:
    if "error" in run:
        raise RunFailed(f"{what} had been measured before and now failed: {run['error']}")
    return run


def spread(values: list[float]) -> dict[str, float]:
    """Median, lowest and highest."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def write_tokens(prefix: Path, config: Config, least: int) -> None:
    """A token file of at least `least` tokens: frequencies by Zipf's law, documents of 1,000 tokens on average."""
    draw = np.random.default_rng(0)
    vocabulary = config.model.vocab_size
    share = 1 / np.arange(1, vocabulary + 1)
    share /= share.sum()
    with TokenWriter(prefix, dtype_for(vocabulary)) as writer:
        written = 0
        while written <= least:
            document = draw.choice(vocabulary, size=int(draw.geometric(1 / 1000)), p=share)
            writer.add(document)
            written += document.size


def hardware() -> dict[str, Any]:
    """The machine and the versions that were measured."""
    import torch

    return {
        "cpu": _cpu_name(),
        "cores": available_cores(),
        "memory": psutil.virtual_memory().total,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        **{package: version(package) for package in VERSIONS},
    }


def _cpu_name() -> str:
    """Its name, and the instruction sets that decide the speed of matrix products."""
    facts = Path("/proc/cpuinfo")
    lines = facts.read_text(encoding="utf-8").splitlines() if facts.exists() else []
    found = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    units = [unit for unit in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if unit in found.get("flags", "").split()]
    return f"{found.get('model name') or platform.processor()} {' '.join(units)}".strip()


def table(measured: dict[str, Any]) -> str:
    """A shape's results as text."""
    peak = ", ".join(f"{dtype} {flops / 1e9:,.0f}" for dtype, flops in measured["peak_flops"].items())
    lines = [
        f"\n{measured['name']}: {measured['flops_per_token'] / 1e6:,.1f} MFLOP a token, "
        f"{measured['tokens_a_step']:,} tokens a step; matrix products, GFLOP/s: {peak}",
        f"{'':<28}{'tokens/s':>10}{'(low … high)':>20}{'MFU':>7}{'memory':>11}{'first step':>12}",
    ]
    for what, each in measured["contenders"].items():
        speed = each["tokens_per_second"]
        between = f"({speed['low']:,.0f} … {speed['high']:,.0f})"
        lines.append(
            f"{what:<28}{speed['median']:>10,.0f}{between:>20}{each['mfu']:>7.1%}"
            f"{each['peak_memory'] / 2**30:>7.2f} GiB{each['seconds_to_first_step']:>10.1f} s"
        )
    ratio = measured["speedup"]
    lines.append(f"speedup {ratio['median']:.2f} ({ratio['low']:.2f} … {ratio['high']:.2f})")
    lines.append(
        f"ours: {measured['seconds_to_import']:.1f} s of the time to the first step are imports; "
        f"{measured['share_waiting_for_data']:.2%} of a step waits for data"
    )
    others = {what: of for what, of in measured["tried"].items() if what not in measured["contenders"]}
    lines += [
        f"  {what:<26} {of[:80] if isinstance(of, str) else f'{of:9,.0f}'}   (tried once)"
        for what, of in others.items()
    ]
    if (disturbed := sum(share > BUSY for share in measured["busy"])) > 0:
        lines.append(
            f"The machine was busy with something else before {disturbed} of {len(measured['busy'])} measurements "
            f"(up to {max(measured['busy']):.0%} of it): measure again when it is quiet."
        )
    return "\n".join(lines)
