"""The folder of a run: its lock, the record of each start (run.json), and how the last one ended (exit.json)."""

from __future__ import annotations

import contextlib
import datetime
import errno
import json
import os
import platform
import secrets
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from powertrain.data import files
from powertrain.data.files import read_record, replace_text
from powertrain.train.errors import ConfigError, status_of
from powertrain.train.hardware import commit, versions
from powertrain.train.redact import without_secrets

if TYPE_CHECKING:  # a sweep reads runs without the seconds that these imports take
    from powertrain.train.engine import Engine
    from powertrain.train.state import Beginning, State


def lock(path: Path) -> IO[str] | None:
    """As `data.files.lock`; where the file system has no locks, it warns and returns the file without one."""
    try:
        return files.lock(path)
    except OSError as error:
        file = open(path, "a", encoding="utf-8")  # noqa: SIM115
        print(f"Warning: {path} cannot be locked ({error.strerror}): take care that nothing else writes beside it.")
        return file


@contextlib.contextmanager
def claimed(folder: Path, engine: Engine) -> Iterator[Callable[[], None]]:
    """Make the run's folder, and lock it: nothing else trains in it. The lock ends with the process. Collective.

    Yields:
        A function that raises ConfigError on the first rank if the folder was replaced: nothing may be written then.

    Raises:
        ConfigError: another process has it, it is a link or a sweep's, or some ranks do not see it.
    """
    held: list[IO[str]] = []

    def claim() -> None:
        if (folder / "ledger.jsonl").exists():
            raise ConfigError(f"{folder} is the folder of a sweep: choose another run.name.")
        if folder.is_symlink():
            raise ConfigError(f"{folder} is a link; name the folder that it leads to with run.folder and run.name.")
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        file = lock(folder / ".lock")
        if file is None:
            raise ConfigError(
                f"Another process is training in {folder}. Wait for it, stop it (touch {folder / 'stop'}), or choose "
                "another run.name."
            )
        held.append(file)
        (folder / "stop").unlink(missing_ok=True)  # from an earlier start

    def check_claim() -> None:
        for file in held:
            try:
                ours = os.path.samestat(os.stat(folder / ".lock"), os.fstat(file.fileno()))
            except OSError as error:  # an unreachable server does not mean that the folder was replaced
                ours = error.errno not in (errno.ENOENT, errno.ENOTDIR)
            if not ours:
                raise ConfigError(
                    f"{folder} is not the folder any more that this run began in: it, or its file .lock, was moved, "
                    "removed or replaced meanwhile. The run ends here and makes nothing anew; what it had written lies "
                    "where that folder is now. Put it back, and the same command resumes from its newest checkpoint."
                )

    engine.first_rank_decides(claim)
    try:
        engine.check_shared(folder / ".lock")
        yield check_claim
    finally:
        for file in held:
            file.close()


def record_start(
    path: Path,
    engine: Engine,
    command: list[str],
    begin: Beginning,
    parameters: dict[str, int],
    data: dict[str, Any],
    log: Callable[[str], None],
) -> None:
    """Append this start to the `starts` of run.json. Its `id` stays the run's; its `parent` is that of `begin`.

    Args:
        path: of run.json.
        data: by corpus: documents and tokens to train on, what was skipped, and what is not evaluated.
    """
    there = read_record(path)
    starts = there.get("starts")
    whole = isinstance(there.get("id"), str) and isinstance(starts, list) and all(isinstance(s, dict) for s in starts)
    if not whole and path.exists():  # after a power cut, or edited
        os.replace(path, path.with_name("run.json.unreadable"))
        log(f"Warning: {path} was not a run's record. It is kept as run.json.unreadable, and a new one begins.")
    record: dict[str, Any] = {"id": secrets.token_hex(4), "starts": [], **(there if whole else {})}
    record["parent"] = None if begin.parent is None else str(begin.parent)
    record["parameters"] = parameters
    start = {
        "from": None if begin.checkpoint is None else str(begin.checkpoint),
        "changed_settings": begin.changes,
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": command,
        "commit": commit(),
        "python": platform.python_version(),
        "versions": versions(),
        "engine": engine.kind,
        "hardware": engine.hardware(),
        "data": data,
    }
    moved = ("run.name", "run.folder", "run.resume")
    changes = [f"{n} {then} → {now}" for n, (then, now) in without_secrets(begin.changes).items() if n not in moved]
    if changes:
        log(f"Settings that differ from the checkpoint's, from here on: {', '.join(changes)}.")
    if begin.own and record["starts"] and (changed := _rounding_changes(record["starts"][-1], start)):
        log(
            f"{'; '.join(changed)}: sums may be rounded differently, and losses not bit-equal to those of an "
            "uninterrupted run."
        )
    record["starts"].append(start)
    replace_text(path, json.dumps(without_secrets(record), indent=1) + "\n")


def _rounding_changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What changes the rounding of sums from one start to the next, beside engine and ranks, which `assemble` logs."""
    changed = []
    for part, names in (("hardware", ("kernels", "device", "threads", "machine")), ("versions", ("torch",))):
        then = before.get(part)
        if not isinstance(then, dict):  # edited
            continue
        for name in names:
            pair = [", ".join(map(str, v)) if isinstance(v, list) else v for v in (then.get(name), now[part][name])]
            if pair[0] is not None and pair[0] != pair[1]:
                changed.append(f"{name} {pair[0]} → {pair[1]}")
    return changed


def add_to_start(path: Path, name: str, values: dict[str, Any]) -> None:
    """Add values to those of this name in run.json's newest start; a record of another shape (edited) is left alone."""
    record = read_record(path)
    starts = record.get("starts")
    newest = starts[-1] if isinstance(starts, list) and starts else None
    if isinstance(newest, dict) and isinstance(newest.setdefault(name, {}), dict):
        newest[name].update(values)
        replace_text(path, json.dumps(without_secrets(record), indent=1) + "\n")


@contextlib.contextmanager
def leaving_exit_json(
    folder: Path, engine: Engine, state: State, check_claim: Callable[[], None]
) -> Iterator[dict[str, Any]]:
    """Write exit.json {code, reason, step}: launchers do not keep a rank's exit status.

    Yields:
        A dict to fill with those three when the run ends without an error.
    """
    ended: dict[str, Any] = {}
    before = read_record(folder / "exit.json").get("step")  # kept if this start is refused
    try:
        yield ended
    except BaseException as error:
        code = status_of(error)
        step = state.step or (before if type(before) is int else 0)
        ended |= {"code": code, "reason": f"{type(error).__name__}: {error}", "step": step}
        if code > 128:
            ended["reason"] = f"{signal.Signals(code - 128).name}, when no step was under way"
        raise
    finally:
        if engine.is_main:
            try:
                check_claim()
                replace_text(folder / "exit.json", json.dumps(without_secrets(ended)) + "\n")
            except (OSError, ConfigError) as error:
                if str(error) not in str(ended.get("reason")):  # else it is printed anyway
                    print(f"powertrain: exit.json cannot be written: {error}", file=sys.stderr)
