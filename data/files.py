"""Files that are whole at every moment, locks, and what is on the disk for certain."""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from powertrain.data import DataError

_UMASK = os.umask(0)  # which can only be read by setting it: here, before there are threads
os.umask(_UMASK)


def replace_text(path: Path, text: str | bytes) -> None:
    """Write a file, in UTF-8, that is at every moment whole: the old one or the new one."""
    beside = path.with_name(f".{path.name}.partial")
    with open(beside, "wb") as file:
        file.write(text.encode("utf-8", errors="backslashreplace") if isinstance(text, str) else text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


def replace_folder(folder: Path, write: Callable[[Path], object]) -> None:
    """Let `write` make a folder beside `folder`, and put it in its place when it is whole."""
    partial, replaced = (folder.with_name(f".{folder.name}.{what}") for what in ("partial", "replaced"))
    for left_over in (partial, replaced):
        shutil.rmtree(left_over, ignore_errors=True)
    write(partial)
    for path in partial.iterdir():
        if path.is_file():
            reset_permissions(path)
    if folder.exists():
        os.replace(folder, replaced)
    os.replace(partial, folder)
    shutil.rmtree(replaced, ignore_errors=True)


def reset_permissions(path: Path) -> None:
    """Give a file the permissions of a new one; safetensors makes its own for the owner alone."""
    path.chmod(0o666 & ~_UMASK)


def read_record(path: Path) -> dict[str, Any]:
    """The JSON object in a file; {} where there is none, or something else: a record is no reason to lose a run."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError, RecursionError):
        found = None
    return found if isinstance(found, dict) else {}


def check_output(path: Path) -> None:
    """Check that a file can be written there, in place of one that is there.

    Raises:
        DataError: it cannot.
    """
    there = path.exists()
    possible = path.is_file() if there else path.parent.is_dir()
    if not possible or not os.access(path if there else path.parent, os.W_OK):
        raise DataError(f"The result cannot be written to '{path}'; name another file with --out.")


def lock(path: Path) -> IO[str] | None:
    """The file, locked until it is closed or its process and what inherited it have died.

    Returns:
        None when another process has it, or has just removed it.

    Raises:
        OSError: the file system has no locks.
    """
    file = open(path, "a", encoding="utf-8")  # noqa: SIM115
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(file.fileno()), path.stat()):
            return file
    except (BlockingIOError, FileNotFoundError):
        pass
    except OSError:
        file.close()
        raise
    file.close()
    return None


def sync(path: Path) -> None:
    """Wait until a file, or the entries of a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """SHA-256 (hex) of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
