"""SIGKILL at random moments, saves included; signals; and a rank's stop that all ranks take."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import launch, start, without_timing

from powertrain.train import checkpoint
from powertrain.train.track import read_lines

LONG = ("run.tokens=38400", "checkpoint.every=3", "checkpoint.keep=2", "schedule.decay.tokens=7680")


def steps_taken(folder: Path) -> int:
    lines = read_lines(folder / "metrics.jsonl")
    return lines[-1]["step"] if lines else 0


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[str], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.001)


@pytest.mark.slow
def test_fault_03_ten_kills_change_nothing(
    tiny: Callable[..., list[str]], run: Callable[..., Path], tmp_path: Path
) -> None:
    undisturbed, folder = run("run.name=undisturbed", *LONG), tmp_path / "killed"
    draw = random.Random(0)
    saves = 0
    for kill in range(10):
        process = start(tiny("run.name=killed", *LONG))
        reached = steps_taken(folder)
        wait_until(lambda reached=reached: steps_taken(folder) > reached + draw.randint(0, 9), process)
        if kill % 2:  # in the middle of a save
            wait_until(lambda: any((folder / "checkpoints").glob(".step-*.partial")), process)
            time.sleep(draw.random() * 0.01)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        saves += any((folder / "checkpoints").glob(".step-*.partial"))
        assert all(not checkpoint.defects(path) for path in checkpoint.available(folder / "checkpoints"))
    assert steps_taken(folder) < 150, "it ended before the last kill"
    assert saves > 0
    run("run.name=killed", *LONG)
    assert without_timing(read_lines(folder / "metrics.jsonl")) == without_timing(
        read_lines(undisturbed / "metrics.jsonl")
    )
    for name in ("weights", "exp_avg", "exp_avg_sq"):
        last = f"checkpoints/step-00000150/{name}.safetensors"
        assert (folder / last).read_bytes() == (undisturbed / last).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_fault_07_a_signal_saves_and_the_run_goes_on(
    tiny: Callable[..., list[str]], tmp_path: Path, number: signal.Signals
) -> None:
    process = start(tiny("run.name=stopped", *LONG))
    wait_until(lambda: steps_taken(tmp_path / "stopped") > 5, process)
    process.send_signal(number)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 0, output
    ended = json.loads((tmp_path / "stopped/exit.json").read_text())
    assert ended["reason"] == number.name
    newest = checkpoint.newest_valid(tmp_path / "stopped/checkpoints")
    assert newest is not None
    assert checkpoint.step_of(newest) == ended["step"] < 150
    assert "The same command resumes from there" in output


@pytest.mark.slow
def test_fault_07_a_signal_to_one_rank_stops_all(tiny: Callable[..., list[str]], tmp_path: Path) -> None:
    process = start(tiny("run.name=pair", *LONG), ranks=2)
    wait_until(lambda: steps_taken(tmp_path / "pair") > 5, process)
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True)
    os.kill(int(children.stdout.split()[-1]), signal.SIGUSR1)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 0, output
    ended = json.loads((tmp_path / "pair/exit.json").read_text())
    newest = checkpoint.newest_valid(tmp_path / "pair/checkpoints")
    assert newest is not None
    assert checkpoint.step_of(newest) == ended["step"] < 150


@pytest.mark.slow
def test_fault_22_a_second_run_in_the_same_folder_is_refused(
    tiny: Callable[..., list[str]], run: Callable[..., Path], tmp_path: Path
) -> None:
    process = start(tiny("run.name=busy", *LONG))
    wait_until(lambda: steps_taken(tmp_path / "busy") > 0, process)
    os.killpg(process.pid, signal.SIGSTOP)  # or it might have ended before the second one looks
    second = launch(tiny("run.name=busy", *LONG))
    assert second.returncode == 2
    assert "Another process is training in" in second.stderr
    assert not (tmp_path / "busy/exit.json").exists()  # the first has not ended
    os.killpg(process.pid, signal.SIGKILL)  # a dead owner's claim is nobody's
    process.wait()
    assert json.loads((run("run.name=busy", *LONG) / "exit.json").read_text())["reason"] == "finished"
