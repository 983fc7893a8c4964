"""The faults that a run has to survive, by the numbers of docs/reliability.md; others are beside their part.

`pytest -k fault_` runs all of them. Faults are made by train.faults, in the process that they happen to.
"""

from __future__ import annotations

import functools
import json
import os
import pickle
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import (
    assert_same_run,
    cut_at,
    launch,
    launch_command,
    start,
    tiny_overrides,
    train_here,
    without_timing,
)
from safetensors.torch import load_file

from powertrain import train
from powertrain.data.files import sha256
from powertrain.train import checkpoint, faults
from powertrain.train.compose import composed
from powertrain.train.errors import ConfigError, RunFailed
from powertrain.train.state import State
from powertrain.train.track import Tracker, read_lines

SETTINGS = ("model.attention_dropout=0.1", "checkpoint.every=3", "checkpoint.keep=9")
Overrides = Callable[..., list[str]]


def succeed(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def undisturbed(words: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The run of some settings to which nothing happens, trained once: on one rank in this process, whose bits are
    those of a process of its own, or on two ranks of an engine."""

    @functools.cache
    def trained(*settings: str, engine: str = "plain") -> Path:
        folder = tmp_path_factory.mktemp("undisturbed")
        overrides = tiny_overrides(words, cache, folder, "run.name=whole", *settings)
        if engine == "plain":
            return train_here(overrides)
        succeed(launch(overrides, ranks=2, engine=engine))
        return folder / "whole"

    return trained


def stored(folder: Path, step: int, what: str = "weights") -> dict[str, torch.Tensor]:
    """Everything of a kind in a checkpoint, by the key in its file."""
    files = (folder / f"checkpoints/step-{step:08d}").glob(f"{what}*.safetensors")
    return {f"{path.name} {key}": tensor for path in sorted(files) for key, tensor in load_file(path).items()}


# ---------------------------------------------------------------------------------------------- exactness, kills


# In bf16 ZeRO 1 is another class of DeepSpeed's, and gradients are accumulated and checked elsewhere.
ON_TWO_RANKS = [("ddp", "fp32"), *((f"zero{stage}", kind) for stage in (1, 2, 3) for kind in ("fp32", "bf16"))]


@pytest.mark.slow
@pytest.mark.parametrize(("engine", "precision"), ON_TWO_RANKS)
def test_fault_01_and_05_two_ranks_go_on_bit_for_bit(
    tiny: Overrides, undisturbed: Callable[..., Path], tmp_path: Path, engine: str, precision: str
) -> None:
    settings = (*SETTINGS, f"precision={precision}", "batch.micro_sequences=2")
    whole = undisturbed(*settings, engine=engine)
    folder = cut_at(shutil.copytree(whole, tmp_path / "whole"), 6, "cut")
    first, second = (folder / f"checkpoints/step-00000006/rng/rank-0000{rank}.safetensors" for rank in (0, 1))
    assert first.read_bytes() != second.read_bytes()  # each draws a dropout of its own
    # Of one rank's part the newest is gone: all ranks go back to the one before.
    part = "rng/rank-00001.safetensors" if engine == "ddp" else "weights-00002-of-00002.safetensors"
    (folder / f"checkpoints/step-00000006/{part}").unlink()
    said = succeed(launch(tiny("run.name=cut", *settings), ranks=2, engine=engine))
    assert f"{part} is missing" in said and "step-00000003: step 3" in said
    assert_same_run(whole, folder)


@pytest.mark.slow
@pytest.mark.parametrize(
    "fault", ["tear@write:step=6", "kill@manifest:step=6", "kill@rename:step=6", "kill@prune:step=6"]
)
def test_fault_03_killed_in_a_save(
    tiny: Overrides, run: Callable[..., Path], undisturbed: Callable[..., Path], tmp_path: Path, fault: str
) -> None:
    settings = ("model.attention_dropout=0.1", "checkpoint.every=3", "checkpoint.keep=2")
    assert launch(tiny("run.name=killed", *settings), POWERTRAIN_FAULT=fault).returncode == -signal.SIGKILL
    newest = checkpoint.newest_valid(tmp_path / "killed/checkpoints")
    assert newest is not None
    assert checkpoint.step_of(newest) == (6 if "prune" in fault else 3)
    assert_same_run(undisturbed(*settings), run("run.name=killed", *settings))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "last"),
    [
        ("tear@write:rank=1:step=6", 9),  # it is written beside the next steps, until the next checkpoint waits for it
        ("kill@step:rank=1:step=5", 5),
    ],
)
def test_fault_03_and_16_a_rank_dies(
    tiny: Overrides, undisturbed: Callable[..., Path], tmp_path: Path, fault: str, last: int
) -> None:
    done = launch(tiny("run.name=killed", *SETTINGS), ranks=2, engine="zero2", POWERTRAIN_FAULT=fault)
    assert done.returncode != 0
    newest = checkpoint.newest_valid(tmp_path / "killed/checkpoints")
    assert newest is not None and checkpoint.step_of(newest) == 3
    assert not processes_of(tmp_path)
    ended = json.loads((tmp_path / "killed/exit.json").read_text())
    assert ended["code"] == 1 and "Another rank is gone" in ended["reason"] and 3 <= ended["step"] <= last
    assert "Another rank is gone" in done.stderr
    succeed(launch(tiny("run.name=killed", *SETTINGS), ranks=2, engine="zero2"))
    assert_same_run(undisturbed(*SETTINGS, engine="zero2"), tmp_path / "killed")


def processes_of(folder: Path) -> list[str]:
    """Processes that are left of runs in a folder."""
    found = subprocess.run(["pgrep", "-f", f"run.folder={folder}"], capture_output=True, text=True, check=False)
    return found.stdout.split()


# ------------------------------------------------------------------------------------------------------ disk full


def test_fault_06_a_full_disk_for_a_while(
    run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(faults, "wanted", "full@write:step=4")
    folder = run("checkpoint.every=2", "checkpoint.keep=9")
    said = " ".join(capsys.readouterr().out.split())
    assert "Warning: " in said and "The checkpoint of step 4 could not be written" in said
    assert "No space left on device. It needs about 0 MB" in said and "Training continues." in said
    assert [path.name[-2:] for path in sorted((folder / "checkpoints").iterdir())] == ["02", "06", "08", "10", "12"]
    assert all(not checkpoint.defects(path) for path in (folder / "checkpoints").iterdir())


def test_fault_06_a_full_disk_at_the_end(
    run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(faults, "wanted", "full@write:step=12")
    with pytest.raises(RunFailed, match=r"step 12 .* No space left on device. It needs about"):
        run("checkpoint.every=9")
    assert [path.name for path in (tmp_path / "tiny/checkpoints").iterdir()] == ["step-00000009"]
    assert json.loads((tmp_path / "tiny/exit.json").read_text())["code"] == 1


def test_fault_06_metrics_wait_for_a_disk_that_is_full(tiny: Overrides, tmp_path: Path) -> None:
    said: list[str] = []
    engine: Any = SimpleNamespace(is_main=True)
    tracker = Tracker(tmp_path, composed(tiny()), engine, State(), said.append)
    disk = tracker._files["metrics.jsonl"]
    for step in range(1, 6):
        full = 2 <= step <= 3
        tracker._files["metrics.jsonl"] = open("/dev/full", "ab", buffering=0) if full else disk  # noqa: SIM115
        tracker.step({"step": step, "loss": float("nan")})
    tracker._files["evals.jsonl"] = open("/dev/null", "ab", buffering=0)  # noqa: SIM115  # which takes no fsync
    tracker.close()
    assert "evals.jsonl may be incomplete on the disk" in said.pop()
    assert read_lines(tmp_path / "metrics.jsonl") == [{"step": step, "loss": None} for step in range(1, 6)]
    assert len(said) == 1 and "metrics.jsonl cannot be written" in said[0]


@pytest.mark.slow
def test_fault_06_a_full_disk_on_one_rank(tiny: Overrides, tmp_path: Path) -> None:
    settings = ("run.name=full", "checkpoint.every=9")
    done = launch(tiny(*settings), ranks=2, engine="zero1", POWERTRAIN_FAULT="full@write:rank=1:step=12")
    assert done.returncode != 0
    assert "could not be written to" in done.stderr and "by rank 1: No space left on device" in done.stderr
    assert [path.name for path in (tmp_path / "full/checkpoints").iterdir()] == ["step-00000009"]


# -------------------------------------------------------------------------------------------------------- signals


@pytest.mark.slow
@pytest.mark.parametrize(
    ("engine", "number"),
    [
        ("launched", signal.SIGTERM),
        ("launched", signal.SIGHUP),
        ("ddp", signal.SIGTERM),
        ("ddp", signal.SIGHUP),
        ("zero3", signal.SIGTERM),
    ],
)
def test_fault_07_a_signal_to_the_launcher(
    tiny: Overrides, undisturbed: Callable[..., Path], tmp_path: Path, engine: str, number: signal.Signals
) -> None:
    # Alone, steps are short: there have to be enough left for the signal to find one.
    ranks, steps = (1, 500) if engine == "launched" else (2, 50)
    longer = (f"run.tokens={256 * steps}", *SETTINGS, "checkpoint.every=40")
    before = signal.signal(number, signal.SIG_DFL)  # under nohup it would be ignored, here and by what starts here
    process = start(tiny("run.name=stopped", *longer), ranks=ranks, engine=engine)
    signal.signal(number, before)
    wait_for_step(tmp_path / "stopped", 5, process)
    process.send_signal(number)
    process.communicate(timeout=120)  # until nobody can write to its output any more
    ended = json.loads((tmp_path / "stopped/exit.json").read_text())
    assert ended["code"] == 0 and ended["reason"] in ("SIGTERM", number.name)  # launchers may pass on either
    newest = checkpoint.newest_valid(tmp_path / "stopped/checkpoints")
    assert newest is not None and checkpoint.step_of(newest) == ended["step"] < steps
    succeed(launch(tiny("run.name=stopped", *longer), ranks=ranks, engine=engine))
    whole = undisturbed(*longer, engine="plain" if engine == "launched" else engine)
    assert_same_run(whole, tmp_path / "stopped", steps)


def test_fault_07_a_stop_while_the_run_is_starting(
    run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run("run.name=first")  # or the preparation might be slow enough to end there
    assemble = train.run.assemble

    def asked_meanwhile(*arguments: Any) -> Any:
        (tmp_path / "tiny/stop").touch()
        return assemble(*arguments)

    monkeypatch.setattr("powertrain.train.run.assemble", asked_meanwhile)
    ended = json.loads((run() / "exit.json").read_text())
    assert ended == {"code": 0, "reason": "the file 'stop' in the run folder", "step": 1}
    monkeypatch.undo()
    # That file is still there, and means nothing to the next start.
    assert (tmp_path / "tiny/stop").exists()
    assert json.loads((run() / "exit.json").read_text())["reason"] == "finished"


@pytest.mark.slow
def test_fault_07_nobody_reads_the_output_any_more(tiny: Overrides, tmp_path: Path) -> None:
    command, _ = launch_command(tiny("run.name=piped", "run.tokens=12800"), 1, "plain")
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()
    process.wait(timeout=120)
    assert json.loads((tmp_path / "piped/exit.json").read_text()) == {"code": 0, "reason": "finished", "step": 50}


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["term@step:step=5,term@write:step=5", "term@evaluate:step=4"])
def test_fault_08_a_signal_at_a_bad_moment(
    tiny: Overrides, run: Callable[..., Path], undisturbed: Callable[..., Path], tmp_path: Path, fault: str
) -> None:
    settings = (*SETTINGS, "evaluation.every=4")
    succeed(launch(tiny("run.name=stopped", *settings), POWERTRAIN_FAULT=fault))
    folder = tmp_path / "stopped/checkpoints"
    assert checkpoint.newest_valid(folder) == folder / "step-00000005"
    assert json.loads((tmp_path / "stopped/exit.json").read_text())["reason"] == "SIGTERM"
    assert_same_run(undisturbed(*settings), run("run.name=stopped", *settings))


def wait_for_step(folder: Path, step: int, process: subprocess.Popen[str], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not (lines := read_lines(folder / "metrics.jsonl")) or lines[-1]["step"] < step:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.01)


# ------------------------------------------------------------------------------------- gradients that are not finite


@pytest.mark.slow
@pytest.mark.parametrize(("engine", "precision"), ON_TWO_RANKS)
def test_fault_09_nan_on_one_rank_skips_the_step_on_all(
    tiny: Overrides, tmp_path: Path, engine: str, precision: str
) -> None:
    settings = ("run.name=nan", f"precision={precision}", "checkpoint.every=1", "checkpoint.keep=20")
    succeed(launch(tiny(*settings), ranks=2, engine=engine, POWERTRAIN_FAULT="nan@gradient:rank=1:step=5"))
    lines = read_lines(tmp_path / "nan/metrics.jsonl")
    assert [line["step"] for line in lines if line["skipped"]] == [5]
    for what in ("weights", "exp_avg", "exp_avg_sq"):
        four, five, six = (stored(tmp_path / "nan", step, what) for step in (4, 5, 6))
        assert all(torch.equal(tensor, five[key]) for key, tensor in four.items()), what
        assert not all(torch.equal(tensor, six[key]) for key, tensor in five.items()), what


def test_fault_11_a_spike_right_after_going_on(
    run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(faults, "wanted", "spike@gradient:step=7")
    whole = run("run.name=whole", *SETTINGS)
    norms = {line["step"]: line["grad_norm"] for line in read_lines(whole / "metrics.jsonl")}
    assert norms[7] > 100 * norms[6]
    cut_at(whole, 6, "cut")
    assert_same_run(whole, run("run.name=cut", *SETTINGS))


# -------------------------------------------------------------------------------------------------------- elastic


@pytest.mark.slow
def test_fault_12_other_ranks_and_engines(tiny: Overrides, undisturbed: Callable[..., Path], tmp_path: Path) -> None:
    """plain → ddp × 2 → plain → zero3 × 2 → zero1 × 4 → ddp × 2 → zero2 × 1."""
    settings = ("batch.micro_sequences=2", "checkpoint.keep=9")
    legs = (("plain", 1), ("ddp", 2), ("plain", 1), ("zero3", 2), ("zero1", 4), ("ddp", 2), ("zero2", 1))
    for number, (engine, ranks) in enumerate(legs):
        stop = {"POWERTRAIN_FAULT": f"term@step:step={2 * number + 2}"} if number < len(legs) - 1 else {}
        said = succeed(launch(tiny("run.name=legs", *settings), ranks=ranks, engine=engine, **stop))
        if number:
            before = legs[number - 1]
            assert f"trained as {before[0]} on {before[1]} rank(s); it continues as {engine} on {ranks}" in said
    alone, legs_lines = (read_lines(folder / "metrics.jsonl") for folder in (undisturbed(*settings), tmp_path / "legs"))
    for one, other in zip(alone, legs_lines, strict=True):
        for exact in ("step", "tokens", "samples", "batch", "lr", "expert_load"):
            assert one[exact] == other[exact], (one["step"], exact)
        for close in ("loss", "lm_loss", "balance_loss", "z_loss"):
            assert other[close] == pytest.approx(one[close], rel=1e-4), (one["step"], close)


# ------------------------------------------------------------------------------------------------ ranks that hang


@pytest.mark.slow
@pytest.mark.parametrize(("point", "step", "after", "saved"), [("step", 5, 4, 3), ("write", 12, 12, 9)])
def test_fault_15_a_rank_that_hangs_is_named(
    tiny: Overrides, tmp_path: Path, point: str, step: int, after: int, saved: int
) -> None:
    settings = ("run.name=hangs", "engine.timeout=8", *SETTINGS)
    done = launch(tiny(*settings), ranks=2, engine="ddp", POWERTRAIN_FAULT=f"hang@{point}:rank=1:step={step}")
    assert done.returncode != 0
    ended = json.loads((tmp_path / "hangs/exit.json").read_text())
    assert ended["code"] == 1
    assert f"No progress for 8 s (engine.timeout) after step {after}: rank 1 does not answer" in ended["reason"]
    assert ended["reason"] in done.stderr
    assert not processes_of(tmp_path)
    checkpoints = tmp_path / "hangs/checkpoints"
    assert checkpoint.newest_valid(checkpoints) == checkpoints / f"step-{saved:08d}"


# --------------------------------------------------------------------------------------------------------- safety


def test_fault_04_checkpoints_that_are_gone_are_no_new_beginning(run: Callable[..., Path]) -> None:
    folder = run("checkpoint.every=6")
    lines = (folder / "metrics.jsonl").read_bytes()
    (folder / "checkpoints").rename(folder / "away")  # a disk that is not mounted, say
    with pytest.raises(ConfigError, match="had saved step 12, but there is no checkpoint"):
        run("checkpoint.every=6")
    assert (folder / "metrics.jsonl").read_bytes() == lines
    assert json.loads((folder / "exit.json").read_text())["code"] == 2
    run("checkpoint.every=6", "run.resume=never")
    assert len(read_lines(folder / "metrics.jsonl")) == 12


def test_fault_04_what_no_manifest_lists_is_not_read(run: Callable[..., Path]) -> None:
    settings = ("checkpoint.every=6", "schedule.decay.tokens=0")
    newest = run(*settings) / "checkpoints/step-00000012"
    for extra in ("weights-00001-of-00002.safetensors", "exp_avg-x.safetensors"):
        (newest / extra).write_bytes(b"of another kind")
    assert json.loads((run(*settings, "run.tokens=4096") / "exit.json").read_text())["step"] == 16


def test_fault_04_a_manifest_without_its_random_state(run: Callable[..., Path]) -> None:
    newest = run("checkpoint.every=6") / "checkpoints/step-00000012"
    manifest = json.loads((newest / "manifest.json").read_text())
    del manifest["files"]["rng/rank-00000.safetensors"]
    (newest / "manifest.json").write_text(json.dumps(manifest))
    assert checkpoint.defects(newest) == ["manifest.json is not this checkpoint's"]


def test_a_record_that_a_power_cut_has_emptied_stops_nothing(run: Callable[..., Path]) -> None:
    settings = ("checkpoint.every=6", "schedule.decay.tokens=0")
    (run(*settings) / "run.json").write_text("")
    folder = run(*settings, "run.tokens=4096")
    assert len(json.loads((folder / "run.json").read_text())["starts"]) == 1
    assert (folder / "run.json.unreadable").exists()


def test_a_folder_may_be_named_by_a_way_up(run: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    assert (run(f"run.folder={tmp_path}/there/../here") / "model/config.json").exists()


def test_files_have_the_permissions_of_new_ones(run: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "new").touch()
    folder = run("checkpoint.every=6")
    files = [*folder.glob("model/*"), *folder.glob("checkpoints/step-*/**/*.safetensors")]
    assert len(files) > 10
    assert {path.stat().st_mode for path in files if path.is_file()} == {(tmp_path / "new").stat().st_mode}


@pytest.mark.parametrize(("what", "step"), [("renamed", 5), ("replaced", 12), ("removed", 12), ("lock removed", 5)])
def test_a_folder_that_is_gone_while_it_trains_is_not_made_anew(
    run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, what: str, step: int
) -> None:
    folder, original = tmp_path / "tiny", Tracker.step

    def take_away(self: Tracker, record: dict[str, Any]) -> None:
        original(self, record)
        if record["step"] == step:
            while (folder / ".saved").read_text() != f"{(step - 1) // 2 * 2}\n":  # the last save is still being written
                time.sleep(0.01)
            if what == "lock removed":
                (folder / ".lock").unlink()
            else:
                folder.rename(tmp_path / "elsewhere")
            if what == "removed":
                shutil.rmtree(tmp_path / "elsewhere")
            if what == "replaced":
                folder.mkdir()
                (folder / ".lock").touch()

    monkeypatch.setattr(Tracker, "step", take_away)
    with pytest.raises(ConfigError, match="tiny is not the folder any more that this run began in") as refused:
        run("checkpoint.every=2")
    assert "\n" not in str(refused.value)
    if what == "lock removed":
        assert not (folder / "exit.json").exists()
    else:
        assert [path.name for path in folder.glob("*")] == ([".lock"] if what == "replaced" else [])
    if what == "renamed":
        assert len(read_lines(tmp_path / "elsewhere/metrics.jsonl")) == step
        assert not (tmp_path / "elsewhere/model").exists()
        (tmp_path / "elsewhere").rename(folder)
        monkeypatch.setattr(Tracker, "step", original)
        assert len(read_lines(run("checkpoint.every=2") / "metrics.jsonl")) == 12


@pytest.mark.parametrize("after", ["powertrain.train.run.assemble", "powertrain.train.run.Tracker.close"])
def test_a_folder_that_is_gone_before_records_or_the_export(
    run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, after: str
) -> None:
    original = train.run.assemble if after.endswith("assemble") else Tracker.close

    def then_gone(*arguments: Any) -> Any:
        returned = original(*arguments)
        shutil.rmtree(tmp_path / "tiny")
        return returned

    monkeypatch.setattr(after, then_gone)
    with pytest.raises(ConfigError, match="makes nothing anew"):
        run()
    assert not (tmp_path / "tiny").exists()


def test_a_page_that_cannot_be_drawn_costs_no_model(
    tiny: Overrides, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(folders: list[Path]) -> str:
        raise UnicodeEncodeError("latin-1", "−", 0, 1, "no such character")

    monkeypatch.setattr("powertrain.train.report.runs_page", fail)
    folder = train_here(tiny())
    assert (folder / "model/model.safetensors").exists()
    assert json.loads((folder / "exit.json").read_text())["reason"] == "finished"
    said = " ".join(capsys.readouterr().out.split())
    assert "Warning: " in said and "could not be drawn: UnicodeEncodeError" in said


def test_fault_24_a_secret_where_it_would_be_needed_again(
    run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MY_TOKEN", "corpora-2")
    with pytest.raises(ConfigError, match=r"^run\.name holds a secret"):
        run("run.name=on-corpora-2")
    with pytest.raises(ConfigError, match=r"^data\.corpora\.words\.path holds a secret"):
        run("data.corpora.words.path=s3://me:password@host/x")


def test_fault_23_and_28_age_is_told_by_the_step_alone(run: Callable[..., Path]) -> None:
    settings = ("checkpoint.every=4", "checkpoint.keep=2", "schedule.decay.tokens=0")
    folder = run(*settings)
    checkpoints = folder / "checkpoints"
    os.utime(checkpoints / "step-00000012", (0, 0))  # the clock was set back before it was written
    (checkpoints / "step-12").mkdir()  # not a checkpoint's name
    assert checkpoint.newest_valid(checkpoints) == checkpoints / "step-00000012"
    run(*settings, "run.tokens=4096")
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step-00000012", "step-00000016", "step-12"]


@pytest.mark.slow
def test_fault_24_secrets_are_written_nowhere(tiny: Overrides, tmp_path: Path) -> None:
    canaries = {"WANDB_API_KEY": "canary-1-" + "x" * 40, "MY_SECRET": "canary-2-hush-hush"}
    given = ("api_key=canary-3", "notes=canary-2-hush-hush")
    settings = ("tracker=wandb", *(f"+tracker.init_kwargs.wandb.{each}" for each in given))
    done = launch(tiny("run.name=secret", "checkpoint.every=6", *settings), **canaries)
    tracked = launch(tiny("run.name=tracked", "tracker=wandb"), **canaries)
    refused = launch(tiny("run.name=canary-2-hush-hush/x"), **canaries)
    assert (done.returncode, tracked.returncode, refused.returncode) == (0, 0, 2)
    assert list((tmp_path / "tracked").glob("wandb/offline-run-*/*.wandb"))
    for process in (done, tracked, refused):
        assert "canary" not in process.stdout + process.stderr
    found = [path for path in tmp_path.rglob("*") if path.is_file() and b"canary" in path.read_bytes()]
    assert found == []


def test_fault_24_what_is_hidden_and_what_is_not(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from powertrain.train.redact import without_secrets

    monkeypatch.setenv("SOME_TOKEN", "abcdefgh")
    monkeypatch.setenv("SECRETS_DIR", str(tmp_path))
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "perhaps-not")
    harmless = {
        "data": {
            "corpora": {"secret_garden": {"path": f"{tmp_path}/secret: of"}},
            "tokenizer": {"path": "perhaps-not"},
        },
        "run": {"tokens": 5, "name": "passwords"},
    }
    assert without_secrets(harmless) == harmless
    assert without_secrets({"x": ["see abcdefgh"]}) == {"x": ["see (hidden)"]}
    given = {"tracker": {"init_kwargs": {"api_key": "k", "settings": {"hf_token": "t", "tags": ["a"]}}}}
    hidden = {"tracker": {"init_kwargs": {"api_key": "(hidden)", "settings": {"hf_token": "(hidden)", "tags": ["a"]}}}}
    assert without_secrets(given) == hidden
    assert without_secrets("tracker.init_kwargs.password='two words'") == "tracker.init_kwargs.password=(hidden)"
    assert without_secrets("https://me:pass@host/a:b@c") == "https://(hidden)@host/a:b@c"
    assert without_secrets("redis://:pass@host/0") == "redis://(hidden)@host/0"
    headers = {"init_kwargs": {"headers": {"Authorization": "Bearer x", "Accept": "text"}, "lines": ["X-Auth: y"]}}
    assert without_secrets(headers) == {
        "init_kwargs": {"headers": {"Authorization": "(hidden)", "Accept": "text"}, "lines": ["X-Auth: (hidden)"]}
    }
    line = "+tracker.init_kwargs.mlflow.headers={Authorization: Bearer x}"
    assert without_secrets(line) == "+tracker.init_kwargs.mlflow.headers={Authorization: (hidden)"


def test_fault_24_names_of_secrets(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from powertrain.train.redact import without_secrets

    secrets = """DB_PASS PASS SSHPASS SMTP_PASS_1 MYSQL_PWD DBPWD PGPASSWORD PASSPHRASE SSH_KEY KEY SIGNING_KEY
        SSH_KEY_B64 SERVICE_KEY2 AWS_ACCESS_KEY_ID GITHUB_PAT PAT AUTH NPM_CONFIG__AUTH PROXY_AUTHORIZATION
        SLACK_WEBHOOK DISCORD_WEBHOOK_URL BEARER SENTRY_DSN SESSION_COOKIE HF_TOKEN DB_CREDS APP_JWT
        AZURE_STORAGE_CONNECTION_STRING AUTH_HEADER BASIC_AUTH_B64 KEY_BASE64 OPENAI_KEYS AWS_SAS_SIG X_COOKIE_VALUE
        SESSION_ID MY_OTP"""
    others = """PATH PWD OLDPWD PATTERN COMPAT_MODE COMPASS BYPASS KEYBOARD_LAYOUT KEY_SIZE GIT_AUTHOR_NAME XAUTHORITY
        TOKENIZERS_PARALLELISM PASSED MONKEYS COOKIECUTTER_CONFIG XDG_SESSION_TYPE DESIGN AUTH_METHOD DSNAME"""
    for value in ("s3cret-canary", "/s3cret/canary/+=", " 8characters-with-space "):
        for name in secrets.split():
            with monkeypatch.context() as environment:
                environment.setenv(name, value)
                assert without_secrets(f"see {value.strip()}.") == "see (hidden).", name
        for name in others.split():
            with monkeypatch.context() as environment:
                environment.setenv(name, value)
                assert without_secrets(f"see {value}.") == f"see {value}.", name
    for name, value in (
        ("MY_AUTH", "disabled"),
        ("SORT_KEY", "timestamp"),
        ("SSH_KEY", str(tmp_path)),
        ("A_PASS", "x"),
        ("A_TOKEN_TYPE", "opaque"),
    ):
        monkeypatch.setenv(name, value)
        assert without_secrets(f"see {value}") == f"see {value}", name


def test_fault_24_a_tracker_that_repeats_what_it_was_given(
    run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from accelerate.tracking import WandBTracker

    def fail(*_: object, **__: object) -> None:
        raise ValueError("canary-of-init-kwargs is no key")

    monkeypatch.setattr(WandBTracker, "start", fail)
    folder = run("tracker=wandb", "+tracker.init_kwargs.wandb.settings={auth: [me, canary-of-init-kwargs]}")
    assert "the tracker wandb has ended: ValueError: (hidden) is no key" in " ".join(capsys.readouterr().out.split())
    found = [path for path in folder.rglob("*") if path.is_file() and b"canary" in path.read_bytes()]
    assert found == []


@pytest.mark.parametrize("missing", ["exp_avg-00001-of-00002.safetensors", "rng/rank-00001.safetensors"])
def test_every_ranks_files_are_required(tmp_path: Path, missing: str) -> None:
    """Taken out of the manifest, too, it would be noticed by one rank alone, or by none."""
    path = tmp_path / "step-00000003"
    (path / "rng").mkdir(parents=True)
    names = [f"{what}-{shard}-of-00002.safetensors" for what in ("weights", "exp_avg", "exp_avg_sq")
             for shard in ("00001", "00002")]  # fmt: skip
    for name in (*names, "rng/rank-00000.safetensors", "rng/rank-00001.safetensors"):
        (path / name).write_bytes(b"")
    state = {"state": vars(State()), "optimizer_steps": 3, "assignments": [[1, 2]], "data_fingerprint": {}}
    (path / "state.json").write_text(json.dumps({**state, "engine": {"kind": "zero3", "ranks": 2}}))
    files = {
        file.relative_to(path).as_posix(): {"size": file.stat().st_size, "sha256": sha256(file)}
        for file in path.rglob("*.*")
    }
    (path / "manifest.json").write_text(json.dumps({"step": 3, "files": files}))
    assert checkpoint.defects(path) == []
    (path / missing).unlink()
    del files[missing]
    (path / "manifest.json").write_text(json.dumps({"step": 3, "files": files}))
    assert checkpoint.defects(path) == [f"{missing} is missing, in manifest.json too"]


class _Evil:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.mark,))


def test_fault_25_a_pickle_is_not_opened(run: Callable[..., Path], tmp_path: Path) -> None:
    settings = ("checkpoint.every=6", "schedule.decay.tokens=0")
    folder = run(*settings)
    path = folder / "checkpoints/step-00000012"
    (path / "weights.safetensors").write_bytes(pickle.dumps(_Evil(tmp_path / "mark")))
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"]["weights.safetensors"] = {
        "size": (path / "weights.safetensors").stat().st_size,
        "sha256": sha256(path / "weights.safetensors"),
    }
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ConfigError, match="is not a safetensors file"):
        run(*settings, "run.tokens=4096")
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("key", ["model._target_", "data.corpora.words._target_", "tracker.init_kwargs.wandb._target_"])
def test_fault_25_a_target_is_not_called(tiny: Overrides, tmp_path: Path, key: str) -> None:
    from powertrain.train.compose import composed

    mark = tmp_path / "mark"
    evil = ("tracker=wandb", f"+{key}=os.mkdir", f"+{key.rpartition('.')[0]}.path={mark}")
    if key.startswith("tracker"):
        assert composed(tiny(*evil)).tracker.init_kwargs["wandb"]["_target_"] == "os.mkdir"  # a text like any other
    else:
        with pytest.raises(ConfigError):
            composed(tiny(*evil))
    assert not mark.exists()


# ------------------------------------------------------------------------------------------------------- trackers


@pytest.mark.parametrize("wrong", ["start raises", "log raises", "log exits", "start hangs", "log hangs"])
def test_fault_27_a_tracker_that_fails_changes_nothing(
    run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], wrong: str
) -> None:
    """Not the run, and not the tracker beside it."""
    import threading

    from accelerate.tracking import TensorBoardTracker, WandBTracker

    from powertrain.train import track

    off = read_lines(run("run.name=off") / "metrics.jsonl")
    never, shown = threading.Event(), []

    def fail(*_: object, **__: object) -> None:
        if "hangs" in wrong:
            never.wait(60)
        raise SystemExit("unreachable") if "exits" in wrong else ConnectionError("unreachable")

    monkeypatch.setattr(track, "CLOSE_SECONDS", 0.5)
    for kind in (WandBTracker, TensorBoardTracker):
        for method in ("start", "store_init_configuration", "log", "finish"):
            monkeypatch.setattr(kind, method, lambda *_, **__: None)
    monkeypatch.setattr(WandBTracker, wrong.partition(" ")[0], fail)
    monkeypatch.setattr(
        TensorBoardTracker, "log", lambda self, values, step: shown.append((step, values.get("lm_loss")))
    )
    began = time.monotonic()
    folder = run("run.name=on", "tracker.log_with=[wandb,tensorboard]")
    assert time.monotonic() - began < 30  # it would have been 60
    told = "is left behind" if "hangs" in wrong else ": unreachable"
    assert told in "".join(capfd.readouterr())
    (ended,) = json.loads((folder / "run.json").read_text())["starts"][-1]["trackers_ended"].items()
    assert ended[0] == "wandb" and told in ended[1]
    never.set()
    on = read_lines(folder / "metrics.jsonl")
    assert without_timing(on) == without_timing(off)
    assert shown[:12] == [(line["step"], line["lm_loss"]) for line in on]


def test_fault_27_a_tracker_that_takes_nothing_fills_no_memory() -> None:
    import threading

    from powertrain.train import track

    never, ended = threading.Event(), []
    passing = track._TrackerThread("slow", lambda: never.wait(60), lambda name, why: ended.append((name, why)))
    for step in range(track.MAX_QUEUED + 10):
        passing.put(({}, step))
    assert ended == [("slow", "10,000 lines wait for it, and it is left behind")]
    assert passing._lines.qsize() == track.MAX_QUEUED
    never.set()
