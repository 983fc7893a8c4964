"""What a run ran on and with: cores, GPUs, versions of packages, the commit."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

_PACKAGES = ("powertrain", "torch", "transformers", "accelerate", "deepspeed", "datasets", "tokenizers")
# Dense bf16 peak in FLOP/s, and bytes of memory, by a part of the device's name, from the vendors' data sheets.
GPUS = {
    "H200": (989e12, 141e9),
    "H100": (989e12, 80e9),
    "A100": (312e12, 80e9),
    "L40S": (362e12, 48e9),
    "B200": (2250e12, 180e9),
}


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def version(package: str) -> str | None:
    """The version of a package, or None. An imported one has its build, too (+cu130), which its metadata may lack."""
    if (loaded := getattr(sys.modules.get(package), "__version__", None)) is not None:
        return str(loaded)
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def versions() -> dict[str, str | None]:
    """The versions of the packages that decide what a run computes."""
    return {name: version(name) for name in _PACKAGES}


def commit() -> str | None:
    """The commit of the checkout that this file is tracked in, with + if there are uncommitted changes; else None."""
    git = ["git", "-C", str(Path(__file__).parent)]
    own = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}  # set in a hook
    try:
        # Not of an installed package, whose virtual environment may lie inside another repository.
        subprocess.run([*git, "ls-files", "--error-unmatch", __file__], capture_output=True, check=True, env=own)
        describe = [*git, "describe", "--always", "--dirty=+", "--abbrev=40", "--exclude=*"]
        return subprocess.run(describe, capture_output=True, encoding="utf-8", check=True, env=own).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
