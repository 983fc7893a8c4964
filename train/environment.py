"""What a run ran on: versions, commit, hardware, command."""

from __future__ import annotations

import contextlib
import datetime
import errno
import fcntl
import importlib.metadata
import json
import os
import platform
import re
import secrets
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from omegaconf import OmegaConf

from data import DataError
from train.config import Config, ConfigError, as_dict

if TYPE_CHECKING:  # a sweep reads runs without the seconds that these imports take
    import torch

    from train.engine import Engine

HIDDEN = "(hidden)"
_UMASK = os.umask(0)  # which can only be read by setting it: here, before there are threads
os.umask(_UMASK)
_SECRET = re.compile(r"(?:api|access|private)_?key|token(?!iz)|passw(?:or)?d|secret|credential", re.I)
_PACKAGES = ("powertrain", "torch", "transformers", "accelerate", "deepspeed", "datasets", "tokenizers")
_SETTING = re.compile(rf"((?:{_SECRET.pattern})\w*['\"]?\s*[:=]\s*).*", re.I)


def write(
    path: Path,
    engine: Engine,
    command: list[str],
    start_from: Path | None,
    changes: dict[str, list[Any]],
    parameters: dict[str, int],
) -> None:
    """Append this start to the `starts` of run.json, which keeps one entry for each start of the run.

    `id` is the run's for ever; `parent` is the checkpoint of another run that this one branched off.
    """
    record: dict[str, Any] = {"id": secrets.token_hex(4), "parent": None, "starts": []}
    try:
        record |= json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        pass
    except ValueError:  # a power cut can leave it so
        os.replace(path, path.with_name("run.json.unreadable"))
    record["parameters"] = parameters
    if start_from is not None and start_from.resolve().parent.parent != path.resolve().parent:
        record["parent"] = str(start_from.resolve())
    record["starts"].append(
        {
            "from": None if start_from is None else str(start_from),
            "changed_settings": changes,
            "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "command": command,
            "commit": _commit(),
            "python": platform.python_version(),
            "versions": {name: version(name) for name in _PACKAGES},
            "engine": engine.kind,
            "hardware": hardware(engine),
        }
    )
    replace_text(path, json.dumps(without_secrets(record), indent=1) + "\n")


def without_secrets(value: Any, named: bool = False) -> Any:
    """The same containers and texts, with what nobody should read replaced by HIDDEN.

    These are the values of environment variables that are named as secrets are, wherever they stand, user and password
    in an address, and what `tracker.init_kwargs` gives to such a name (`named`: value lies inside it).
    """
    if isinstance(value, dict):
        return {
            key: HIDDEN
            if named and entry and _SECRET.search(str(key))
            else without_secrets(entry, named or key == "init_kwargs")
            for key, entry in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [without_secrets(entry, named) for entry in value]
    if isinstance(value, str):
        for name, secret in os.environ.items():
            if len(secret) >= 8 and not secret.startswith("/") and _SECRET.search(name):
                value = value.replace(secret, HIDDEN)
        value = re.sub(r"://[^/\s:@]+:[^/\s@]+@", f"://{HIDDEN}@", value)
        if "init_kwargs" in value:  # an argument of the command line
            value = _SETTING.sub(rf"\1{HIDDEN}", value)
    return value


def check_no_secrets(config: Config) -> None:
    """Raises ConfigError when a setting that a later start has to read would be written as HIDDEN."""
    settings = as_dict(config)
    settings["tracker"] = {**settings["tracker"], "init_kwargs": {}}
    for name, value in _texts(settings):
        if without_secrets(value) != value:
            raise ConfigError(
                f"{name} holds a secret: a password in an address, or the value of an environment variable whose name "
                "says that it is one. The run's records leave secrets out, so it could not go on. Give the setting "
                "another value, or the variable another name."
            )


def _texts(node: Any, name: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(node, dict):
        for key, value in node.items():
            yield from _texts(value, f"{name}.{key}" if name else str(key))
    elif isinstance(node, list):
        for number, value in enumerate(node):
            yield from _texts(value, f"{name}[{number}]")
    elif isinstance(node, str):
        yield name, node


def status_of(error: BaseException) -> int:
    """The exit status that an error means: 2 for what a user got wrong, 1 for what broke."""
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 1
    if isinstance(error, OSError):
        return 1 if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO) else 2
    return 2 if isinstance(error, (ConfigError, DataError)) else 1


def settings_text(config: Config) -> str:
    """A configuration as it is written to config.yaml."""
    return OmegaConf.to_yaml(OmegaConf.create(without_secrets(as_dict(config))))


def parent(path: Path) -> Path | None:
    """The checkpoint of another run that this one branched off, from its run.json."""
    try:
        recorded = json.loads(path.read_text(encoding="utf-8"))["parent"]
    except (FileNotFoundError, ValueError):
        recorded = None
    return None if recorded is None else Path(recorded)


def lock(path: Path) -> IO[str] | None:
    """The file, locked until it is closed or its process and what inherited it have died; None when others have it."""
    file = open(path, "a", encoding="utf-8")  # noqa: SIM115
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    except OSError as error:  # a file system without locks
        print(f"Warning: {path} cannot be locked ({error.strerror}): take care that nothing else writes beside it.")
    return file


@contextlib.contextmanager
def claimed(folder: Path, engine: Engine) -> Iterator[None]:
    """Make the run's folder, and keep others from training in it. A process that dies gives it up by dying.

    Raises:
        ConfigError: another process has it, or it is a link.
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
        (folder / "stop").unlink(missing_ok=True)  # from before; one that comes from now on is meant for this start

    engine.first_rank_decides(claim)
    try:
        engine.check_shared(folder / ".lock")
        yield
    finally:
        for file in held:
            file.close()


def replace_folder(folder: Path, write: Callable[[Path], object]) -> None:
    """Let `write` make a folder beside `folder`, and put it in its place when it is whole."""
    partial, replaced = (folder.with_name(f".{folder.name}.{what}") for what in ("partial", "replaced"))
    for left_over in (partial, replaced):
        shutil.rmtree(left_over, ignore_errors=True)
    write(partial)
    for path in partial.iterdir():
        if path.is_file():
            as_others_are(path)
    if folder.exists():
        os.replace(folder, replaced)
    os.replace(partial, folder)
    shutil.rmtree(replaced, ignore_errors=True)


def as_others_are(path: Path) -> None:
    """Give a file the permissions of a new one; safetensors makes its own for the owner alone."""
    path.chmod(0o666 & ~_UMASK)


def check_output(path: Path) -> None:
    """Raises ConfigError unless a file can be written there, in place of one that is there."""
    there = path.exists()
    possible = path.is_file() if there else path.parent.is_dir()
    if not possible or not os.access(path if there else path.parent, os.W_OK):
        raise ConfigError(f"The result cannot be written to '{path}'; name another file with --out.")


def replace_text(path: Path, text: str) -> None:
    """Write a file that is at every moment whole: the old one or the new one."""
    beside = path.with_name(f".{path.name}.partial")
    with open(beside, "w", encoding="utf-8", errors="backslashreplace") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def hardware(engine: Engine) -> dict[str, Any]:
    """What decides the last bits of a sum: kernels, device, ranks and threads."""
    import torch

    from train.model import granite

    return {
        "kernels": granite.kernels(engine.config, engine.device),
        "device": _device_name(engine.device),
        "ranks": engine.world_size,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "machine": platform.machine(),
    }


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        import torch

        return torch.cuda.get_device_name(device)
    return platform.processor() or device.type


def version(package: str) -> str | None:
    """Of a package. One that is imported knows its build, too (+cu130), where its wheel's name does not."""
    if (loaded := getattr(sys.modules.get(package), "__version__", None)) is not None:
        return str(loaded)
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of the checkout that this file is tracked in, with + when it has been changed since."""
    git = ["git", "-C", str(Path(__file__).parent)]
    own = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}  # of a hook, say
    try:
        # Of an installed package: there may be somebody's repository around its virtual environment.
        subprocess.run([*git, "ls-files", "--error-unmatch", __file__], capture_output=True, check=True, env=own)
        describe = [*git, "describe", "--always", "--dirty=+", "--abbrev=40", "--exclude=*"]
        return subprocess.run(describe, capture_output=True, encoding="utf-8", check=True, env=own).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
