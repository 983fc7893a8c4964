"""The critical batch of a run: by planted losses, and by branches of a tiny run."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import assert_same_run, launch_command, tiny_overrides, train_here

from powertrain.launch import branch
from powertrain.launch.branch.critical import Array, Critical, best_of, critical
from powertrain.schedulers import Decay, Power
from powertrain.train import faults
from powertrain.train.config import Config
from powertrain.train.errors import ConfigError
from powertrain.train.track import read_lines

BATCHES = [8.0, 16.0, 32.0, 64.0]
SLOPE = 0.1  # nats by which the best batch's loss falls when its tokens grow by a factor of e


def planted(needed: list[float], noise: float = 0.0, seed: int = 0, count: int = 256, slope: float = SLOPE) -> Critical:
    """What is found where each batch needs so many times the tokens of the best one, whose entry is 1.

    Sequences differ in length, and in their loss far more than branches do; each branch's loss on a sequence has noise.
    """
    draw = np.random.default_rng(seed)
    targets = draw.integers(50, 100, count)
    hardness = draw.normal(4.0, 0.5, count)

    def sums(loss: float) -> Array:
        return np.stack([targets * (hardness + loss + draw.normal(0, noise, count)), targets], axis=1)

    runs = [None if math.isinf(more) else sums(slope * math.log(more)) for more in needed]
    return critical(BATCHES, runs, needed.index(1.0), sums(slope * math.log(2)))


def crossing(first: float, needed: float, then: float) -> float:
    """By hand, in the logarithms of both: where 1.2 lies between two batches, the second twice the first."""
    return first * 2 ** (math.log(1.2 / needed) / math.log(then / needed))


def test_the_critical_batch_of_planted_losses_is_found() -> None:
    found = planted([1.0, 1.05, 1.1, 1.4])
    assert found.needed is not None and found.critical is not None
    assert [each.value for each in found.needed] == pytest.approx([1.0, 1.05, 1.1, 1.4])
    apart = [SLOPE * math.log(more) for more in (1.0, 1.05, 1.1, 1.4)]
    assert [each.value for each in found.differences] == pytest.approx(apart)
    assert found.critical.value == pytest.approx(crossing(32, 1.1, 1.4))
    assert found.critical.low == pytest.approx(found.critical.high)
    assert found.bound == found.critical.value
    # A batch that diverges, or needs more than twice the tokens, counts as one that needs twice as many.
    found = planted([1.0, 1.1, 3.0, math.inf])
    assert found.needed is not None and found.critical is not None
    assert [each.value for each in found.needed] == pytest.approx([1.0, 1.1, 2.0, 2.0])
    assert found.critical.value == pytest.approx(crossing(16, 1.1, 2.0))
    assert found.losses[3] == math.inf


def test_what_a_small_batch_needs_is_not_taken_for_the_critical_batch() -> None:
    found = planted([1.9, 1.0, 1.1, 1.4])
    assert found.needed is not None and found.critical is not None
    assert [each.value for each in found.needed] == pytest.approx([1.9, 1.0, 1.1, 1.4])
    assert found.critical.value == pytest.approx(crossing(32, 1.1, 1.4))
    assert planted([1.9, 1.6, 1.3, 1.0]).bound == 64  # the largest is the best
    sums = [np.array([[loss, 1.0]]) for loss in (3.0, 1.0, 2.0)]
    assert best_of([None, *sums]) == 2 and best_of([None, None]) is None


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    truth = crossing(32, 1.1, 1.5)
    found = [planted([1.0, 1.02, 1.1, 1.5], noise=0.03, seed=seed).critical for seed in range(20)]
    held = [each is not None and each.low <= truth <= each.high for each in found]
    assert sum(held) >= 17  # 19 of 20 are expected; fewer than 17 have a chance of 2%
    assert max(each.high / each.low for each in found if each is not None) < 2  # and they say something


def test_batches_that_are_all_alike_are_all_below_the_critical_one() -> None:
    for seed in range(8):
        found = planted([1.0, 1.0, 1.0, 1.0], noise=0.05, seed=seed)
        assert found.critical is not None and math.isinf(found.critical.low) and found.bound == 64


def test_noise_alone_tells_no_critical_batch() -> None:
    for seed in range(12):
        found = planted([1.0, 1.0, 1.0, 1.0], noise=1.0, seed=seed, slope=0.0)
        assert found.needed is None and found.critical is None and found.bound is None
    # A single sequence has no interval, however far apart its losses lie.
    one = [np.array([[loss, 1.0]]) for loss in (3.0, 3.1, 3.2, 3.5)]
    found = critical([8.0, 16.0, 32.0, 64.0], one, 0, np.array([[4.0, 1.0]]))
    assert found.needed is None and found.critical is None and found.bound is None
    # A gain that is seen, while no batch is told apart from one that needs a fifth more.
    found = planted([1.0, 1.0, 1.0, 1.0], noise=0.35, seed=0, count=1024, slope=0.06)
    assert found.needed is not None and found.critical is not None and found.bound is None


# ---------------------------------------------------------------------------------------------------------- the verb


def verb(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        branch.main(list(arguments))
    return int(ended.value.code or 0)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


TRUNK = ("run.name=trunk", "schedule.decay.tokens=0", "checkpoint.every=3", "checkpoint.keep=9")


@pytest.fixture(scope="module")
def sound(words: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trunk of 12 steps, to read."""
    return train_here(tiny_overrides(words, cache, tmp_path_factory.mktemp("sound"), *TRUNK))


@pytest.fixture
def trunk(sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same, to branch off in few steps."""
    monkeypatch.setattr(branch, "MIN_STEPS", 16)
    monkeypatch.setattr("powertrain.train.report.runs_page", lambda folders: "not drawn")
    return Path(shutil.copytree(sound, tmp_path / "trunk"))


def test_branches_of_a_run_from_a_stop_to_the_ramp(
    trunk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(trunk)
    arguments = (str(trunk), "--at", "6", "--batch", "1x", "2x", "checkpoint.every=1")
    # 1x has the steps 7 to 38, 2x 7 to 22; the better of them once more half as many.
    monkeypatch.setattr(faults, "wanted", "term@step:step=24")
    assert verb(*arguments) == 0
    assert "Stopped by SIGTERM at step 24" in capsys.readouterr().out
    assert not (tmp_path / "trunk-branch-6-2x").exists()
    monkeypatch.setattr(faults, "wanted", "")
    assert verb(*arguments) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert contents(trunk) == before

    power, length = Power(max_lr=0.01, warmup_tokens=700), 8192
    losses = {name: read_lines(tmp_path / f"trunk-branch-6-{name}/evals.jsonl")[-1]["loss"] for name in ("1x", "2x")}
    best = min(losses, key=losses.__getitem__)
    for name, sequences, tokens in (("1x", 8, length), ("2x", 16, length), (f"{best}-half", 8 * int(best[0]), 4096)):
        folder = tmp_path / f"trunk-branch-6-{name}"
        lines, size = read_lines(folder / "metrics.jsonl"), sequences * 32
        assert [line["tokens"] for line in lines] == list(range(1536, 1536 + tokens, size))
        assert [line["samples"] for line in lines] == list(range(48, 48 + tokens // 32, sequences))
        decayed = Power(max_lr=0.01, warmup_tokens=700, decay=Decay(start=1536 + tokens * 3 // 4, tokens=tokens // 4))
        assert [line["lr"] for line in lines] == [decayed(tokens=line["tokens"], batch=size / 4096) for line in lines]
        # What is compared is the loss that the branch itself evaluated, sequence by sequence.
        sums = np.array(json.loads((folder / "sequences.json").read_text())["sums"])
        evaluated = read_lines(folder / "evals.jsonl")[-1]
        assert sums.shape == (8, 2) and sums[:, 1].sum() == evaluated["targets"]
        assert sums[:, 0].sum() / sums[:, 1].sum() == pytest.approx(evaluated["loss"], rel=1e-6)
        assert name.endswith("half") or f"{power(tokens=1536, batch=size / 4096):.3g}" in told
    assert "8,192 tokens each" in told and "In all 20,480 tokens." in told
    critical_batch = power.critical_batch(1536) * 128
    assert f"where its cap binds: {critical_batch:,.1f} sequences at the start" in told

    # Done: nothing is trained again; more sequences are evaluated; other options are refused.
    (tmp_path / "trunk/checkpoints").rename(tmp_path / "away")
    monkeypatch.setattr(faults, "wanted", "kill@step")
    assert verb(*arguments, "evaluation.sequences=9") == 0
    assert "Losses are over 9 validation sequences" in capsys.readouterr().out
    for other, said in (
        (("--tokens", "12288"), "holds a branch with tokens 8192, not 12288"),
        (("optimizer.eps=1e-9",), "optimizer.eps"),
        (("evaluation.sequences=1",), "evaluation.sequences is 1; branches are compared over 8"),
    ):
        assert verb(*arguments, *other) == 2
        assert said in capsys.readouterr().err
    (tmp_path / "away").rename(tmp_path / "trunk/checkpoints")
    assert verb(str(trunk), "--at", "9", *arguments[3:], "--name", "trunk-branch-6") == 2
    assert "checkpoint step-00000006, not step-00000009" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--batch", "1x", "1x"), "a comparison takes two or more"),
        (("--batch", "1x", "two"), "has 'two'"),
        (("--batch", "0x", "1x"), "has '0x'"),
        (("--batch", "1x", "1.1x"), "no whole number"),
        (("--batch", "1x", "2.25x"), "does not split into micro-batches of 4"),
        (("--batch", "1x", "2x", "--tokens", "16000"), "16,384 or 20,480, for example"),
        (("--batch", "1x", "2x", "--tokens", "18000"), "16,384 or 20,480, for example"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_it_is_trained(
    sound: Path, arguments: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert verb(str(sound), "--at", "6", *arguments) == 2
    assert said in capsys.readouterr().err
    assert [path.name for path in sound.parent.iterdir()] == ["trunk"]


@pytest.mark.parametrize(
    "settings",
    [("schedule=wsd", "schedule.lr=0.01"), ("schedule=constant", "schedule.lr=0.01"), ("schedule.batch_exponent=0",)],
)
def test_a_schedule_without_a_law_for_the_batch_is_refused(
    small_config: Callable[..., Config], settings: tuple[str, ...]
) -> None:
    with pytest.raises(ConfigError, match="has no law for another batch"):
        branch.check_law(small_config(*settings))


def test_a_branch_that_diverges_counts_as_one_that_needs_more(
    trunk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("powertrain.train.run.MAX_SKIPPED_IN_A_ROW", 2)
    spoiled = faults.spoiled
    monkeypatch.setattr(
        "powertrain.train.faults.spoiled",
        lambda loss, rank, step: loss * (math.nan if os.environ.get("SPOILED") and step > 6 else 1.0),
    )
    arguments = (str(trunk), "--at", "6", "--batch", "1x", "2x")
    ended = branch.trained

    def trained(config, *rest):  # type: ignore[no-untyped-def]
        monkeypatch.setenv("SPOILED", "1" if config.run.name.endswith("2x") else "")
        return ended(config, *rest)

    monkeypatch.setattr(branch, "trained", trained)
    assert verb(*arguments) == 0
    assert "diverged" in capsys.readouterr().out
    monkeypatch.setattr(faults, "spoiled", spoiled)
    assert verb(*arguments) == 0  # nor is it tried again
    assert "diverged" in capsys.readouterr().out


def test_the_ramp_follows_the_schedule_from_the_measured_batch(sound: Path) -> None:
    import argparse

    options = argparse.Namespace(
        run=sound, at=6, batch=["1x", "2x", "4x"], tokens=None, name=None, overrides=["evaluation.sequences=8"]
    )
    plan = branch.planned(options)
    assert plan.tokens == 32 * 32 * 32 and plan.at is not None and plan.sequences == [8, 16, 32]
    # Measured at 1,536 tokens, it grows as tokens^0.51; the trunk has come to 3,072, where its batch is 8 still.
    now, later = 12.0 * 2**0.51, 24.0 * 2**0.51
    assert 16 < now < 32 < later
    assert branch.ramp(plan, 12.0).endswith("'batch.ramp=[{from_tokens:3072,sequences:16}]'")
    assert branch.ramp(plan, 24.0).endswith("'batch.ramp=[{from_tokens:3072,sequences:32}]'")
    assert branch.ramp(plan, 1e9).endswith("'batch.ramp=[{from_tokens:3072,sequences:32}]'")  # none was tried
    assert "no larger batch than 8 sequences" in branch.ramp(plan, 9.0)


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "engine"), [(1, "plain"), (2, "ddp"), (2, "zero3")])
def test_killed_branches_go_on_as_if_they_had_not_been(
    run: Callable[..., Path], tmp_path: Path, ranks: int, engine: str
) -> None:
    trunk = run(*TRUNK)
    before = contents(trunk)

    def launch(name: str, fault: str = "") -> subprocess.CompletedProcess[str]:
        command, needed = launch_command([], ranks, engine)
        command[-1:] = [str(Path(sys.executable).with_name("powertrain")), "branch", str(trunk), "--at", "6"]
        command += ["--batch", "1x", "2x", "--name", name, "checkpoint.every=2"]
        environment = {**os.environ, **needed, "POWERTRAIN_FAULT": fault}
        return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=400)

    whole = launch("whole")
    assert whole.returncode == 0, whole.stdout + whole.stderr
    # In a save of the first branch, in its decay, in the second.
    for fault in ("kill@rename:step=20", "kill@step:step=61", "kill@step:step=31"):
        launch("killed", fault)
    done = launch("killed")
    assert done.returncode == 0, done.stdout + done.stderr
    assert contents(trunk) == before
    (half,) = (path.name[6:] for path in tmp_path.glob("whole-*-half"))
    for name, last in (("1x", 70), ("2x", 38), (half, 6 + 32 // int(half[0]))):
        assert_same_run(tmp_path / f"whole-{name}", tmp_path / f"killed-{name}", step=last)
        assert (tmp_path / f"whole-{name}/sequences.json").read_text() == (
            tmp_path / f"killed-{name}/sequences.json"
        ).read_text()
    tables = [text.stdout[text.stdout.index(" batch ") :] for text in (whole, done)]
    assert tables[0] == tables[1]
