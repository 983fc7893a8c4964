"""A sweep: which trials there are, that a shared trunk changes nothing, and that nothing is lost or done twice."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import random
import re
import signal
import stat
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import CONFIGS, ROOT, without_timing
from safetensors.torch import load_file

from powertrain.launch.sweep import check_ledger, main, worker
from powertrain.launch.sweep.progress import Progress, Sweep, write_ledger
from powertrain.launch.sweep.tables import summary
from powertrain.launch.sweep.trials import SweepConfig, Trial, in_common, overrides, plan, sweep_config
from powertrain.launch.sweep.worker import begin_from, result
from powertrain.train.errors import ConfigError, RunFailed
from powertrain.train.track import read_lines

SWEEP: dict[str, Any] = {
    "name": "s",
    "models": {"small": {"hidden_size": 32}},
    "schedules": {"wsd": {"lr": [0.01, 0.02, 0.04, 0.08, 0.16]}},
    "batch": [0.25, 1],
    "tokens": [409_600, 819_200, 1_638_400],
}


def swept(**changes: Any) -> SweepConfig:
    return sweep_config({**SWEEP, **changes})


# ------------------------------------------------------------------------------------------------------- the plan


def test_every_combination_is_a_trial_and_the_shortest_horizon_comes_first() -> None:
    trials = plan(swept())
    assert len(trials) == 5 * 2 * 3 == len({trial.name for trial in trials})
    assert [trial.tokens for trial in trials] == sorted(trial.tokens for trial in trials)


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "configs/sweep").glob("*.yaml")))
def test_every_sweep_that_comes_along_can_be_planned(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main([f"+sweep={name}", "--dry-run"])
    assert left.value.code == 0
    assert "0 of " in capsys.readouterr().out


def test_a_batch_is_trained_where_its_steps_are_neither_too_few_nor_too_many() -> None:
    trials = plan(swept(min_steps=150, max_steps=1000))
    # 409,600 tokens are 400 steps of 1024 and 100 of 4096; 1,638,400 are 1600 and 400.
    assert {(trial.batch, trial.tokens) for trial in trials} == {
        (0.25, 409_600), (0.25, 819_200), (1, 819_200), (1, 1_638_400),
    }  # fmt: skip


def test_repeats_have_their_own_seeds_at_every_horizon() -> None:
    repeat = {"model": "small", "batch": 1, "fields": {"lr": 0.02}, "seeds": [3, 4]}
    trials = [trial for trial in plan(swept(repeats=[repeat])) if trial.seed]
    assert {(t.seed, t.tokens) for t in trials} == {(s, t) for s in (3, 4) for t in SWEEP["tokens"]}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"tokens": [409_600, 1_000_000]}, "between two steps. Multiples of 40,960"),
        ({"tokens": [45_056], "min_steps": 10}, "start of the decay"),
        ({"batch": [0.05, 0.1], "tokens": [61_500, 123_000]}, "A batch of 0.05 is 204.8 tokens, no whole number"),
        ({"decay_fraction": 0.12345678}, "give sweep.decay_fraction fewer digits"),
        ({"batch": [1, -2]}, "-2"),
        ({"batch": 1}, "batch"),
        ({"schedules": {"wsd": {"lr": ["high"]}}}, "high"),
        ({"schedules": {"wsd": {"lr": [0.01, 0.0100000001]}}}, "two trials would share it"),
        ({"schedules": {"wsd": {"lr": [float("nan")]}}}, "finite"),
        ({"jobs": "two"}, "jobs"),
        ({"jobs": 0}, "jobs"),
        ({"max_steps": 0}, "max_steps"),
        ({"launcher": "torchrun 'x"}, "launcher"),
        ({"models": {"small" * 60: {"hidden_size": 32}}}, "too long"),
        ({"min_steps": 10**6}, "there is no trial"),
        ({"tokens": [1e6]}, "tokens"),
        ({"schedules": {"wsd": {"lr": 0.1}}}, "schedules.wsd"),
        ({"schedules": {"wsd": {"lr": []}}}, "gives values"),
        ({"decay_fraction": 1.5}, "1.5"),
        ({"models": {}}, "nothing to train"),
        ({"batches": [1]}, "batches"),
        ({"repeats": [{"model": "big", "batch": 1, "fields": {"lr": 1}, "seeds": [1]}]}, "belongs to no model"),
        ({"repeats": [{"model": "small", "batch": 1, "fields": {"a": 1}, "seeds": [1]}]}, "swept over"),
        ({"design": "leaner"}, "grid and lean"),
        ({"budget_tokens": 10**6}, "for sweep.design=lean"),
        ({"target": {"batch": 1, "tokens": 1e9}}, "for sweep.design=lean"),
        ({"design": "lean", "schedules": {"cosine": {"lr": [0.1, 0.2, 0.4]}}}, "brackets one number"),
        ({"design": "lean", "schedules": {"wsd": {"lr": [0.1, 0.2]}}}, "takes three"),
        ({"design": "lean", "seeds": [0, 1]}, "one seed"),
        ({"design": "lean", "target": {"batch": 0, "tokens": 1e9}}, "above 0"),
        ({"design": "lean", "target": {"batch": 1}}, "target"),
        ({"design": "lean", "budget_tokens": 0}, "above 0"),
        ({"design": "lean", "target": 64}, "is written {batch: 64, tokens: 1e9}"),
        ({"design": "lean", "schedules": {"wsd": {"lr": [0, 0.1, 0.2]}}}, "above 0"),
        ({"design": "lean", "schedules": {"wsd": {"lr": [-0.1, 0.1, 0.2]}}}, "above 0"),
    ],
)
def test_a_sweep_that_cannot_be_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        plan(swept(**changes))


def test_a_horizon_that_a_refusal_recommends_is_not_refused() -> None:
    base, draw, recommended = swept(), random.Random(0), 0
    for _ in range(300):
        batch = [draw.randint(1, 64) / draw.choice([1, 8, 32, 64]) for _ in range(draw.randint(1, 3))]
        shares = {"batch": batch, "decay_fraction": draw.choice([0.1, 0.2, 0.125, 0.3333, 1 / 3, 0.07, 0.12345])}
        tokens = draw.randint(10**5, 10**8)
        try:
            plan(dataclasses.replace(base, **shares, tokens=[tokens], min_steps=1))
        except ConfigError as error:
            if found := re.search(r"for example ([\d,]+)", str(error)):
                recommended += 1
                plan(dataclasses.replace(base, **shares, tokens=[int(found[1].replace(",", ""))], min_steps=1))
            else:
                assert "fewer digits" in str(error)
    assert recommended > 200


# ---------------------------------------------------------------------------------------------------- what is run


def finish(trials: list[Trial], losses: Callable[[Trial], float | None]) -> tuple[list[Trial], Progress]:
    """Take ready trials until there is none; `losses` gives each one's result."""
    results: dict[str, dict[str, Any]] = {}
    order = []
    while ready := Progress(trials, results).ready():
        order.append(ready[0])
        loss = losses(ready[0])
        results[ready[0].name] = {"loss": loss, "status": "diverged" if loss is None else "finished"}
    return order, Progress(trials, results)


def test_two_rates_above_the_best_go_on_and_no_rate_below_is_given_up() -> None:
    # The best rate is the second of five: 0.01 0.02* 0.04 0.08 | 0.16 is given up after the first horizon.
    order, progress = finish(plan(swept(batch=[1])), lambda trial: abs(dict(trial.fields)["lr"] - 0.02))
    given_up = [(dict(t.fields)["lr"], t.tokens) for t in progress.trials if progress.skip_reason(t)]
    assert given_up == [(0.16, 819_200), (0.16, 1_638_400)]
    assert len(order) == 5 + 4 + 4
    assert not progress.open()


def test_a_diverged_rate_is_recorded_once_and_not_trained_further() -> None:
    order, progress = finish(plan(swept(batch=[1])), lambda t: None if dict(t.fields)["lr"] > 0.05 else 1.0)
    assert sum(dict(t.fields)["lr"] > 0.05 for t in order) == 2
    assert {progress.skip_reason(t) for t in progress.trials if dict(t.fields)["lr"] > 0.05 and t.tokens > 409_600} == {
        "diverged"
    }


def test_what_is_given_up_does_not_depend_on_the_order_of_work() -> None:
    trials = plan(swept())
    losses = {t.name: float(zlib.crc32(t.name.encode()) % 1000) for t in trials}
    done = {name: {"loss": loss, "status": "finished"} for name, loss in losses.items()}
    forward, _ = finish(trials, lambda t: losses[t.name])
    backward, _ = finish(list(reversed(trials)), lambda t: losses[t.name])
    assert {t.name for t in forward} == {t.name for t in backward}
    assert {t.name for t in trials if not Progress(trials, done).skip_reason(t)} == {t.name for t in forward}


def test_a_horizon_waits_for_the_whole_group_before_it() -> None:
    trials = plan(swept(batch=[1]))
    results = {t.name: {"loss": 1.0, "status": "finished"} for t in trials if t.tokens == 409_600}
    last = results.popitem()
    assert {t.tokens for t in Progress(trials, results).ready()} == {409_600}
    assert {t.tokens for t in Progress(trials, dict([*results.items(), last])).ready()} == {819_200}


def test_tokens_trained_are_those_behind_the_decay_of_the_horizon_before() -> None:
    sweep = swept(batch=[1])
    progress = Progress(plan(sweep), {})
    by_tokens = {t.tokens: progress.trained_tokens(sweep, t) for t in progress.trials}
    assert by_tokens == {409_600: 409_600, 819_200: 819_200 - 368_640, 1_638_400: 1_638_400 - 737_280}


# --------------------------------------------------------------------------------------------------------- trials


@pytest.fixture
def words_sweep(words: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    monkeypatch.setattr("powertrain.train.report.runs_page", lambda folders: "not drawn")

    def arguments(*more: str) -> list[str]:
        return [
            f"--config-dir={CONFIGS}",
            "+sweep=words",
            f"data.corpora.words.path={words}/*.txt",
            f"data.cache_dir={cache}",
            f"run.folder={tmp_path}",
            *more,
        ]

    return arguments


@pytest.mark.parametrize(
    ("more", "controller", "threads"),
    [
        (["threads=null", "sweep.jobs=3"], 1, "threads=2"),
        (["threads=null", "sweep.jobs=12"], 1, "threads=1"),
        (["threads=4", "sweep.jobs=3"], 1, None),  # as named
        (["threads=null", "sweep.jobs=3"], 0, None),  # a job of an array has a machine of its own
        (["threads=null", "sweep.jobs=3", "sweep.launcher=python"], 1, None),
    ],
)
def test_trials_at_once_share_the_cores(
    words_sweep: Callable[..., list[str]],
    monkeypatch: pytest.MonkeyPatch,
    more: list[str],
    controller: int,
    threads: str | None,
) -> None:
    started: list[tuple[Any, ...]] = []
    context = SimpleNamespace(Process=lambda target, args: started.append(args) or SimpleNamespace(start=lambda: None))
    monkeypatch.setattr(worker.multiprocessing, "get_context", lambda method: context)
    monkeypatch.setattr(worker, "available_cores", lambda: 8)
    sweep = Sweep(words_sweep(*more))
    worker.start(sweep, sweep.progress(), sweep.trials[0], io.StringIO(), controller)
    added = [argument for argument in started[0][1] if argument.startswith("threads=") and argument not in more]
    assert added == ([threads] if threads else [])


@pytest.mark.parametrize("schedule", ["wsd", pytest.param("power", marks=pytest.mark.slow)])
def test_a_trial_on_a_shared_trunk_equals_a_separate_run(
    words_sweep: Callable[..., list[str]], tmp_path: Path, schedule: str
) -> None:
    from powertrain.train.compose import composed
    from powertrain.train.run import train

    arguments = words_sweep()
    if schedule == "power":
        arguments += ["++sweep.schedules.power={a: [0.5], b: [-0.3]}"]
    sweep = Sweep(arguments)
    trunk = [
        t for t in sweep.trials if t.schedule == schedule and t.batch == 0.03125 and t.fields[0][1] in (0.016, 0.5)
    ]
    assert [t.tokens for t in trunk] == [1280, 2560, 5120]
    results: dict[str, dict[str, Any]] = {}
    for trial in trunk:
        start = begin_from(sweep, Progress(sweep.trials, results), trial)
        assert len(start) == (trial.tokens > 1280)
        train(composed([*arguments, *overrides(sweep.sweep, trial, sweep.settings), *start]), ["test"])
        results[trial.name] = {"loss": 1.0, "status": "finished"}
    apart = composed([*arguments, *overrides(sweep.sweep, trunk[-1], sweep.settings), "run.name=apart"])
    train(apart, ["test"])

    shared, alone = tmp_path / "words" / trunk[-1].name, tmp_path / "words" / "apart"
    for name in ("weights", "exp_avg", "exp_avg_sq"):
        ours, theirs = (load_file(f / "checkpoints" / "step-00000040" / f"{name}.safetensors") for f in (shared, alone))
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert read_lines(shared / "evals.jsonl") == read_lines(alone / "evals.jsonl")
    steps = without_timing(read_lines(shared / "metrics.jsonl"))
    assert steps == without_timing(read_lines(alone / "metrics.jsonl"))[-len(steps) :]
    assert len(steps) == 40 - 16  # it began where the decay of 2560 tokens did


def ledger(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "words" / "ledger.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


def sweep_process(arguments: list[str], **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "powertrain.launch.sweep", *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def run_sweep(arguments: list[str], **environment: str) -> str:
    process = sweep_process(arguments, **environment)
    said, _ = process.communicate(timeout=280)
    assert process.returncode == 0, said
    return said


def wait_for(folder: Path, steps: int) -> None:
    """Until the trials of a sweep have taken so many steps together."""
    for _ in range(1200):
        if sum(len(path.read_text().splitlines()) for path in folder.glob("words/*/metrics.jsonl")) >= steps:
            return
        time.sleep(0.1)
    raise AssertionError("the sweep does not get on")


@pytest.mark.slow
def test_a_killed_sweep_goes_on_and_a_job_array_gives_the_same_ledger(
    words_sweep: Callable[..., list[str]], tmp_path: Path
) -> None:
    def short(*more: str) -> list[str]:
        return words_sweep("sweep.batch=[0.03125]", *more)

    undisturbed = run_sweep(short(f"run.folder={tmp_path / 'whole'}"))
    whole = ledger(tmp_path / "whole")
    assert {line["status"] for line in whole} == {"finished"}
    assert {"family", "hidden_size", "parameters", "warmup_tokens", "data_fingerprint", "config"} <= whole[0].keys()
    assert "tokens trained where separate runs take" in undisturbed

    # ---- SIGKILL to everything, again and again, while a trial takes its steps
    arguments = short(f"run.folder={tmp_path / 'killed'}", "sweep.jobs=1", "checkpoint.every=2")
    for steps in (3, 25, 50):
        process = sweep_process(arguments)
        wait_for(tmp_path / "killed", steps)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    run_sweep(arguments)
    assert ledger(tmp_path / "killed") == whole

    # ---- SIGKILL to the controller alone: its workers and trials must not run on
    arguments = short(f"run.folder={tmp_path / 'orphaned'}")
    process = sweep_process(arguments)
    wait_for(tmp_path / "orphaned", 3)
    process.kill()
    process.wait()
    for _ in range(60):
        alive = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
        if str(tmp_path / "orphaned") not in alive:
            break
        time.sleep(0.5)
    else:
        raise AssertionError("something of the sweep still runs")
    run_sweep(arguments)
    assert ledger(tmp_path / "orphaned") == whole

    # ---- the same workers as an array of jobs: a stand-in that runs the tasks side by side, as sbatch --wait would
    stand_in = tmp_path / "bin" / "sbatch"
    stand_in.parent.mkdir()
    stand_in.write_text(
        "#!/usr/bin/env bash\n"
        'echo "$@" >> "$(dirname "$0")/calls"\n'
        "[[ $1 == --wait && $2 == --array=0-1 ]] || exit 9\n"
        "shift 2; script=$1; shift\n"
        'for task in 0 1; do SLURM_ARRAY_TASK_ID=$task bash "$script" "$@" & done; wait\n'
    )
    stand_in.chmod(stand_in.stat().st_mode | stat.S_IXUSR)
    python = f"{stand_in.parent}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    launcher = f"sweep.launcher={sys.executable}"  # trials by a launcher, not forked from the worker
    run_sweep([*short(f"run.folder={tmp_path / 'array'}", launcher), "--slurm"], PATH=python)
    assert (stand_in.parent / "calls").exists()
    assert ledger(tmp_path / "array") == whole

    # ---- from the ledger alone nothing is trained again; a longer horizon begins from scratch and gives what it would
    again = tmp_path / "again"
    (again / "words").mkdir(parents=True)
    kept = [line for line in whole if line["tokens"] < 5120]
    text = "".join(json.dumps({**line, "seconds": 1.0}) + "\n" for line in kept)
    (again / "words" / "ledger.jsonl").write_text(text)
    run_sweep(short(f"run.folder={again}"))
    assert ledger(again) == whole
    assert not (again / "words" / kept[0]["trial"]).exists()


def test_mistakes_are_told_before_anything_is_trained(
    words_sweep: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*arguments: str) -> str:
        with pytest.raises(SystemExit) as ended:
            main(list(arguments))
        assert ended.value.code == 2
        said = capsys.readouterr().err
        assert said.startswith("powertrain: ") and "Traceback" not in said
        return said

    assert "+sweep=NAME" in refused(*words_sweep()[:1], "+experiment=tiny")
    assert "There is no 'nothing'" in refused(*words_sweep()[:1], "+sweep=nothing")
    assert "between two steps" in refused(*words_sweep("sweep.tokens=[1300]"))
    assert "no whole number of sequences" in refused(*words_sweep("sweep.batch=[0.0009765625]", "sweep.min_steps=1"))
    said = refused(*words_sweep("sweep.batch=[0.05,0.1]", "sweep.tokens=[61_500,123_000]"))
    assert "204.8 tokens, no whole number of sequences of 32" in said and "near it lie 0.046875 and 0.0546875." in said
    assert "no such program" in refused(*words_sweep("sweep.launcher=nothing-of-that-name --processes 2"))
    assert "warmup" in refused(*words_sweep("schedule.warmup_tokens=1200"))
    assert "hidden_sise" in refused(*words_sweep("++sweep.models.dense={hidden_sise: 32}"))
    said = refused(*words_sweep("sweep.decay_fraction=0.1"))
    assert "has 10 steps, and sweep.decay_fraction=0.1" in said and "Raise sweep.min_steps to 20" in said
    assert "start at nothing" in refused(*words_sweep("run.tokens_seen=10"))
    assert not (tmp_path / "words").exists()


def test_a_ledger_keeps_what_others_have_written(words_sweep: Callable[..., list[str]], tmp_path: Path) -> None:
    sweep = Sweep(words_sweep())
    name, other = (sweep.trials[i].name for i in (0, 1))
    foreign = [
        b'{"trial": "mine",   "note": "\xff"}',
        b'{"hidden_size": 8, "batch": 1, "lr": 0.1, "tokens": 10, "loss": 2.5}',
        b'{"trial": ["a", "list"], "loss": 1}',
        b'{"trial": "of another sweep", "loss": 1.5}',
        b"[" * 100_000,
        b"not JSON",
        b"[1]",
        b'{"trial": "%s", "loss": "low"}' % other.encode(),  # no result: it is to be trained
        b'{"trial": "%s", "loss": null, "seconds": "many"}' % other.encode(),
    ]
    own = {"trial": name, "loss": 3.5}
    sweep.folder.mkdir()
    sweep.ledger.write_bytes(
        b"\n".join([foreign[0], json.dumps(own).encode(), *foreign[1:], b'{"trial": "torn', b""][:-1])
    )
    progress = write_ledger(sweep)
    assert sorted(progress.results) == sorted({name, other, "of another sweep"})
    kept = [line for line in foreign if other.encode() not in line]
    done = [json.dumps(own).encode(), b'{"trial": "%s", "loss": null, "seconds": "many"}' % other.encode()]
    assert sweep.ledger.read_bytes().splitlines() == [*kept, *done]
    assert write_ledger(sweep).results == progress.results
    assert summary(sweep, progress).startswith("2 of ")


def test_a_result_of_another_shape_is_none(words_sweep: Callable[..., list[str]]) -> None:
    sweep = Sweep(words_sweep())
    folder = sweep.folder / sweep.trials[0].name
    folder.mkdir(parents=True)
    for text in ("[]", "{}", '{"trial": 1, "loss": 2}', '{"trial": "x", "loss": true}', "[" * 100_000, '{"loss": 1}'):
        (folder / "result.json").write_text(text)
        assert not sweep.progress().results
    (folder / "result.json").write_bytes(b"\xff")
    assert not sweep.progress().results
    for name, text in (("exit.json", "[1]"), ("run.json", "[1]"), ("evals.jsonl", '{"step": 1, "corpus": 2}\n')):
        (folder / name).write_text(text)
    with pytest.raises(RunFailed, match="Move that folder away"):
        result(sweep, sweep.trials[0], "finished", 1.0)


def test_the_result_of_a_trial_is_the_loss_of_its_weights_not_of_their_average(
    words_sweep: Callable[..., list[str]],
) -> None:
    sweep = Sweep(words_sweep())
    folder = sweep.folder / sweep.trials[0].name
    train_trial(words_sweep("average.window=0.5"), sweep.trials[0])
    lines = [line for line in read_lines(folder / "evals.jsonl") if line["corpus"] == "overall"]
    losses = {line["weights"]: line["loss"] for line in lines}
    told = json.loads((folder / "result.json").read_text())["loss"]
    assert told == losses["raw"] != losses["average"]


def train_trial(arguments: list[str], trial: Trial, *more: str) -> Sweep:
    """One trial as a worker does it, in this process."""
    from powertrain.train.compose import composed
    from powertrain.train.run import train

    sweep = Sweep(arguments)
    start = begin_from(sweep, sweep.progress(), trial)
    train(composed([*arguments, *overrides(sweep.sweep, trial, sweep.settings), *start, *more]), ["test"])
    (sweep.folder / trial.name / "result.json").write_text(json.dumps(result(sweep, trial, "finished", 1.0)))
    return sweep


@pytest.mark.slow
def test_a_trial_of_another_configuration_is_refused(
    words_sweep: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = train_trial(words_sweep(), Sweep(words_sweep()).trials[0])
    by_itself = sweep.folder / sweep.trials[0].name / "result.json"
    for known_from in ("result", "ledger"):
        if known_from == "ledger":
            write_ledger(sweep)
            by_itself.unlink()
        for change, said in (
            ("optimizer.weight_decay=0.2", "weight_decay': 0.1}, and now {'optimizer.weight_decay': 0.2"),
            ("sweep.decay_fraction=0.3", "another decay_fraction: 0.2, and now 0.3"),
            ("evaluation.sequences=4", "evaluation_sequences"),
            ("schedule.warmup_tokens=600", "another warmup_tokens: 700, and now 600"),
            ("data.corpora.words.validation_fraction=0.3", "another data_fingerprint"),
        ):
            capsys.readouterr()
            with pytest.raises(SystemExit) as ended:
                main(words_sweep(change))
            told = capsys.readouterr().err
            assert ended.value.code == 2 and said in told, (known_from, change, told)


def test_a_ledger_of_an_earlier_version_lacks_settings_that_are_newer(words_sweep: Callable[..., list[str]]) -> None:
    """They count as their defaults: the trial was trained without them. Any other value is another configuration."""
    sweep = Sweep(words_sweep("++sweep.schedules.power={a: [0.5], b: [-0.3]}"))
    trial = next(trial for trial in sweep.trials if trial.schedule == "power")
    key = trial.model, trial.schedule
    config = sweep.configs()[key]
    known = {"data_fingerprint": "same", "decay_fraction": sweep.sweep.decay_fraction, **in_common(config)}
    for group, setting in (
        ("model", "shared_intermediate_size"),
        ("optimizer", "eps"),
        ("balance", "pool"),
        ("schedule", "cap"),
    ):
        del known["config"][group][setting]
    sweep.progress = lambda: SimpleNamespace(results={trial.name: known})  # type: ignore[assignment, return-value]
    check_ledger(sweep, {key: config}, {key: ["same", "same"]})
    config.model.shared_intermediate_size = 8
    with pytest.raises(ConfigError, match=r"'model.shared_intermediate_size': 0}, and now .*: 8}"):
        check_ledger(sweep, {key: config}, {key: ["same", "same"]})


def test_fault_18_a_ledger_has_the_fingerprint_of_an_earlier_version(words_sweep: Callable[..., list[str]]) -> None:
    """Of a large corpus, a sample of which was hashed when the ledger was written."""
    sweep = Sweep(words_sweep())
    trial = sweep.trials[0]
    key = trial.model, trial.schedule
    config = sweep.configs()[key]
    known = {"data_fingerprint": "sampled", "decay_fraction": sweep.sweep.decay_fraction, **in_common(config)}
    sweep.progress = lambda: SimpleNamespace(results={trial.name: known})  # type: ignore[assignment, return-value]
    for fingerprint, fits in (("sampled", True), ("whole", True), ("another", False)):
        known["data_fingerprint"] = fingerprint
        with contextlib.nullcontext() if fits else pytest.raises(ConfigError, match="another data_fingerprint"):
            check_ledger(sweep, {key: config}, {key: ["whole", "sampled"]})


@pytest.mark.slow
def test_a_trial_begins_further_back_when_the_trunk_is_damaged(words_sweep: Callable[..., list[str]]) -> None:
    arguments = words_sweep()
    first, second, third = (t for t in Sweep(arguments).trials if t.batch == 0.03125 and t.fields[0][1] == 0.016)
    train_trial(arguments, first)
    sweep = train_trial(arguments, second)
    (start,) = begin_from(sweep, sweep.progress(), third)
    assert second.name in start
    weights = sweep.folder / second.name / "checkpoints" / "step-00000016" / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    (start,) = begin_from(sweep, sweep.progress(), third)
    assert first.name in start and "step-00000008" in start


def test_the_users_own_start_of_a_decay_does_not_beat_the_sweeps(words_sweep: Callable[..., list[str]]) -> None:
    from powertrain.train.compose import composed

    arguments = words_sweep("+schedule.decay.start=1024")
    sweep = Sweep(arguments)
    trial = next(t for t in sweep.trials if t.tokens == 2560)
    schedule = composed([*arguments, *overrides(sweep.sweep, trial, sweep.settings)]).make_schedule()
    assert getattr(schedule, "decay").start == 2048  # noqa: B009


def test_a_failed_trial_keeps_nobody_else_from_going_on() -> None:
    trials = plan(swept(batch=[1]))
    broken = trials[2]
    shortest = [t for t in trials if t.tokens == 409_600 and t != broken]
    results = {t.name: {"loss": -dict(t.fields)["lr"], "status": "finished"} for t in shortest}
    ready = Progress(trials, results, {broken.name}).ready()
    assert {t.fields for t in ready} == {t.fields for t in trials} - {broken.fields}
    assert broken in Progress(trials, results).ready()  # the next start asks it again


def test_train_takes_the_settings_of_a_sweep(words_sweep: Callable[..., list[str]]) -> None:
    """A trial's own command, which its output and run.json show, can be given again by hand."""
    from powertrain.train.compose import composed

    sweep = Sweep(words_sweep())
    config = composed([*words_sweep(), *overrides(sweep.sweep, sweep.trials[0], sweep.settings)])
    assert config.schedule["lr"] == 0.004 and config.run.tokens == 1280
    assert dataclasses.is_dataclass(config)
