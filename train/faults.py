"""Fault injection for tests and the soak test: the one place where a run is made to fail.

POWERTRAIN_FAULT="ACTION@POINT[:rank=R][:step=S]", or several with commas between, makes the rank R (default: every
one) fail when it comes to POINT at step S (default: at any). Points:

    step        before a step is taken
    gradient    before the backward pass of each micro-batch
    evaluate    inside an evaluation
    write       after a file of a checkpoint has been written
    manifest    when all of a checkpoint but its manifest is written
    rename      when the checkpoint is complete under its temporary name
    prune       when the new checkpoint is in place and the oldest not yet removed

Actions: kill (SIGKILL), tear (half of the file, then SIGKILL), full (no space left), term (SIGTERM), hang (SIGSTOP),
nan, spike (a gradient that is not finite, or a thousand times too large).
"""

from __future__ import annotations

import errno
import os
import signal
from pathlib import Path

from torch import Tensor

wanted = os.environ.get("POWERTRAIN_FAULT", "")


def at(point: str, rank: int, step: int, file: Path | None = None) -> str | None:
    """Fail here if POWERTRAIN_FAULT names this place.

    Args:
        file: what `tear` truncates.

    Returns:
        The action, if the caller has to carry it out, else None.

    Raises:
        OSError: the action is `full`.
    """
    if not wanted:
        return None
    action = next((action for action in wanted.split(",") if _is_here(action, point, rank, step)), "").partition("@")[0]
    if not action:
        return None
    if action == "tear" and file is not None:
        os.truncate(file, file.stat().st_size // 2)
    if action == "full":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    number = {
        "kill": signal.SIGKILL,
        "tear": signal.SIGKILL,
        "term": signal.SIGTERM,
        "hang": signal.SIGSTOP,
    }.get(action)
    if number is not None:
        os.kill(os.getpid(), number)
    return action


def _is_here(fault: str, point: str, rank: int, step: int) -> bool:
    name, *conditions = fault.partition("@")[2].split(":")
    limits = dict(condition.split("=") for condition in conditions)
    return name == point and int(limits.get("rank", rank)) == rank and int(limits.get("step", step)) == step


def spoiled(loss: Tensor, rank: int, step: int) -> Tensor:
    """The same loss, unless POWERTRAIN_FAULT spoils its gradient at this step."""
    action = at("gradient", rank, step)
    return loss if action is None else loss * {"nan": float("nan"), "spike": 1e3}[action]
