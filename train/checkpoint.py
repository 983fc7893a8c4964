"""Checkpoints: write, verify, choose, prune.

    checkpoints/step-00000100/
        weights.safetensors                        float32 masters by Hugging Face parameter name
        average.safetensors                        their running average, if one is kept
        exp_avg.safetensors exp_avg_sq.safetensors
        state.json                                 State, optimizer steps, expert assignments, data fingerprints
        config.yaml                                what it was trained with
        rng/rank-00000.safetensors                 random state of each rank
        manifest.json                              size and SHA-256 of every file above, written last

A sharded engine's ranks each write what they keep: weights-00001-of-00004.safetensors, and so on, in which
NAME[start:stop] are the elements [start, stop) of the flattened parameter NAME. Any engine on any number of ranks
reads from either kind just the elements that it will keep, so nothing is ever converted.

A checkpoint is written under a temporary name, synced, and renamed. It is valid when its manifest exists and every
file matches it. The newest valid one is found by its step: there is no pointer file that could be wrong.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import re
import shutil
import stat
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from powertrain.data.files import read_record, replace_text, reset_permissions, sha256, sync
from powertrain.train import faults
from powertrain.train.average import Average
from powertrain.train.balance import Balance
from powertrain.train.engine import MOMENTS, Engine, Read
from powertrain.train.errors import ConfigError, RunFailed
from powertrain.train.redact import settings_text
from powertrain.train.state import AVERAGE, State

_NAME = re.compile(r"step-(\d{8,})")
_PIECE = re.compile(r"(.+)\[(\d+):(\d+)\]")
SAVED = ".saved"  # in the run's folder: the step of the last checkpoint, even if that is removed
_POLL_SECONDS = 0.01

_GONE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG)
# Errors of a file that is lost or damaged. Any other one, such as a permission or a server that does not answer, does
# not mean that the checkpoint is invalid, and it may be the best there is.
_LOST = (*_GONE, errno.ESTALE, errno.EIO, errno.EBADMSG, getattr(errno, "EUCLEAN", errno.EIO))


class Saver:
    """Writes checkpoints while training continues. Every rank has one, and its methods are collective.

    `save` copies what this rank keeps and leaves the writing to a thread. That of the first rank waits until all
    ranks have written, then completes the checkpoint, and only then removes the oldest, so that `checkpoint.keep`
    stay. A save that fails leaves older checkpoints as they are and removes the partial one.
    """

    def __init__(
        self,
        checkpoints: Path,
        engine: Engine,
        average: Average | None,
        data_fingerprint: dict[str, str],
        check_claim: Callable[[], None],
        log: Callable[[str], None],
    ) -> None:
        self.checkpoints = checkpoints
        self.engine = engine
        self.average = average
        self.data_fingerprint = data_fingerprint  # so that a resume can tell whether the tokens are the same
        self.check_claim = check_claim  # raises ConfigError when the run's folder is another one now
        self.log = log
        self.settings = settings_text(engine.config)  # once: it takes longer than a step of a tiny model
        self.saved_step: int | None = None  # of the last one begun
        self._thread: threading.Thread | None = None
        self._error: str | None = None  # why this rank could not write it
        self._kept: set[Path] = set()  # old ones that cannot be removed

    def save(self, state: State, balance: Balance) -> None:
        """Begin the checkpoint of `state`. If an earlier one could not be written, that is logged.

        Raises:
            ConfigError: on all ranks, when the run's folder is another one now.
        """
        began = time.perf_counter()
        try:
            self.finish()
        except RunFailed as error:
            self.log(f"Warning: {error} Training continues.")
        partial = self.checkpoints / f".step-{state.step:08d}.partial"

        def begin() -> None:
            self.check_claim()
            _clean(self.checkpoints)
            for folder in (self.checkpoints, partial, partial / "rng"):  # the run's own folder is not made again
                folder.mkdir(exist_ok=folder == self.checkpoints)
            for rank in range(self.engine.world_size):
                (partial / _pending_file(rank)).touch()

        self.saved_step = state.step
        try:
            self.engine.first_rank_decides(begin)
        except OSError as error:  # on all ranks
            self._error = self._explained(error, state.step)
            return
        tensors = self._copy()
        texts = {}
        if self.engine.is_main:
            progress = {
                "state": dataclasses.asdict(state),
                "optimizer_steps": self.engine.steps_taken(),
                "assignments": balance.previous.tolist(),
                "data_fingerprint": self.data_fingerprint,
                "engine": {"kind": self.engine.kind, "ranks": self.engine.world_size},
                "average": None if self.average is None else self.average.window,
            }
            texts["state.json"] = json.dumps(progress)
            texts["config.yaml"] = self.settings
        paused = time.perf_counter() - began
        self._thread = threading.Thread(
            target=self._write, args=(partial, state.step, tensors, texts, paused), daemon=True
        )
        self._thread.start()

    def finish(self) -> None:
        """Wait for the save under way.

        Raises:
            RunFailed: on all ranks, when it could not be written on one: a full disk, say.
        """
        if self._thread is not None:
            self._thread.join()
        elif self._error is None:
            return
        self._thread = None
        own, self._error = self._error, None
        errors = [error for error in self.engine.gather(own) if error is not None]
        if errors:
            raise RunFailed(errors[0])

    def _copy(self) -> dict[str, dict[str, torch.Tensor]]:
        """File → name → tensor on the CPU, of what this rank writes."""
        engine = self.engine
        kept = engine.fragments() if engine.sharded or engine.is_main else {}
        tensors: dict[str, dict[str, torch.Tensor]] = {what: {} for what in ("weights", *MOMENTS)}
        if self.average is not None:
            tensors[AVERAGE] = {}
        taken = engine.steps_taken()
        for name, fragment in kept.items():
            shape = engine.shapes[name]
            whole = fragment.stop - fragment.start == shape.numel()
            key = name if whole else f"{name}[{fragment.start}:{fragment.stop}]"
            for what in tensors:
                if what not in MOMENTS or taken:
                    if self.average is not None and what == AVERAGE:
                        values = self.average.values[name]
                    else:
                        values = fragment.master if what == "weights" else engine.moment(fragment, what)
                    values = values.detach().to("cpu", copy=True)
                    tensors[what][key] = values.view(shape) if whole else values
        shard = _shard(engine.rank, engine.world_size) if engine.sharded else ""
        writes = engine.sharded or engine.is_main  # all shards, empty or not: one that is missing shows
        files = {f"{what}{shard}.safetensors": named for what, named in tensors.items()} if writes else {}
        return {**files, _rng_file(engine.rank): _rng_state(engine)}

    # ------------------------------------------------------------------------ in the thread

    def _write(
        self,
        partial: Path,
        step: int,
        tensors: dict[str, dict[str, torch.Tensor]],
        texts: dict[str, str],
        paused: float,
    ) -> None:
        rank, done = self.engine.rank, {}
        try:
            for name, named in tensors.items():
                _save_tensors(named, partial / name)
                faults.at("write", rank, step, partial / name)
            for name, text in texts.items():
                _write_text(partial / name, text)
            for name in (*tensors, *texts):
                done[name] = {"size": (partial / name).stat().st_size, "sha256": sha256(partial / name)}
            replace_text(partial / _done_file(rank), json.dumps(done))
        except Exception as error:  # whatever it is, the checkpoint is incomplete
            self._error = self._explained(error, step)
        finally:
            (partial / _pending_file(rank)).unlink(missing_ok=True)  # takes no space, so it works on a full disk
        if self.engine.is_main:
            try:
                final = self._commit(partial, step)
                if final is not None:
                    self.log(f"Saved {final} (training was paused for {paused:.1f} s).")
            except Exception as error:
                self._error = self._explained(error, step)
                shutil.rmtree(partial, ignore_errors=True)

    def _commit(self, partial: Path, step: int) -> Path | None:
        """Wait until all ranks have written, and complete the checkpoint; None if one of them has failed."""
        ranks = range(self.engine.world_size)
        while any((partial / _pending_file(rank)).exists() for rank in ranks):
            time.sleep(_POLL_SECONDS)
        done = [partial / _done_file(rank) for rank in ranks]
        if not all(path.exists() for path in done):
            shutil.rmtree(partial, ignore_errors=True)  # its rank has the reason: see `finish`
            return None
        files: dict[str, Any] = {}
        for path in done:
            files |= json.loads(path.read_text(encoding="utf-8"))
            path.unlink()
        faults.at("manifest", 0, step)
        manifest = {"step": step, "files": dict(sorted(files.items()))}
        _write_text(partial / "manifest.json", json.dumps(manifest, indent=1))
        sync(partial / "rng")
        sync(partial)
        faults.at("rename", 0, step)
        final = self.checkpoints / f"step-{step:08d}"
        if final.exists():  # an invalid one; a valid one would not be written again
            shutil.rmtree(final)
        os.replace(partial, final)
        sync(self.checkpoints)
        with contextlib.suppress(OSError):
            replace_text(self.checkpoints.parent / SAVED, f"{step}\n")
        faults.at("prune", 0, step)
        for old in available(self.checkpoints)[: -self.engine.config.checkpoint.keep]:
            try:
                _remove(old)
            except OSError as error:  # the new one is complete nevertheless
                if old not in self._kept:
                    self.log(f"Warning: the old checkpoint {old} cannot be removed, and takes space: {error.strerror}.")
                self._kept.add(old)
        return final

    def _explained(self, error: Exception, step: int) -> str:
        each = bytes_a_parameter(self.average is not None)
        needed = each * sum(shape.numel() for shape in self.engine.shapes.values())
        why = error.strerror or str(error) if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
        return (
            f"The checkpoint of step {step} could not be written to {self.checkpoints} by rank {self.engine.rank}: "
            f"{why}. It needs about {needed / 1e6:,.0f} MB. Older checkpoints are intact."
        )


def bytes_a_parameter(averaged: bool) -> int:
    """Of a checkpoint: float32 master, two moments, and the running average if one is kept."""
    return 16 if averaged else 12


class Stored:
    """`weights`, a moment or the average, in the files of a checkpoint, by parameter name.

    Args:
        shapes: those of the model's parameters; what is stored has to have them.

    Raises:
        ConfigError: a file is none of safetensors, or a tensor in it is not float32 or of another shape.
    """

    def __init__(self, checkpoint: Path, what: str, shapes: Mapping[str, torch.Size] | None = None) -> None:
        self._pieces: dict[str, list[tuple[int, int, str, Any]]] = {}  # name → start, stop, key, file
        self.checkpoint = checkpoint
        files = json.loads((checkpoint / "manifest.json").read_text(encoding="utf-8"))["files"]
        for name in sorted(name for name in files if re.fullmatch(rf"{what}(-.*)?\.safetensors", name)):
            path = checkpoint / name
            try:
                file = safe_open(path, framework="pt")
            except SafetensorError as error:
                raise ConfigError(f"{path} is not a safetensors file ({error}); nothing else is read.") from error
            for key in file.keys():  # noqa: SIM118
                piece = _PIECE.fullmatch(key)
                stored = file.get_slice(key)
                shape, dtype = torch.Size(stored.get_shape()), stored.get_dtype()
                name, start, stop = (piece[1], int(piece[2]), int(piece[3])) if piece else (key, 0, shape.numel())
                whole = (shapes or {}).get(name)
                wanted = torch.Size([stop - start]) if piece else shape if whole is None else whole
                if dtype != "F32" or shape != wanted or (whole is not None and stop > whole.numel()):
                    raise ConfigError(
                        f"{path} holds {key} as {dtype} of the shape {tuple(shape)}, which is not float32 of the shape "
                        f"{tuple(wanted)} in {tuple(wanted if whole is None else whole)}: the file was changed, or it "
                        "belongs to another model."
                    )
                self._pieces.setdefault(name, []).append((start, stop, key, file))
        for pieces in self._pieces.values():
            pieces.sort(key=lambda piece: piece[:2])

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Elements [start, stop) of the flattened parameter; only they are read from disk, or the rows they lie in.

        Raises:
            ConfigError: the files do not hold them all.
        """
        values = torch.empty(stop - start)
        found, position = 0, start
        for begin, end, key, file in self._pieces.get(name, []):
            low, high = max(position, begin), min(stop, end)
            if low < high:
                values[low - start : high - start] = _elements(file.get_slice(key), low - begin, high - begin)
                found, position = found + high - low, high
        if found != stop - start:
            raise ConfigError(
                f"{self.checkpoint} holds {found:,} of the {stop - start:,} elements of {name} from {start:,} on: its "
                "files were changed, or it belongs to another model."
            )
        return values


def _elements(stored: Any, start: int, stop: int) -> torch.Tensor:
    shape = stored.get_shape()
    row = int(torch.Size(shape[1:]).numel())
    first, last = start // row, -(-stop // row)
    rows: torch.Tensor = stored[first:last]
    return rows.reshape(-1)[start - first * row : stop - first * row]


def load(checkpoint: Path, engine: Engine, state: State, balance: Balance) -> None:
    """Restore everything of a verified checkpoint, on every rank. Collective.

    Raises:
        ConfigError: it belongs to another model, or was edited.
    """
    saved = read_state(checkpoint)
    for name, value in saved["state"].items():
        setattr(state, name, value)
    load = torch.tensor(saved["assignments"], dtype=torch.int64)
    if load.numel() != balance.previous.numel():
        raise ConfigError(f"{checkpoint / 'state.json'} holds the expert assignments of another model.")
    balance.previous = load.reshape(balance.previous.shape)
    taken = saved["optimizer_steps"]
    moments: dict[str, Read] = {moment: Stored(checkpoint, moment, engine.shapes).read for moment in MOMENTS if taken}
    engine.load(Stored(checkpoint, "weights", engine.shapes).read, taken, moments)
    rng = checkpoint / _rng_file(engine.rank)
    if rng.exists():  # on more ranks than before, the new ones keep their seed
        _set_rng_state(load_file(rng), engine)


def read_state(checkpoint: Path) -> dict[str, Any]:
    """What state.json holds.

    Raises:
        ConfigError: it has other fields or types: it was edited, since the manifest has its hash.
    """
    saved = read_record(checkpoint / "state.json")
    try:
        numbers = [*vars(State(**saved["state"])).values(), saved["optimizer_steps"]]
        engine = saved.get("engine") or {"kind": "plain", "ranks": 1}
        texts = [*saved["data_fingerprint"].values(), engine["kind"]]
        load = torch.tensor(saved["assignments"], dtype=torch.int64)
        if not isinstance(saved.get("average"), float | None):
            raise ValueError
        whole = all(type(number) is int and 0 <= number < 2**63 for number in (*numbers, engine["ranks"]))
        if not whole or not all(isinstance(text, str) for text in texts) or load.dim() not in (1, 2):
            raise ValueError
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, OverflowError) as error:
        raise ConfigError(
            f"{checkpoint / 'state.json'} has been changed and does not tell where the run was. Restore it from a "
            "copy, or move that checkpoint away to resume from the one before."
        ) from error
    return {**saved, "engine": engine, "average": saved.get("average")}


def load_state(checkpoint: Path) -> State:
    """The progress at which a checkpoint was saved.

    Raises:
        ConfigError: see `read_state`.
    """
    return State(**read_state(checkpoint)["state"])


def trained_by(checkpoint: Path) -> tuple[str, int]:
    """The kind of engine that saved a checkpoint, and its number of ranks.

    Raises:
        ConfigError: see `read_state`.
    """
    engine = read_state(checkpoint)["engine"]
    return engine["kind"], engine["ranks"]


def average_window(checkpoint: Path) -> float | None:
    """The window of the running average in a checkpoint; None where it has none.

    Raises:
        ConfigError: see `read_state`.
    """
    window: float | None = read_state(checkpoint)["average"]
    return window


def load_weights(checkpoints: Mapping[Path, float], model: torch.nn.Module, what: str = "weights") -> None:
    """Load the weights of verified checkpoints into a model, without an engine: their sum, each times its factor.

    The sum is in float32. Beside the model, one tensor of one checkpoint is in memory at a time.

    Raises:
        ConfigError: they belong to another model.

    Args:
        what: "weights", or AVERAGE.
    """
    shapes = {name: tensor.shape for name, tensor in model.named_parameters()}
    stored = [(Stored(path, what, shapes), factor) for path, factor in checkpoints.items()]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(-0.0)  # to which any x can be added and stays x, even -0.0
            for each, factor in stored:
                parameter.add_(each.read(name, 0, parameter.numel()).view(parameter.shape), alpha=factor)


def available(checkpoints: Path) -> list[Path]:
    """Folders with a checkpoint's name and a manifest, oldest first. Their files are not verified, and a manifest that
    cannot be looked at counts.

    Raises:
        ConfigError: the folder cannot be read.
    """
    return [path for path in _named(checkpoints) if not os.path.islink(path) and _is_there(path / "manifest.json")]


def _is_there(manifest: Path) -> bool:
    try:
        return stat.S_ISREG(os.stat(manifest).st_mode)
    except OSError as error:
        return error.errno not in _GONE


def _named(checkpoints: Path) -> list[Path]:
    try:
        names = os.listdir(checkpoints)
    except OSError as error:
        if error.errno in _GONE:
            return []
        raise ConfigError(_unreadable(checkpoints, error)) from error
    return sorted((checkpoints / name for name in names if _NAME.fullmatch(name)), key=step_of)


def _unreadable(path: Path, error: OSError) -> str:
    return (
        f"{path} cannot be read ({error.strerror or error}), which does not say that it is damaged, so nothing was "
        "changed and nothing begins without it. See to it that it can be read and start again; to resume from an older "
        "checkpoint, or to begin again, move it away first."
    )


def step_of(checkpoint: Path) -> int:
    """The step in a checkpoint folder's name.

    Raises:
        ConfigError: it is no such name.
    """
    match = _NAME.fullmatch(checkpoint.name)
    if match is None:
        raise ConfigError(f"{checkpoint} is not a checkpoint: its folder is not named step-NNNNNNNN.")
    return int(match.group(1))


def defects(checkpoint: Path) -> list[str]:
    """What is wrong with a checkpoint, a line each file; empty when every byte is as written.

    Raises:
        ConfigError: that cannot be checked, because of permissions for example.
    """
    try:
        manifest = json.loads((checkpoint / "manifest.json").read_text(encoding="utf-8"))
        files = {str(name): (entry["size"], entry["sha256"]) for name, entry in manifest["files"].items()}
        kinds = {name.partition("-")[0].partition(".")[0] for name in files}
        if manifest["step"] != step_of(checkpoint) or not {"weights", *MOMENTS, "state", "rng/rank"} <= kinds:
            return ["manifest.json is not this checkpoint's"]
    except OSError as error:
        return [_lost(checkpoint, "manifest.json", error)]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return [f"manifest.json cannot be read: {error}"]
    wrong = []
    for name, (size, digest) in files.items():
        path = checkpoint / name
        if ".." in Path(name).parts or (path.is_absolute() and not path.is_relative_to(checkpoint)):
            wrong.append(f"{name} lies outside the checkpoint")
            continue
        try:
            info = os.lstat(path)
            if os.path.islink(path.parent) or not stat.S_ISREG(info.st_mode):
                wrong.append(f"{name} is missing")
            elif info.st_size != size:
                wrong.append(f"{name} has {info.st_size} bytes, not {size}")
            elif sha256(path) != digest:
                wrong.append(f"{name} differs from its SHA-256")
        except OSError as error:
            wrong.append(_lost(checkpoint, name, error))
        except ValueError:  # no name that a file can have
            wrong.append(f"{name} is missing")
    if wrong:
        return wrong
    try:
        return [f"{name} is missing, in manifest.json too" for name in _written(checkpoint) if name not in files]
    except (OSError, ConfigError) as error:
        return [f"state.json cannot be read: {error}"]


def _written(checkpoint: Path) -> list[str]:
    """The tensor files that the ranks of a checkpoint's run have written."""
    kind, ranks = trained_by(checkpoint)
    shards = [_shard(rank, ranks) for rank in range(ranks)] if kind.startswith("zero") else [""]
    kept = ("weights", *MOMENTS) if average_window(checkpoint) is None else ("weights", *MOMENTS, AVERAGE)
    tensors = [f"{what}{shard}.safetensors" for what in kept for shard in shards]
    return [*tensors, *map(_rng_file, range(ranks))]


def _lost(checkpoint: Path, name: str, error: OSError) -> str:
    """What is wrong with a file that is lost.

    Raises:
        ConfigError: it may be intact, and cannot be read here.
    """
    if error.errno not in _LOST:
        raise ConfigError(_unreadable(checkpoint / name, error)) from error
    return f"{name} is missing" if error.errno in _GONE else f"{name} cannot be read: {error.strerror or error}"


def verified(checkpoint: Path) -> Path:
    """The same path, when it is a checkpoint without defects.

    Raises:
        ConfigError: it is not, with what is wrong.
    """
    step_of(checkpoint)
    if wrong := defects(checkpoint):
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


def newest_valid(checkpoints: Path) -> Path | None:
    """The newest checkpoint without defects; what is wrong with newer ones is printed.

    Returns:
        None when there has never been a checkpoint.

    Raises:
        ConfigError: there are checkpoints, and none is valid. Training must not begin again unasked.
    """
    found = available(checkpoints)
    for checkpoint in reversed(found):
        wrong = defects(checkpoint)
        if not wrong:
            return checkpoint
        print(f"Checkpoint {checkpoint} is not valid, trying the one before: {'; '.join(wrong)}.")
    if _named(checkpoints):
        raise ConfigError(
            f"No checkpoint in {checkpoints} is valid, so the run cannot resume. Restore one from a copy, or "
            "choose another run.name to begin again."
        )
    return None


def _remove(checkpoint: Path) -> None:
    """Renamed first: a half-removed checkpoint must not look like one."""
    doomed = checkpoint.with_name(f".{checkpoint.name}.removing")
    os.replace(checkpoint, doomed)
    shutil.rmtree(doomed)


def tidy(checkpoints: Path, newest: Path | None) -> None:
    """Remove what an interrupted save left, and quarantine (rename) what is newer than `newest`, the newest valid one:
    nothing invalid counts among those to keep."""
    _clean(checkpoints)
    for path in available(checkpoints):
        if newest is not None and step_of(path) > step_of(newest):
            quarantined = path.with_name(f"{path.name}.invalid")
            shutil.rmtree(quarantined, ignore_errors=True)
            os.replace(path, quarantined)


def _clean(checkpoints: Path) -> None:
    """Remove what an interrupted save or removal left."""
    for path in (*checkpoints.glob(".step-*.partial"), *checkpoints.glob(".step-*.removing")):
        shutil.rmtree(path, ignore_errors=True)


def _pending_file(rank: int) -> str:
    return f"rank-{rank:05d}.pending"


def _done_file(rank: int) -> str:
    return f"rank-{rank:05d}.json"


def _shard(rank: int, ranks: int) -> str:
    return f"-{rank + 1:05d}-of-{ranks:05d}"


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
    reset_permissions(path)
    sync(path)


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
    sync(path)
