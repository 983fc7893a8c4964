"""`check run RUN`: are its files intact, and does replaying its last steps give the losses in metrics.jsonl?

usage: powertrain check run RUN [--steps N]

examples:
  powertrain check run runs/quickstart --steps 20
"""

from __future__ import annotations

import itertools
import tempfile
from pathlib import Path
from typing import Any

from powertrain.launch.parser import verb_parser
from powertrain.train.check import check
from powertrain.train.compose import load
from powertrain.train.errors import ConfigError
from powertrain.train.imports import heavy_imports

_EXACT = ("tokens", "samples", "batch", "lr", "lr_per_group", "phase", "skipped")
_LOSSES = ("lm_loss", "balance_loss", "z_loss", "loss", "grad_norm")
TOLERANCE = {"fp32": 1e-5, "bf16": 1e-2}  # relative, on other hardware than the run's


def main(arguments: list[str]) -> int:
    """Verify every checkpoint, then replay; 1 on the first difference, which is named."""
    parser = verb_parser("check run", __doc__)
    parser.add_argument("run", type=Path, help="the folder of a run")
    parser.add_argument("--steps", type=int, default=10, help="how many of the last steps to replay; default 10")
    options = parser.parse_args(arguments)
    config = load(options.run / "config.yaml")
    check(config)

    with heavy_imports():
        from powertrain.data.files import read_record
        from powertrain.train import checkpoint, resume
        from powertrain.train.track import read_back

    found = checkpoint.available(options.run / "checkpoints")
    for path in found:
        if wrong := checkpoint.defects(path):
            print(f"FAIL: {path}: {'; '.join(wrong)}")
            return 1
    print(f"{len(found)} checkpoint(s) intact, byte for byte.")

    metrics = options.run / "metrics.jsonl"
    last = next((line["step"] for line in read_back(metrics)), 0)
    if not last:
        raise ConfigError(f"{metrics} has no step to replay.")
    parent = resume.parent(options.run)
    before = [path for path in [*([parent] if parent else []), *found] if checkpoint.step_of(path) < last]
    # With a second warmup the configuration does not give the learning rates of the steps before it.
    begins = config.rewarmup_start or 0
    before = [path for path in before if checkpoint.load_state(path).tokens >= begins]
    early_enough = [path for path in before if checkpoint.step_of(path) <= last - options.steps]
    candidates = early_enough or before[:1]
    start_from = candidates[-1] if candidates else None
    if start_from is None and (parent is not None or begins or last > options.steps):
        raise ConfigError(
            f"{options.run} has no checkpoint before its last step {last}, and starting over would take {last} steps "
            f"instead of {options.steps}. Ask for --steps {last}, or keep more checkpoints (checkpoint.keep)."
        )

    from powertrain.train.assemble import assemble
    from powertrain.train.engine import Engine
    from powertrain.train.state import State
    from powertrain.train.step import train_step

    begun = read_record(options.run / "run.json").get("starts")
    recorded = begun[-1].get("hardware") if isinstance(begun, list) and begun and isinstance(begun[-1], dict) else None
    with tempfile.TemporaryDirectory() as scratch:
        config.data.tokenizer.path = str(options.run / "tokenizer")
        config.run.folder = scratch
        engine = Engine(config)
        same_machine = engine.hardware() == recorded
        state = State(tokens=config.run.tokens_seen)
        parts = assemble(config, engine, state, start_from, print if engine.is_main else lambda text: None)
        first = state.step + 1
        lines: dict[int, dict[str, Any]] = {}
        for line in itertools.takewhile(lambda line: line["step"] >= first, read_back(metrics)):
            lines.setdefault(line["step"], line)
        while state.step < last:
            record = train_step(config, engine, parts.schedule, parts.batches, parts.balance, state)
            difference = _difference(
                lines.get(state.step), record, 0.0 if same_machine else TOLERANCE[config.precision]
            )
            if difference:
                print(f"FAIL: step {state.step}: {difference}")
                return 1
    how = (
        "bit for bit"
        if same_machine
        else f"to {TOLERANCE[config.precision]}, with other ranks, threads, kernels or hardware than the run's"
    )
    print(f"PASS: steps {first} to {last} give the same tokens, samples and learning rates, and the same losses {how}.")
    return 0


def _difference(line: dict[str, Any] | None, record: dict[str, Any], tolerance: float) -> str | None:
    """The first thing that differs, in words."""
    if line is None:
        return "metrics.jsonl has no such step"
    for name in _EXACT:
        if line.get(name) != record[name]:
            return f"{name} was {line.get(name)} and is {record[name]}"
    for name in _LOSSES:
        was, now = line.get(name), record[name]
        if not _alike(was, now, tolerance):
            return f"{name} was {was!r} and is {now!r}"
    return None


def _alike(was: Any, now: float | None, tolerance: float) -> bool:
    try:
        return was == now or (now is not None and abs(now - was) <= tolerance * abs(was))
    except (TypeError, OverflowError):  # not a number, or one too large for a float
        return False
