"""The errors that a run raises itself, and the exit status of any error."""

from __future__ import annotations

import errno

from powertrain.data import DataError


class ConfigError(ValueError):
    """Something a user can mend. The message is one readable paragraph: value, limit, remedy."""


class RunFailed(RuntimeError):
    """The run failed for a known reason; the message is one readable paragraph."""


class Diverged(RunFailed):
    """The gradients are no longer finite."""


def status_of(error: BaseException) -> int:
    """The exit status of an error: 2 for bad usage or input, 1 for a failure, 130 for Ctrl-C."""
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 1
    if isinstance(error, KeyboardInterrupt):
        return 130
    if isinstance(error, OSError):
        return 1 if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO) else 2
    return 2 if isinstance(error, (ConfigError, DataError)) else 1
