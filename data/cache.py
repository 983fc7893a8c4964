"""The folders of the cache: how they are named, made whole and told apart.

CACHE/NAME-HASH/ is named by what its content depends on. A folder takes its name when it is whole. Until then it is
.NAME-HASH.0.
"""

from __future__ import annotations

import errno
import fcntl
import glob
import hashlib
import itertools
import json
import os
import platform
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from powertrain.data import DataError
from powertrain.data.files import lock, sync
from powertrain.data.sources import COMPRESSED, Corpus, files
from powertrain.data.tokens import TokenFile

FORMAT = 1  # goes into HASH: raise it when the same inputs give other files
STATE = "state.json"

Progress = Callable[[str, int, int | None], None]


def check_names(corpora: Mapping[str, Corpus]) -> None:
    for name in corpora:
        if name == "overall":
            raise DataError("'overall' cannot name a corpus: it names the evaluation over all corpora.")
        if not re.fullmatch(r"\w[\w.-]*", name):
            raise DataError(
                f"{name!r} cannot name a corpus: use letters, digits, '_', '-' and '.', with no '-' or '.' first."
            )


def describe(corpus: Corpus) -> dict[str, Any]:
    """Everything that decides a corpus's documents. A dataset of the hub is assumed not to change."""
    facts: list[list[Any]] = [
        [str(path), os.path.getsize(path), os.stat(path).st_mtime_ns] for path in all_files(corpus)
    ]
    description = {"format": FORMAT, "corpus": settings_of(corpus), "files": facts}
    if corpus.source == "stdlib":  # its file times only tell when Python was installed
        description["files"] = [[platform.python_version()], *([path, size] for path, size, _ in facts)]
    if corpus.source == "text" and any(path.endswith(COMPRESSED) for path, *_ in facts):
        description["decompressed"] = True  # the first version did not decompress them
    return description


def corpus_folder(cache: Path, name: str, source: Mapping[str, Any], tokenizer: str) -> Path:
    """Named by what its content depends on: the description of the corpus and the identity of the tokenizer."""
    return cache / f"{name}-{short_hash([source, tokenizer])}"


def settings_of(corpus: Corpus) -> dict[str, Any]:
    """A corpus as recorded. A setting added later is omitted at its default, so that existing caches stay valid."""
    settings = asdict(corpus)
    if not corpus.deduplicate:
        del settings["deduplicate"]
    return settings


def all_files(corpus: Corpus) -> list[Path]:
    return [path for part in corpus.parts() for path in files(part)]


def identity_of(tokenizer_folder: Path) -> str:
    """SHA-256 of the tokenizer.json and the end-of-text token."""
    end = json.loads((tokenizer_folder / "tokenizer_config.json").read_text(encoding="utf-8"))["eos_token"]
    return _sha256((tokenizer_folder / "tokenizer.json").read_bytes() + json.dumps(end).encode())


def fingerprint(file: TokenFile, cache: Path, report: Progress = lambda description, done, total: None) -> str:
    """`file.fingerprint()`, cached because it reads the whole file: other ranks and later starts find it in the cache,
    under the sizes, times and inodes of the two files."""
    path = known_fingerprint(file, cache)
    with open(f"{file.prefix}.idx", "rb") as lock:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(lock, fcntl.LOCK_EX)  # one rank reads the files while the others wait
        with suppress(OSError):
            if len(found := path.read_text(encoding="utf-8")) == 64:
                return found
        found = file.fingerprint(lambda done, total: report(f"reading {file.prefix}", done, total))
        # File times may have a resolution of two seconds: a change right after this one could leave them equal.
        changed = max(os.stat(f"{file.prefix}.{suffix}").st_ctime for suffix in ("idx", "bin"))
        if path == known_fingerprint(file, cache) and time.time() - changed > 2:
            with suppress(OSError):  # a full disk, or a read-only cache
                path.parent.mkdir(exist_ok=True)
                path.write_text(found, encoding="utf-8")
    return found


def known_fingerprint(file: TokenFile, cache: Path) -> Path:
    """Where `fingerprint` caches it: named by the files' sizes, times and inodes."""
    states = [os.stat(f"{file.prefix}.{suffix}") for suffix in ("idx", "bin")]
    return cache / "fingerprints" / short_hash([[s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino] for s in states])


def short_hash(value: Any) -> str:
    return _sha256(json.dumps(value, sort_keys=True).encode())[:12]


def _sha256(raw: bytes) -> str:
    return hashlib.sha256(raw).hexdigest()


def complete(folder: Path, last: str) -> bool:
    """Whether the folder has the file that is written last. A folder without it is damaged, and removed."""
    if folder.exists() and not (folder / last).exists():  # in this order: a folder appears with all its files
        shutil.rmtree(folder)
    return (folder / last).exists()


@contextmanager
def building(folder: Path) -> Iterator[Path]:
    """A folder that is synced and renamed to `folder` if the block ends without an error.

    Until then it lies in .NAME.0 (or .NAME.1 while another process has that one), with what resuming needs. After an
    error it stays there to be resumed if it has a STATE, unless it is a DataError.
    """
    slot, lock = _claim(folder)
    temporary = slot / "whole"
    try:
        if not (slot / STATE).exists():
            shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(exist_ok=True)
        yield temporary
        for path in [*temporary.rglob("*"), temporary]:
            sync(path)
        try:
            temporary.rename(folder)
        except OSError:
            if not folder.exists():
                raise  # else another process finished first, with the same content
        sync(folder.parent)
        for other in folder.parent.glob(f".{glob.escape(folder.name)}.*"):
            other_lock = None if other == slot else _lock(other)
            if other_lock is not None:  # left by a process that was killed
                shutil.rmtree(other, ignore_errors=True)
                other_lock.close()
        shutil.rmtree(slot, ignore_errors=True)
    except BaseException as error:
        if isinstance(error, DataError) or not (slot / STATE).exists():
            shutil.rmtree(slot, ignore_errors=True)
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise OSError(
                error.errno,
                f"No space is left for {folder}. Free some and give the same command: it resumes. Or choose another "
                "data.cache_dir.",
            ) from error
        raise
    finally:
        lock.close()


def _claim(folder: Path) -> tuple[Path, IO[str]]:
    """The first temporary folder for `folder` that no other process has, and its lock."""
    for number in itertools.count():
        slot = folder.with_name(f".{folder.name}.{number}")
        slot.mkdir(exist_ok=True)
        try:
            lock = _lock(slot)
        except OSError:  # a file system without locks: a folder with a unique name
            slot = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}")
            slot.mkdir()
            return slot, open(slot / "lock", "w", encoding="utf-8")
        if lock is not None:
            return slot, lock
    raise AssertionError


def _lock(slot: Path) -> IO[str] | None:
    """The lock of a temporary folder; None if another process has it, or has just removed the folder."""
    with suppress(FileNotFoundError):
        return lock(slot / "lock")
    return None
