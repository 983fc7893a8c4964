"""The batch script of a run, with stand-ins for Slurm's commands."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT

from powertrain.train.track import read_lines

SCRIPT = ROOT / "launch/slurm/train.sbatch"


@pytest.fixture
def cluster(tmp_path: Path) -> dict[str, str]:
    """The environment of a job on two ranks of this machine; what it asks of Slurm is in requeued.txt."""
    folder = tmp_path / "bin"
    folder.mkdir()
    stand_ins = {
        "scontrol": f'[ "$1" = show ] && printf "127.0.0.1\\nn2\\n" || echo "$@" >> {tmp_path}/requeued.txt',
        "srun": 'export SLURM_NODEID=0; shift; exec "$@"',
        "python": f'exec {sys.executable} "$@"',
        "accelerate": f'exec {sys.executable} -m accelerate.commands.accelerate_cli "$@"',
        "powertrain": (ROOT / "src/powertrain_command.py").read_text(),
    }
    for name, body in stand_ins.items():
        (folder / name).write_text(f"#!{sys.executable if name == 'powertrain' else '/bin/sh'}\n{body}\n")
        (folder / name).chmod(0o755)
    job = {"SLURM_JOB_ID": "17", "SLURM_NNODES": "1", "SLURM_GPUS_ON_NODE": "2", "SLURM_JOB_NODELIST": "n[1-2]"}
    return {**os.environ, **job, "PATH": f"{folder}:{os.environ['PATH']}"}


def test_a_dry_run_prints_the_command_of_each_node(cluster: dict[str, str]) -> None:
    done = subprocess.run(
        ["bash", str(SCRIPT), "+experiment=powermoe_3b", "run.name=a b"],
        env={**cluster, "DRY_RUN": "1", "SLURM_NNODES": "2"},
        capture_output=True,
        text=True,
        check=True,
    )
    file = ROOT / "src/powertrain/launch/accelerate/multi_node.yaml"
    start = f"accelerate launch --config_file {file} --num_machines 2 --num_processes 4"
    command = f"{cluster['PATH'].partition(':')[0]}/powertrain"
    standard = "--main_process_port 20017 --deepspeed_multinode_launcher standard"
    rest = f"--main_process_ip 127.0.0.1 {standard} {command} train +experiment=powermoe_3b run.name=a\\ b"
    assert [line.strip() for line in done.stdout.splitlines()] == [
        f"{start} --machine_rank {node} {rest}" for node in (0, 1)
    ]


def test_shellcheck() -> None:
    shellcheck = Path(sys.executable).with_name("shellcheck")  # of the test extra
    subprocess.run([shellcheck, *SCRIPT.parent.glob("*.sbatch")], check=True)


@pytest.mark.slow
def test_fault_07_a_preempted_job_saves_and_is_queued_again(
    cluster: dict[str, str], tiny: Callable[..., list[str]], tmp_path: Path
) -> None:
    arguments = tiny("run.name=job", "run.tokens=12800", "checkpoint.every=100")
    environment = {**cluster, "ACCELERATE_CONFIG": str(ROOT / "launch/accelerate/zero1.yaml")}
    job = subprocess.Popen(["bash", str(SCRIPT), *arguments], env=environment, cwd=ROOT, stdout=subprocess.PIPE)
    end = time.monotonic() + 120
    while not read_lines(tmp_path / "job/metrics.jsonl"):
        assert job.poll() is None and time.monotonic() < end
        time.sleep(0.01)
    job.send_signal(signal.SIGUSR1)
    output = job.communicate(timeout=120)[0]
    assert job.returncode == 0, output
    ended = json.loads((tmp_path / "job/exit.json").read_text())
    assert ended["reason"] == "the file 'stop' in the run folder" and 0 < ended["step"] < 50
    assert (tmp_path / "requeued.txt").read_text() == "requeue 17\n"
    subprocess.run(["bash", str(SCRIPT), *arguments], env=environment, cwd=ROOT, check=True, capture_output=True)
    assert json.loads((tmp_path / "job/exit.json").read_text()) == {"code": 0, "reason": "finished", "step": 50}
    assert (tmp_path / "requeued.txt").read_text() == "requeue 17\n"  # it is done, and not queued again
