"""What only a GPU can show, in at most nine minutes on one card: that it is right, how fast it is, what it takes.

usage: python -m powertrain.launch.bench.gpu FOLDER

Each part runs in a process of its own with a limit of its own: the tests marked gpu (of the folder that it is started
in); 20 steps of a small GraniteMoe, compared with a CPU's in float32; where a step waits for the GPU; the measurement
of `powertrain bench` on PowerMoE-3B and the 1B MoE, with activation checkpointing, compiled, and beside
transformers.Trainer; and what `powertrain estimate` says of their memory. Writes FOLDER/gpu.json and gpu.md, anew after
each part. The exit status is 1 where a part failed, was stopped or was not reached, and 2 without a CUDA device.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from powertrain.data.files import replace_text
from powertrain.data.tokens import TokenFile
from powertrain.launch import bench
from powertrain.train.cli import guard
from powertrain.train.compose import composed
from powertrain.train.errors import ConfigError

SECONDS = 520  # for all parts: what is left of nine minutes is for what is around them
LOSS_STEPS, BENCH_STEPS = 20, 5  # of the second, the first is discarded
SMALL = (*bench.SHAPES["hidden 256"], *bench.RUN, "schedule.max_lr=0.007", "schedule.warmup_tokens=40_960")
_LARGE = ("data.sequence_length=4096", "batch.sequences=4", "precision=bf16", *bench.RUN)
_TOKENS_A_STEP = 4 * 4096
_3B = ("+experiment=powermoe_3b", "batch.micro_sequences=1", *_LARGE)
_1B = ("+experiment=moe_1b", "batch.micro_sequences=2", *_LARGE)
_CHECKPOINTING, _COMPILED = "engine.activation_checkpointing=true", "engine.torch_compile=true"
MODELS = {
    "powermoe_3b": _3B,
    "powermoe_3b, checkpointing": (*_3B, _CHECKPOINTING),
    "powermoe_3b, compiled": (*_3B, _COMPILED),
    "powermoe_3b, checkpointing, compiled": (*_3B, _CHECKPOINTING, _COMPILED),
    "moe_1b": _1B,
    "moe_1b, compiled": (*_1B, _COMPILED),
}
REFERENCE = "losses: CPU, fp32"


@dataclass(frozen=True)
class Part:
    """A command that prints its result as JSON on the last line.

    Attributes:
        kind: tests, losses, waits, speed, memory, or a fact of the machine.
        limit: seconds after which it is stopped.
    """

    kind: str
    name: str
    limit: float
    command: list[str]
    environment: dict[str, str] = field(default_factory=dict)


def main() -> None:
    """Run all parts, write and print."""
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        print(__doc__)
        sys.exit(0 if sys.argv[1:] in (["-h"], ["--help"]) else 2)
    sys.exit(guard(lambda: _kit(Path(sys.argv[1]))))


def _kit(folder: Path) -> int:
    if not torch.cuda.is_available():
        raise ConfigError(
            f"No CUDA device was found (PyTorch {torch.__version__}), and these parts measure one. Run `make gpu` on a "
            "machine with a GPU, its driver and a PyTorch that was built for CUDA; `powertrain bench` measures a CPU."
        )
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        small, large = Path(temporary) / "small", Path(temporary) / "large"
        bench.write_tokens(small, composed([*SMALL]), (LOSS_STEPS + 1) * 8 * 512)
        bench.write_tokens(large, composed([*_3B]), (BENCH_STEPS + 1) * _TOKENS_A_STEP)
        found = run_all(list(parts(small, large)), folder, SECONDS)
    return int(any("error" in part or part["result"].get("status") for part in found.values()))


def parts(small: Path, large: Path) -> Iterator[Part]:
    """All parts, what matters most first; `small` and `large` are token files."""

    def losses(name: str, limit: float, *more: str, **environment: str) -> Part:
        return Part("losses", f"losses: {name}", limit, _worker(small, LOSS_STEPS, *SMALL, *more), environment)

    def speed(model: str, limit: float, what: str = "powertrain") -> Part:
        command = _worker(large, BENCH_STEPS + 1, *MODELS[model], what=what)
        return Part("speed", f"{model}: {what}", limit, command)

    def memory(model: str) -> Part:
        return Part("memory", f"{model}: estimate", 60, _call(estimate, *MODELS[model]))

    yield Part("hardware", "hardware", 40, _call(hardware))
    yield Part("tests", "tests", 90, _call(tests))
    yield Part("peak", "peak", 30, [*_WORKER, "peak"])
    yield losses("CPU, fp32", 90, "precision=fp32", CUDA_VISIBLE_DEVICES="")
    yield losses("GPU, bf16", 40, "precision=bf16")
    yield losses("GPU, fp32", 40, "precision=fp32")
    yield losses("GPU, fp32, grouped_mm", 40, "precision=fp32", "model.experts_implementation=grouped_mm")
    for precision in ("bf16", "fp32"):
        yield Part("waits", f"waits: {precision}", 40, _call(waits, str(small), *SMALL, f"precision={precision}"))
    for model in ("powermoe_3b, checkpointing", "powermoe_3b", "moe_1b"):
        yield speed(model, 90)
        yield memory(model)
    yield speed("powermoe_3b, checkpointing", 90, "trainer/grouped_mm/bf16")
    for precision in ("bf16", "autocast"):
        yield speed("moe_1b", 60, f"trainer/grouped_mm/{precision}")
    for model in ("powermoe_3b, compiled", "moe_1b, compiled", "powermoe_3b, checkpointing, compiled"):
        yield speed(model, 120)


_NOW = "NOW"  # in a command: the time at which it is started
_WORKER = [sys.executable, "-P", "-m", "powertrain.launch.bench.worker", _NOW]


def _worker(tokens: Path, steps: int, *overrides: str, what: str = "powertrain") -> list[str]:
    return [*_WORKER, what, str(tokens), str(steps), *overrides]


def _call(function: Callable[..., None], *arguments: str) -> list[str]:
    code = f"import sys; from powertrain.launch.bench import gpu; gpu.{function.__name__}(*sys.argv[1:])"
    return [sys.executable, "-P", "-c", code, *arguments]


# ------------------------------------------------------------------------------------------------ running them


def run_all(parts: list[Part], folder: Path, seconds: float) -> dict[str, dict[str, Any]]:
    """The parts' results in their order, written to `folder` after each; none runs beyond `seconds` from now."""
    until = time.monotonic() + seconds
    found: dict[str, dict[str, Any]] = {}
    for part in parts:
        left = until - time.monotonic()
        print(f"{part.name} …", file=sys.stderr)
        begin = time.monotonic()
        if left > 0:
            outcome = run_one(part, min(part.limit, left))
        else:
            outcome = {"error": f"not run: the {seconds:g} s of all parts were over"}
        found[part.name] = {"kind": part.kind, "limit": part.limit, "seconds": time.monotonic() - begin, **outcome}
        replace_text(folder / "gpu.json", json.dumps(found, indent=1) + "\n")
        replace_text(folder / "gpu.md", table(found))
    print(table(found))
    return found


def run_one(part: Part, limit: float) -> dict[str, Any]:
    """{"result": …} or {"error": …}; after `limit` seconds it and what it has started are killed."""
    devices = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": devices, "PYTHONIOENCODING": "utf-8"} | part.environment
    command = [str(time.time()) if argument == _NOW else argument for argument in part.command]
    # Files, not pipes: a grandchild in a session of its own would keep a pipe open.
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        process = subprocess.Popen(command, stdout=out, stderr=err, env=environment, start_new_session=True)
        stopped = False
        try:
            process.wait(limit)
        except subprocess.TimeoutExpired:
            stopped = True
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        printed, said = (_lines(file) for file in (out, err))
    if stopped:
        return {"error": f"stopped after {limit:.0f} s", "stderr": said[-20:]}
    try:
        if process.returncode == 0:
            return {"result": json.loads(printed[-1])}
    except (IndexError, ValueError):
        pass
    return {"error": said[-1] if said else f"exit status {process.returncode}", "stderr": said[-20:]}


def _lines(file: Any) -> list[str]:
    file.seek(0)
    return [line for line in file.read().decode(errors="replace").splitlines() if line.strip()]


# ---------------------------------------------------------------------------- parts that are no other command


def hardware() -> None:
    """Print the machine, and what of the card decides which kernels there are."""
    capability = torch.cuda.get_device_capability()
    memory = torch.cuda.get_device_properties(0).total_memory
    print(json.dumps({**bench.hardware(), "capability": capability, "gpu_memory": memory, "cuda": torch.version.cuda}))


def tests() -> None:
    """Print what pytest says of the tests marked gpu."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q"]
    ended = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", check=False)
    lines = [line for line in (ended.stdout.strip() or ended.stderr).splitlines() if line.strip()]
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    print(json.dumps({"status": ended.returncode, "summary": lines[-1], "failed": failed}))


def waits(tokens: str, *overrides: str) -> None:
    """Print how often each line waits for the GPU in the third step, by PyTorch's own warnings."""
    from powertrain.launch.bench.worker import assemble
    from powertrain.train.state import State
    from powertrain.train.step import train_step

    config = composed(list(overrides))
    ours, state = assemble(config, TokenFile(tokens)), State()
    for step in range(3):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            if step == 2:
                torch.cuda.set_sync_debug_mode("warn")
            train_step(config, ours.engine, ours.schedule, ours.batches, ours.balance, state)
    torch.cuda.set_sync_debug_mode("default")
    lines = Counter(
        f"{Path(each.filename).parent.name}/{Path(each.filename).name}:{each.lineno}"
        for each in caught
        if "synchroniz" in str(each.message)
    )
    print(json.dumps({"waits": lines.total(), "lines": dict(lines)}))


def estimate(*overrides: str) -> None:
    """Print the memory that is estimated for a step with the kernels that this machine has, and a token's FLOPs."""
    from powertrain.launch.estimate.memory import Passes, needed
    from powertrain.train import metrics
    from powertrain.train.model import granite

    config = composed(list(overrides))
    kernels = granite.implementations(config, "cuda")
    config.model.attn_implementation = kernels["attn_implementation"]
    memory = needed(config, "plain", 1, Passes(config, 1, gpu=True))
    flops = metrics.flops_per_token(config, metrics.parameters_of(config))
    print(json.dumps({"bytes": memory.total(), "parts": memory, "kernels": kernels, "flops_per_token": flops}))


# ------------------------------------------------------------------------------------------- what is written


def table(found: dict[str, dict[str, Any]]) -> str:
    """The results as a table in Markdown."""
    rows = [
        f"| {name} | {described(name, found).replace('|', '∣')} | {part['seconds']:.0f} s |"
        for name, part in found.items()
    ]
    return "\n".join(["| part | result | took |", "|---|---|---|", *rows]) + "\n"


def described(name: str, found: dict[str, dict[str, Any]]) -> str:
    """A part's result in a line."""
    part = found[name]
    if "error" in part:
        return f"**failed**: {part['error'][:200]}"
    result = part["result"]
    if part["kind"] == "losses":
        return _losses(result["losses"], _result(found, REFERENCE))
    if part["kind"] == "waits":
        lines = ", ".join(f"{line} × {count}" for line, count in result["lines"].items())
        return f"{result['waits']} in a step: {lines}" if lines else "none"
    if part["kind"] == "speed":
        return _speed(name, result, found)
    if part["kind"] == "memory":
        return f"{result['bytes'] / 2**30:.1f} GiB, {', '.join(result['kernels'].values())}"
    if part["kind"] == "tests":
        return f"**failed**: {result['summary']}" if result["status"] else str(result["summary"])
    if part["kind"] == "peak":
        return ", ".join(f"{dtype} {flops / 1e12:,.0f} TFLOP/s" for dtype, flops in result.items())
    return ", ".join(f"{key} {value}" for key, value in result.items())


def _result(found: dict[str, dict[str, Any]], name: str) -> dict[str, Any] | None:
    result: dict[str, Any] | None = found.get(name, {}).get("result")
    return result


def _losses(losses: list[float | None], reference: dict[str, Any] | None) -> str:
    if None in losses:
        return f"**not finite** from step {losses.index(None) + 1} on"
    first, last = losses[0], losses[-1]
    said = f"{first:.4f} → {last:.4f} in {len(losses)} steps"
    if reference is None or None in reference["losses"]:
        return said
    apart = [abs(a - b) for a, b in zip(losses, reference["losses"], strict=True)]
    return f"{said}; from the CPU's in float32 {apart[0]:.1e} at the first, {max(apart):.1e} at most"


def _speed(name: str, result: dict[str, Any], found: dict[str, dict[str, Any]]) -> str:
    speed = _TOKENS_A_STEP / statistics.median(result["seconds"])
    said, model = f"{speed:,.0f} tokens/s", name.partition(":")[0]
    estimated = _result(found, f"{model.removesuffix(', compiled')}: estimate")
    peak = _result(found, "peak")
    if estimated is not None and peak is not None:
        said += f", {speed * estimated['flops_per_token'] / max(peak.values()):.1%} of the peak"
    said += f", {result['peak_memory'] / 2**30:.1f} GiB"
    if estimated is not None and name.endswith(": powertrain"):
        said += f" ({result['peak_memory'] / estimated['bytes']:.2f} × the estimate)"
    return said


if __name__ == "__main__":
    main()
