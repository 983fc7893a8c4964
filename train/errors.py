"""Errors that a run raises on purpose, and the exit status that each means."""

from __future__ import annotations

import errno

from powertrain.data import DataError


class ConfigError(ValueError):
    """Something a user can mend. The message is one readable paragraph: value, limit, remedy."""


class RunFailed(RuntimeError):
    """The run broke for a reason that is known; the message is one paragraph."""


class Diverged(RunFailed):
    """The gradients are no longer finite."""


def status_of(error: BaseException) -> int:
    """The exit status that an error means: 2 for what a user got wrong, 1 for what broke, 130 for Ctrl-C."""
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 1
    if isinstance(error, KeyboardInterrupt):
        return 130
    if isinstance(error, OSError):
        return 1 if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO) else 2
    return 2 if isinstance(error, (ConfigError, DataError)) else 1
