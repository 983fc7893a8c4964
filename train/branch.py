"""A branch: a run that begins from a checkpoint on the trunk of another run, which it does not change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from powertrain.schedulers import WITH_DECAY
from powertrain.train.compose import load
from powertrain.train.config import Config
from powertrain.train.errors import ConfigError
from powertrain.train.imports import heavy_imports


@dataclass(frozen=True)
class Origin:
    """Where branches begin.

    Attributes:
        run: the folder of the parent.
        checkpoint: one of its checkpoints, verified.
        config: the parent's settings at that step.
        tokens: reading of the clock there.
    """

    run: Path
    checkpoint: Path
    config: Config
    tokens: int

    @property
    def trained(self) -> int:
        """Tokens that the parent had trained there."""
        return self.config.trained(self.tokens)

    def settings(self, folder: Path, decay: Mapping[str, Any], tokens: int) -> dict[str, Any]:
        """Changes to the parent's settings that make a branch of `tokens` tokens in `folder`, with this decay."""
        return {
            **place(folder),
            "run.resume": str(self.checkpoint.resolve()),
            "run.tokens": self.trained + tokens,
            "schedule.decay": dict(decay),
            "data.mixture": self.config.stages()[0][1],  # explicit, so that a corpus added later does not join it
            "data.tokenizer.path": str((self.run / "tokenizer").resolve()),
        }

    def branch(self, changed: dict[str, Any], overrides: Sequence[str]) -> Config:
        """The parent's configuration with these changes, and KEY=VALUE on top.

        Raises:
            ConfigError: a change is refused.
        """
        return load(self.checkpoint / "config.yaml", changed, overrides)


def place(folder: Path) -> dict[str, Any]:
    """The settings of a run in `folder`."""
    return {"run.name": folder.name, "run.folder": str(folder.parent)}


def origin(run: Path, step: int, verb: str) -> Origin:
    """The checkpoint of `step` on the trunk of `run`.

    Args:
        verb: what branches off there, for messages.

    Raises:
        ConfigError: there is no such checkpoint, it lies in warmup or in a decay, or the schedule has no decay.
    """
    from powertrain.train import checkpoint

    if not (run / "config.yaml").is_file():
        raise ConfigError(f"{run} is not the folder of a run: it has no config.yaml.")
    checkpoints = run / "checkpoints"
    chosen = checkpoint.at_step(checkpoints, step)
    config = load(chosen / "config.yaml")
    tokens = checkpoint.load_state(chosen).tokens
    if config.schedule["name"] not in WITH_DECAY:
        raise ConfigError(
            f"{run} was trained with the schedule '{config.schedule['name']}', which has no decay; "
            f"{' and '.join(WITH_DECAY)} have one."
        )
    phase = config.make_schedule().phase(tokens)
    if phase != "trunk":
        steps = [other for other in map(checkpoint.step_of, checkpoint.available(checkpoints)) if other != step]
        raise ConfigError(
            f"Step {step} of {run} lies in its {phase}: a {verb} branches off the trunk. "
            f"{f'Its other checkpoints are of steps {steps}.' if steps else 'It has no other checkpoint.'}"
        )
    return Origin(run, chosen, config, tokens)


def begun(folder: Path, overrides: Sequence[str]) -> Config | None:
    """The configuration of the branch in `folder` if it has a checkpoint of its own and so needs no parent any more.

    Raises:
        ConfigError: it holds a run without a decay, which no branch is; or a change in `overrides` is refused.
    """
    with heavy_imports():
        from powertrain.train import checkpoint

    if not checkpoint.available(folder / "checkpoints"):
        return None
    config = load(folder / "config.yaml", place(folder), overrides)
    if config.make_schedule().decay is None:
        raise ConfigError(f"{folder} holds a run without a decay, and not this branch. Give that a --name of its own.")
    return config


def check_same(folder: Path, was: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    """Check that the branch in `folder` was begun with the options that are given now.

    Raises:
        ConfigError: an option differs.
    """
    if differing := ", ".join(f"{name} {was[name]}, not {asked[name]}" for name in was if was[name] != asked[name]):
        raise ConfigError(f"{folder} holds a branch with {differing}. Give the new branch another --name.")
