"""Redaction: nothing that a run writes or prints holds a secret."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Iterator
from typing import Any

from omegaconf import OmegaConf

from powertrain.train.config import Config, as_dict
from powertrain.train.errors import ConfigError

HIDDEN = "(hidden)"
# Names of secrets. Those with _ENDS are none with another word behind them, as in KEY_SIZE; of a name in _PERHAPS a
# plain word is no secret: AUTH=disabled.
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
_SETTING = re.compile(rf"((?:{_SECRET.pattern}|{_PERHAPS.pattern})[\w-]*['\"]?\s*[:=]\s*).*", re.I)


def without_secrets(value: Any, named: bool = False) -> Any:
    """The same containers and texts, with secrets replaced by HIDDEN.

    These are, wherever they occur, the values of environment variables whose name is a secret's and of such names in
    `tracker.init_kwargs`, and user and password in an address.

    Args:
        named: whether `value` lies inside `tracker.init_kwargs`.
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
        if named or "init_kwargs" in value:  # on the command line
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
    """Check that no setting that a later start has to read would be written as HIDDEN.

    Raises:
        ConfigError: one would.
    """
    settings = as_dict(config)
    _given.update(_of_settings(settings["tracker"]["init_kwargs"]))
    settings["tracker"] = {**settings["tracker"], "init_kwargs": {}}
    for name, value in _texts(settings):
        if without_secrets(value) != value:
            raise ConfigError(
                f"{name} holds a secret: a password in an address, or the value of an environment variable whose name "
                "says that it is one. The run's records leave secrets out, so the run could not resume. Give the "
                "setting another value, or the variable another name."
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


def settings_text(config: Config) -> str:
    """A configuration as it is written to config.yaml."""
    return OmegaConf.to_yaml(OmegaConf.create(without_secrets(as_dict(config))))
