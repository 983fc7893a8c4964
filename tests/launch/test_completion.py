"""Completion, typed into real shells."""

from __future__ import annotations

import os
import pty
import re
import select
import shutil
import subprocess
import sys
import time

import pytest
from conftest import ROOT

START = {
    "bash": (["bash", "--norc", "--noprofile", "-i"], "bind 'set bell-style none'"),
    "zsh": (["zsh", "-f", "-i"], "autoload -U compinit; compinit -u"),
}


def typed(shell: str, lines: list[str]) -> list[str]:
    """What a command `powertrain` is called with when each line is typed, followed by a tabulator and Enter."""
    command, setup = START[shell]
    master, slave = pty.openpty()
    environment = {**os.environ, "TERM": "dumb", "PS1": "READY>"}
    process = subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, env=environment, cwd=ROOT)
    script = f"source <({sys.executable} -m powertrain.launch.completion {shell})"
    seen = ""

    def until(pattern: str) -> None:
        nonlocal seen
        end = time.monotonic() + 30
        while not re.search(pattern, seen):
            assert time.monotonic() < end, seen
            if select.select([master], [], [], 0.1)[0]:
                seen += os.read(master, 65536).decode(errors="replace")

    try:
        os.write(master, f'{setup}; {script}; powertrain() {{ echo "ran"="$*"; }}; echo begin$((6*7))\n'.encode())
        until("begin42")
        for number, line in enumerate(lines, 1):
            os.write(master, f"{line}\t".encode())
            time.sleep(0.5)  # the shell is thinking
            os.write(master, b"\n")
            until(rf"(?:ran=.*\s+(?:.|\n)*){{{number}}}")
    finally:
        process.kill()
        process.wait()
        os.close(slave)
        os.close(master)
    return [found.strip() for found in re.findall(r"ran=(.*)", seen)]


@pytest.mark.parametrize("shell", START)
def test_what_is_typed_is_completed(shell: str) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"needs {shell}")
    lines = [
        "powertrain gen",
        "powertrain train +experiment=quic",
        "powertrain train x=1 optimizer.eps",
        "powertrain check READM",
    ]
    assert typed(shell, lines) == [
        "generate",
        "train +experiment=quickstart",
        "train x=1 optimizer.eps=",
        "check README.md",
    ]
