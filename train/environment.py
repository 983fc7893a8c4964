"""Around a run: its record (run.json), secrets, locks, files written whole, and the machine that it runs on."""

from __future__ import annotations

import contextlib
import datetime
import errno
import fcntl
import functools
import importlib.metadata
import json
import os
import platform
import re
import secrets
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from omegaconf import OmegaConf

from powertrain.data import DataError
from powertrain.train.config import Config, ConfigError, as_dict

if TYPE_CHECKING:  # a sweep reads runs without the seconds that these imports take
    import torch

    from powertrain.train.engine import Engine
    from powertrain.train.resume import Beginning
    from powertrain.train.state import State

HIDDEN = "(hidden)"
_UMASK = os.umask(0)  # which can only be read by setting it: here, before there are threads
os.umask(_UMASK)
# Names of what nobody should read. What may go on with another word, such as KEY_SIZE, is none at the end of a word
# only; of those in _PERHAPS a plain word is no secret: AUTH=disabled.
_ENDS = r"(?![_-]?[a-z])"
_PERHAPS = re.compile(rf"(?:key|auth|cookies?|(?<![a-z])(?:keys|session|otp|sas|sig)){_ENDS}", re.I)
_SECRET = re.compile(
    r"(?:api|access|private|ssh|sign(?:ing)?|encryption|deploy|account|master)[_-]?key|token(?!iz)|secret|credential"
    r"|passw(?:or)?d|pass(?:phrase|code)|bearer|webhook|authoriz|connection[_-]?string|basic[_-]?auth"
    r"|(?:auth|cookie|session)[_-]?(?:header|value|id)|(?:key|auth|cookie)[_-]?b(?:ase)?64"
    rf"|(?:(?<!com)(?<!by)pass|pwd|(?<![a-z])pat|(?<![a-z])jwt|dsn|creds?){_ENDS}",
    re.I,
)
_NO_SECRETS = ("PWD", "OLDPWD")  # the shell's folders
_given: set[str] = set()  # what `tracker.init_kwargs` gives to such names, which a tracker may repeat in an error
_PACKAGES = ("powertrain", "torch", "transformers", "accelerate", "deepspeed", "datasets", "tokenizers")
_SETTING = re.compile(rf"((?:{_SECRET.pattern}|{_PERHAPS.pattern})[\w-]*['\"]?\s*[:=]\s*).*", re.I)


def write(
    path: Path,
    engine: Engine,
    command: list[str],
    begin: Beginning,
    parameters: dict[str, int],
    data: dict[str, Any],
    log: Callable[[str], None],
) -> None:
    """Append this start to the `starts` of run.json, which keeps one entry for each start of the run.

    `data` is of each corpus: documents and tokens to train on, what was skipped, and what is not evaluated.
    `id` is the run's for ever; `parent` is the checkpoint of another run that this one branched off.
    """
    there = read_record(path)
    starts = there.get("starts")
    whole = isinstance(there.get("id"), str) and isinstance(starts, list) and all(isinstance(s, dict) for s in starts)
    if not whole and path.exists():  # a power cut or an editor can leave it so
        os.replace(path, path.with_name("run.json.unreadable"))
        log(f"Warning: {path} was not a run's record. It is kept as run.json.unreadable, and a new one begins.")
    record: dict[str, Any] = {"id": secrets.token_hex(4), "starts": [], **(there if whole else {})}
    record["parent"] = None if begin.parent is None else str(begin.parent)
    record["parameters"] = parameters
    record["starts"].append(
        {
            "from": None if begin.checkpoint is None else str(begin.checkpoint),
            "changed_settings": begin.changes,
            "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "command": command,
            "commit": _commit(),
            "python": platform.python_version(),
            "versions": {name: version(name) for name in _PACKAGES},
            "engine": engine.kind,
            "hardware": hardware(engine),
            "data": data,
        }
    )
    replace_text(path, json.dumps(without_secrets(record), indent=1) + "\n")


def without_secrets(value: Any, named: bool = False) -> Any:
    """The same containers and texts, with what nobody should read replaced by HIDDEN.

    These are the values of environment variables that are named as secrets are, and what `tracker.init_kwargs` gives to
    such a name (`named`: value lies inside it), wherever they stand, and user and password in an address.
    """
    if isinstance(value, dict):
        return {
            key: HIDDEN
            if named and entry and _names_a_secret(str(key))
            else without_secrets(entry, named or key == "init_kwargs")
            for key, entry in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [without_secrets(entry, named) for entry in value]
    if isinstance(value, str):
        for secret in sorted({*_of_environment(), *_given}, key=len, reverse=True):
            value = value.replace(secret, HIDDEN)
        value = re.sub(r"://[^/\s:@]*:[^/\s@]+@", f"://{HIDDEN}@", value)
        if named or "init_kwargs" in value:  # an argument of the command line
            value = _SETTING.sub(rf"\1{HIDDEN}", value)
    return value


@functools.cache
def _names_a_secret(name: str) -> bool:
    return bool(_SECRET.search(name) or _PERHAPS.search(name))


def _of_environment() -> Iterator[str]:
    for name, value in os.environ.items():
        secret = value.strip()
        short = len(secret) < 6 or (len(secret) < 8 and secret.isalnum() and (secret.isalpha() or secret.isdigit()))
        if short or name in _NO_SECRETS or not _names_a_secret(name):
            continue
        is_path = "/" in secret and os.path.exists(os.path.expanduser(secret))
        is_word = secret.isalpha() and len(secret) <= 12 and not _SECRET.search(name)
        if not is_path and not is_word:
            yield secret


def _of_settings(node: Any, secret: bool = False) -> Iterator[str]:
    if isinstance(node, dict):
        for name, value in node.items():
            yield from _of_settings(value, secret or _names_a_secret(str(name)))
    elif isinstance(node, list):
        for value in node:
            yield from _of_settings(value, secret)
    elif secret and isinstance(node, str) and len(node) >= 8:
        yield node


def check_no_secrets(config: Config) -> None:
    """Raises ConfigError when a setting that a later start has to read would be written as HIDDEN."""
    settings = as_dict(config)
    _given.update(_of_settings(settings["tracker"]["init_kwargs"]))
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
    """The exit status that an error means: 2 for what a user got wrong, 1 for what broke, 130 for Ctrl-C."""
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 1
    if isinstance(error, KeyboardInterrupt):
        return 130
    if isinstance(error, OSError):
        return 1 if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO) else 2
    return 2 if isinstance(error, (ConfigError, DataError)) else 1


def settings_text(config: Config) -> str:
    """A configuration as it is written to config.yaml."""
    return OmegaConf.to_yaml(OmegaConf.create(without_secrets(as_dict(config))))


def read_record(path: Path) -> dict[str, Any]:
    """The JSON object in a file; {} where there is none, or something else: a record is no reason to lose a run."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError, RecursionError):
        found = None
    return found if isinstance(found, dict) else {}


def add_to_start(path: Path, name: str, values: dict[str, Any]) -> None:
    """Add values to those of this name in run.json's newest start; a record that somebody has edited stays so."""
    record = read_record(path)
    starts = record.get("starts")
    newest = starts[-1] if isinstance(starts, list) and starts else None
    if isinstance(newest, dict) and isinstance(newest.setdefault(name, {}), dict):
        newest[name].update(values)
        replace_text(path, json.dumps(without_secrets(record), indent=1) + "\n")


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
def claimed(folder: Path, engine: Engine) -> Iterator[Callable[[], None]]:
    """Make the run's folder, and keep others from training in it. A process that dies gives it up by dying.

    Yields:
        What raises ConfigError on the first rank once the folder is another one: nothing may be written there then.

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

    def check_ours() -> None:
        for file in held:
            try:
                ours = os.path.samestat(os.stat(folder / ".lock"), os.fstat(file.fileno()))
            except OSError as error:  # a server that does not answer has not taken the folder away
                ours = error.errno not in (errno.ENOENT, errno.ENOTDIR)
            if not ours:
                raise ConfigError(
                    f"{folder} is not the folder any more that this run began in: it, or its file .lock, was moved, "
                    "removed or replaced meanwhile. The run ends here and makes nothing anew; what it had written lies "
                    "where that folder is now. Put it back, and the same command goes on from its newest checkpoint."
                )

    engine.first_rank_decides(claim)
    try:
        engine.check_shared(folder / ".lock")
        yield check_ours
    finally:
        for file in held:
            file.close()


@contextlib.contextmanager
def leaving_exit_json(
    folder: Path, engine: Engine, state: State, check_ours: Callable[[], None]
) -> Iterator[dict[str, Any]]:
    """Write exit.json {code, reason, step}: launchers flatten a rank's exit status, so it is also written down."""
    ended: dict[str, Any] = {}
    before = read_record(folder / "exit.json").get("step")  # where the run is, though this start is refused
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
                check_ours()
                replace_text(folder / "exit.json", json.dumps(without_secrets(ended)) + "\n")
            except (OSError, ConfigError) as error:
                if str(error) not in str(ended.get("reason")):  # which will be said
                    print(f"powertrain: exit.json cannot be written: {error}", file=sys.stderr)


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


def replace_text(path: Path, text: str | bytes) -> None:
    """Write a file, in UTF-8, that is at every moment whole: the old one or the new one."""
    beside = path.with_name(f".{path.name}.partial")
    with open(beside, "wb") as file:
        file.write(text.encode("utf-8", errors="backslashreplace") if isinstance(text, str) else text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def hardware(engine: Engine) -> dict[str, Any]:
    """What decides the last bits of a sum: kernels, device, ranks and threads."""
    import torch

    from powertrain.train.model import granite

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
