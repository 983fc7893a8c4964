"""Where a run writes what happens: metrics.jsonl and evals.jsonl always, accelerate's trackers beside them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train.config import Config, as_dict
from train.environment import replace_text

if TYPE_CHECKING:
    from train.engine import Engine
    from train.state import State


class Tracker:
    """Appends JSON lines and passes numbers on; on ranks other than the first it does nothing."""

    def __init__(self, folder: Path, config: Config, engine: Engine, state: State) -> None:
        self.active = engine.is_main
        self.accelerator = engine.accelerator if config.tracker.log_with else None
        if self.active:
            for name in ("metrics.jsonl", "evals.jsonl"):
                _cut_after(folder / name, state.step)
            self._metrics = open(folder / "metrics.jsonl", "a", buffering=1)  # noqa: SIM115
            self._evals = open(folder / "evals.jsonl", "a", buffering=1)  # noqa: SIM115
        if self.accelerator:
            os.environ.setdefault("WANDB_DIR", str(folder))
            init_kwargs = {"wandb": {"name": config.run.name, **config.tracker.init_kwargs}}
            self.accelerator.init_trackers(config.tracker.project, as_dict(config), init_kwargs)

    def step(self, metrics: dict[str, Any]) -> None:
        """One optimizer step. A step done again after a resume is written again; the last line counts."""
        if self.active:
            self._metrics.write(json.dumps(metrics) + "\n")
        if self.accelerator:
            self.accelerator.log(_numbers(metrics), step=metrics["step"])

    def evaluation(self, metrics: dict[str, Any]) -> None:
        """One evaluation of one corpus, or of all together."""
        if self.active:
            self._evals.write(json.dumps(metrics) + "\n")
        if self.accelerator:
            prefix = f"evaluation/{metrics['corpus']}/"
            numbers = {prefix + k: v for k, v in _numbers(metrics).items() if k != "step"}
            self.accelerator.log(numbers, step=metrics["step"])

    def close(self) -> None:
        """Flush files to disk and end the trackers."""
        if self.active:
            for file in (self._metrics, self._evals):
                os.fsync(file.fileno())
                file.close()
        if self.accelerator:
            self.accelerator.end_training()


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of metrics.jsonl, one a step in order: a step trained again replaces its earlier line.

    A last line cut short by a killed process is left out.
    """
    by_step: dict[Any, dict[str, Any]] = {}
    if path.exists():
        for line in path.read_text(errors="replace").splitlines():
            try:
                entry = json.loads(line)
                by_step[(entry["step"], entry.get("corpus"))] = entry
            except (ValueError, TypeError, KeyError):
                continue
    return [by_step[key] for key in sorted(by_step, key=lambda key: (key[0], str(key[1])))]


def _numbers(metrics: dict[str, Any], prefix: str = "") -> dict[str, float]:
    flat: dict[str, float] = {}
    for name, value in metrics.items():
        if isinstance(value, dict):
            flat |= _numbers(value, f"{prefix}{name}/")
        elif isinstance(value, (int, float)):
            flat[prefix + name] = value
    return flat


def _cut_after(path: Path, step: int) -> None:
    """Drop what lies after the checkpoint that the run goes on from: those steps are taken again, or never."""
    if path.exists():
        kept = [json.dumps(entry) + "\n" for entry in read_lines(path) if entry["step"] <= step]
        replace_text(path, "".join(kept))
