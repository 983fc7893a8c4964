"""Checkpoints: write, verify, choose, prune.

    checkpoints/step-00000100/
        weights.safetensors                        float32 masters by Hugging Face parameter name
        exp_avg.safetensors exp_avg_sq.safetensors
        state.json                                 State, optimizer steps, expert assignments, data fingerprints
        config.yaml                                what it was trained with
        rng/rank-00000.safetensors                 random state of each rank
        manifest.json                              size and SHA-256 of every file above, written last

A checkpoint is written beside its place, synced, and renamed into it. It exists when its manifest does and
every file matches. The newest valid one is found by its step: no pointer file has to be trusted.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from train.balance import Balance
from train.config import ConfigError, as_dict
from train.engine import MOMENTS, Engine
from train.state import State

_NAME = re.compile(r"step-(\d{8,})")


def save(checkpoints: Path, engine: Engine, state: State, balance: Balance, data_fingerprint: dict[str, str]) -> Path:
    """Write the checkpoint of `state`, and only then drop the oldest, so that `checkpoint.keep` stay.

    Collective: every rank calls it.

    Args:
        data_fingerprint: of the tokens of each corpus, so that a resume can tell whether they are the same.

    Raises:
        OSError: it could not be written (a full disk, say); older checkpoints are untouched and the partial one
            is removed.
    """
    final = checkpoints / f"step-{state.step:08d}"
    partial = checkpoints / f".{final.name}.partial"
    if engine.is_main:
        shutil.rmtree(partial, ignore_errors=True)
        (partial / "rng").mkdir(parents=True)
    engine.barrier()
    _save_tensors(_rng_state(engine), partial / _rng_file(engine.rank))
    engine.barrier()
    if engine.is_main:
        try:
            _write(partial, final, engine, state, balance, data_fingerprint)
        except OSError as error:
            written = sum(path.stat().st_size for path in partial.rglob("*") if path.is_file())
            shutil.rmtree(partial, ignore_errors=True)
            needed = 12 * sum(p.numel() for p in engine.model.parameters())
            raise OSError(
                error.errno,
                f"The checkpoint of step {state.step} could not be written to {checkpoints}: {error.strerror}. "
                f"It needs about {needed / 1e6:,.0f} MB; {written / 1e6:,.0f} MB were written and are removed. "
                "Older checkpoints are intact.",
            ) from error
        for old in available(checkpoints)[: -engine.config.checkpoint.keep]:
            _remove(old)
    engine.barrier()
    return final


def _write(
    partial: Path, final: Path, engine: Engine, state: State, balance: Balance, data_fingerprint: dict[str, str]
) -> None:
    taken, moments = engine.optimizer_state()
    _save_tensors(engine.full_parameters(), partial / "weights.safetensors")
    for moment in MOMENTS:
        _save_tensors(moments[moment], partial / f"{moment}.safetensors")
    _write_text(
        partial / "state.json",
        json.dumps(
            {
                "state": dataclasses.asdict(state),
                "optimizer_steps": taken,
                "assignments": balance.previous.tolist(),
                "data_fingerprint": data_fingerprint,
            }
        ),
    )
    _write_text(partial / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(as_dict(engine.config))))
    files = sorted(path for path in partial.rglob("*") if path.is_file())
    manifest = {
        "step": state.step,
        "files": {
            path.relative_to(partial).as_posix(): {"size": path.stat().st_size, "sha256": _sha256(path)}
            for path in files
        },
    }
    _write_text(partial / "manifest.json", json.dumps(manifest, indent=1))
    _sync_folder(partial / "rng")
    _sync_folder(partial)
    if final.exists():  # what cannot be trusted; a valid one would not be written again
        shutil.rmtree(final)
    os.replace(partial, final)
    _sync_folder(final.parent)


def load(checkpoint: Path, engine: Engine, state: State, balance: Balance) -> None:
    """Put everything of a verified checkpoint back in place, on every rank."""
    saved = json.loads((checkpoint / "state.json").read_text())
    for name, value in saved["state"].items():
        setattr(state, name, value)
    balance.previous = torch.tensor(saved["assignments"], dtype=torch.int64).reshape(balance.previous.shape)
    engine.load(
        load_file(checkpoint / "weights.safetensors"),
        saved["optimizer_steps"],
        {moment: load_file(checkpoint / f"{moment}.safetensors") for moment in MOMENTS},
    )
    rng = checkpoint / _rng_file(engine.rank)
    if rng.exists():  # on more ranks than before, the new ones keep their seed
        _set_rng_state(load_file(rng), engine)


def load_state(checkpoint: Path) -> State:
    """The progress that a checkpoint was made at."""
    return State(**json.loads((checkpoint / "state.json").read_text())["state"])


def load_weights(checkpoint: Path, model: torch.nn.Module) -> None:
    """Put the weights of a verified checkpoint into a model, without an engine."""
    weights = load_file(checkpoint / "weights.safetensors")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name])


def available(checkpoints: Path) -> list[Path]:
    """Folders with a checkpoint's name and a manifest, oldest first. Their files are not verified."""
    return [path for path in _named(checkpoints) if not path.is_symlink() and (path / "manifest.json").is_file()]


def _named(checkpoints: Path) -> list[Path]:
    if not checkpoints.is_dir():
        return []
    return sorted((path for path in checkpoints.iterdir() if _NAME.fullmatch(path.name)), key=step_of)


def step_of(checkpoint: Path) -> int:
    """The step in a checkpoint folder's name."""
    match = _NAME.fullmatch(checkpoint.name)
    if match is None:
        raise ConfigError(f"{checkpoint} is not a checkpoint: its folder is not named step-NNNNNNNN.")
    return int(match.group(1))


def faults(checkpoint: Path) -> list[str]:
    """What is wrong with a checkpoint, a line each file; empty when every byte is as written."""
    try:
        manifest = json.loads((checkpoint / "manifest.json").read_text())
        files = {str(name): (entry["size"], entry["sha256"]) for name, entry in manifest["files"].items()}
        if manifest["step"] != step_of(checkpoint) or not {"weights.safetensors", "state.json"} <= files.keys():
            return ["manifest.json is not this checkpoint's"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return [f"manifest.json cannot be read: {error}"]
    wrong = []
    for name, (size, sha256) in files.items():
        path = checkpoint / name
        if ".." in Path(name).parts or (path.is_absolute() and not path.is_relative_to(checkpoint)):
            wrong.append(f"{name} lies outside the checkpoint")
        elif path.is_symlink() or not path.is_file():
            wrong.append(f"{name} is missing")
        elif path.stat().st_size != size:
            wrong.append(f"{name} has {path.stat().st_size} bytes, not {size}")
        elif _sha256(path) != sha256:
            wrong.append(f"{name} differs from its SHA-256")
    return wrong


def verified(checkpoint: Path) -> Path:
    """The same path, when it is a checkpoint without faults.

    Raises:
        ConfigError: it is not, with what is wrong.
    """
    step_of(checkpoint)
    if wrong := faults(checkpoint):
        raise ConfigError(f"The checkpoint {checkpoint} is not valid: {'; '.join(wrong)}.")
    return checkpoint


def at_step(checkpoints: Path, step: int) -> Path:
    """The verified checkpoint of a step.

    Raises:
        ConfigError: there is none, with the steps that there are, or it is not valid.
    """
    steps = [step_of(path) for path in available(checkpoints)]
    if step not in steps:
        raise ConfigError(f"{checkpoints} has no checkpoint of step {step}; it has those of steps {steps}.")
    return verified(checkpoints / f"step-{step:08d}")


def newest_valid(checkpoints: Path, report: Any = print) -> Path | None:
    """The newest checkpoint without faults; what is wrong with newer ones goes to `report`.

    Returns:
        None when there has never been a checkpoint.

    Raises:
        ConfigError: there are checkpoints, and none is valid. Training must not begin again unasked.
    """
    found = available(checkpoints)
    for checkpoint in reversed(found):
        wrong = faults(checkpoint)
        if not wrong:
            return checkpoint
        report(f"Checkpoint {checkpoint} is not valid, trying the one before: {'; '.join(wrong)}.")
    if _named(checkpoints):
        raise ConfigError(
            f"No checkpoint in {checkpoints} is valid, so the run cannot go on. Restore one from a copy, or "
            "choose another run.name to begin again."
        )
    return None


def _remove(checkpoint: Path) -> None:
    """Renamed first: a half-removed checkpoint must not look like one."""
    doomed = checkpoint.with_name(f".{checkpoint.name}.removing")
    os.replace(checkpoint, doomed)
    shutil.rmtree(doomed)


def set_aside(checkpoints: Path, newest: Path | None) -> None:
    """Rename what is newer than `newest`, the newest valid one: nothing invalid counts among those to keep."""
    for path in available(checkpoints):
        if newest is not None and step_of(path) > step_of(newest):
            aside = path.with_name(f"{path.name}.invalid")
            shutil.rmtree(aside, ignore_errors=True)
            os.replace(path, aside)


def clean(checkpoints: Path) -> None:
    """Remove what an interrupted save or removal left."""
    for path in (*checkpoints.glob(".step-*.partial"), *checkpoints.glob(".step-*.removing")):
        shutil.rmtree(path, ignore_errors=True)


def _rng_file(rank: int) -> str:
    return f"rng/rank-{rank:05d}.safetensors"


def _rng_state(engine: Engine) -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if engine.device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(engine.device)
    return state


def _set_rng_state(state: dict[str, torch.Tensor], engine: Engine) -> None:
    torch.set_rng_state(state["cpu"])
    if engine.device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], engine.device)


def _save_tensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
    try:
        save_file({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, path)
    except SafetensorError as error:  # how safetensors reports a full disk
        number = re.search(r"os error (\d+)", str(error))
        raise OSError(int(number[1]) if number else 0, str(error)) from error
    _sync_file(path)


def _write_text(path: Path, text: str) -> None:
    path.write_text(text)
    _sync_file(path)


def _sync_file(path: Path) -> None:
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 22):
            digest.update(block)
        return digest.hexdigest()
