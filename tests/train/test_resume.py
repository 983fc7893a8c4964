"""A run that is stopped goes on as if it had not been: bit for bit, and only with settings that allow it."""

from __future__ import annotations

import copy
import ctypes
import errno
import io
import itertools
import json
import os
import platform
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import assert_same_run, cut_at, tiny_overrides, train_here, without_timing
from omegaconf import OmegaConf
from safetensors.torch import load_file

from powertrain.data.files import sha256
from powertrain.data.tokens import TokenFile
from powertrain.train import checkpoint
from powertrain.train.config import RampConfig
from powertrain.train.errors import ConfigError
from powertrain.train.track import read_lines

# attention dropout makes the random state matter; 12 steps of 256 tokens, warmup to 700, decay from 2304.
SETTINGS = ("model.attention_dropout=0.1", "checkpoint.every=1", "checkpoint.keep=20")


@pytest.fixture(scope="module")
def whole(request: pytest.FixtureRequest, words: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run with every checkpoint kept."""
    folder = tmp_path_factory.mktemp("whole")
    return train_here(tiny_overrides(words, cache, folder, "run.name=whole", *SETTINGS))


@pytest.fixture
def go_on(whole: Path, tiny: Callable[..., list[str]], tmp_path: Path) -> Callable[..., Path]:
    """Cut the undisturbed run at a step and go on in this process, with more overrides."""

    def resumed(step: int, *more: str, prepare: Callable[[Path], None] | None = None) -> Path:
        from powertrain.train.compose import composed
        from powertrain.train.run import train

        copy = cut_at(whole, step, f"cut-{tmp_path.name}")
        folder = tmp_path / "cut"
        shutil.move(copy, folder)
        if prepare:
            prepare(folder)
        torch.manual_seed(999)  # what a new process would not have either
        train(composed(tiny("run.name=cut", *SETTINGS, *more)), ["test"])
        return folder

    return resumed


@pytest.mark.parametrize("step", [1, 2, 6, 9, 11])  # warmup, its end, trunk, decay, second epoch of the text
def test_fault_01_going_on_is_bit_for_bit(whole: Path, go_on: Callable[..., Path], step: int) -> None:
    assert_same_run(whole, go_on(step))


def test_the_cut_crosses_an_epoch(whole: Path) -> None:
    # What this run says of its text: the folder of prepared corpora is shared with other tests' tokenizers.
    tokens = json.loads((whole / "run.json").read_text())["starts"][0]["data"]["words"]["tokens"]
    assert 8 < (tokens - 1) // 32 < 96  # 12 steps of 8 sequences are more than one epoch


@pytest.mark.parametrize(
    "item",
    ["weights", "exp_avg", "exp_avg_sq", "optimizer_steps", "assignments", "step", "samples", "tokens", "rng"],
)
def test_fault_02_leaving_out_one_saved_item_shows(
    whole: Path, go_on: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, item: str
) -> None:
    monkeypatch.setattr(checkpoint, "defects", lambda path: [])

    def forget(folder: Path) -> None:
        path = folder / "checkpoints/step-00000006"
        if item in ("weights", "exp_avg", "exp_avg_sq"):
            first = next(iter(load_file(path / "weights.safetensors")))
            tensors = load_file(path / f"{item}.safetensors")
            tensors[first] = torch.zeros_like(tensors[first])
            checkpoint._save_tensors(tensors, path / f"{item}.safetensors")
        elif item == "rng":
            (path / "rng/rank-00000.safetensors").unlink()
        else:
            state = json.loads((path / "state.json").read_text())
            if item == "optimizer_steps":
                state["optimizer_steps"] = 1
            elif item == "assignments":
                state["assignments"] = [[0] * 4] * 2
            else:
                state["state"][item] = 0
            (path / "state.json").write_text(json.dumps(state))

    with pytest.raises((AssertionError, ConfigError)):
        assert_same_run(whole, go_on(6, prepare=forget))


def test_fault_10_steps_skipped_before_the_cut_still_count(
    go_on: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from powertrain.train.engine import Engine
    from powertrain.train.errors import RunFailed

    def nine(folder: Path) -> None:
        path = folder / "checkpoints/step-00000006/state.json"
        saved = json.loads(path.read_text())
        saved["state"]["skipped_in_a_row"] = 9
        path.write_text(json.dumps(saved))

    original = Engine.backward
    monkeypatch.setattr(checkpoint, "defects", lambda path: [])
    monkeypatch.setattr(Engine, "backward", lambda self, loss: original(self, loss * float("nan")))
    with pytest.raises(RunFailed, match="10 steps in a row, up to step 7"):
        go_on(6, prepare=nine)


# ------------------------------------------------------------------------------------------- damaged checkpoints


def test_fault_04_the_newest_valid_checkpoint_is_used(
    whole: Path, go_on: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    def flip_a_bit(folder: Path) -> None:
        path = folder / "checkpoints/step-00000006/exp_avg.safetensors"
        data = bytearray(path.read_bytes())
        data[-5] ^= 1
        path.write_bytes(data)

    assert_same_run(whole, go_on(6, prepare=flip_a_bit))
    assert "exp_avg.safetensors differs from its SHA-256" in capsys.readouterr().out


@pytest.mark.parametrize("file", ["weights.safetensors", "state.json", "config.yaml", "manifest.json"])
def test_fault_04_without_a_valid_checkpoint_nothing_begins_again(go_on: Callable[..., Path], file: str) -> None:
    def truncate(folder: Path) -> None:
        path = folder / "checkpoints/step-00000001" / file
        path.write_bytes(path.read_bytes()[:-7])

    with pytest.raises(ConfigError, match=r"No checkpoint in .* is valid"):
        go_on(1, prepare=truncate)


@pytest.fixture
def as_a_user(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Permissions count, as they do not for root: without CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH."""
    libc, header, sets = ctypes.CDLL(None), (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    libc.capget(header, sets)
    effective = sets[0]
    sets[0] &= ~0b110
    libc.capset(header, sets)
    yield
    sets[0] = effective
    libc.capset(header, sets)


@pytest.mark.parametrize(
    "unreadable",
    [
        "step-00000006/manifest.json",
        "step-00000006/weights.safetensors",
        "step-00000006/state.json",
        "step-00000006/rng",
        "step-00000006",
        ".",
    ],
)
@pytest.mark.usefixtures("as_a_user")
def test_fault_04_what_may_not_be_read_is_not_what_is_damaged(
    go_on: Callable[..., Path], tmp_path: Path, unreadable: str
) -> None:
    checkpoints = tmp_path / "cut/checkpoints"

    def lock_away(folder: Path) -> None:
        (checkpoints / unreadable).chmod(0)

    with pytest.raises(ConfigError, match=r"cannot be read \(Permission denied\)") as refused:
        go_on(6, prepare=lock_away)
    assert "\n" not in str(refused.value)
    (checkpoints / unreadable).chmod(0o700)
    assert sorted(path.name for path in checkpoints.iterdir()) == [f"step-{step:08d}" for step in range(1, 7)]
    assert not (tmp_path / "cut/checkpoints/step-00000006.invalid").exists()
    assert json.loads((tmp_path / "cut/exit.json").read_text())["code"] == 2


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ENOENT, errno.EACCES, errno.EMFILE, errno.ETIMEDOUT])
@pytest.mark.parametrize("file", ["weights.safetensors", "manifest.json"])
def test_fault_04_what_says_that_bytes_are_lost(
    whole: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], file: str, number: int
) -> None:
    real = io.open

    def broken(path: Any, *arguments: Any, **keywords: Any) -> Any:
        if str(path).endswith(f"step-00000012/{file}"):
            raise OSError(number, os.strerror(number), str(path))
        return real(path, *arguments, **keywords)

    monkeypatch.setattr("io.open", broken)
    monkeypatch.setattr("builtins.open", broken)
    if number in (errno.EIO, errno.ESTALE, errno.ENOENT):
        newest = checkpoint.newest_valid(whole / "checkpoints")
        assert newest is not None and checkpoint.step_of(newest) == 11
        said = "is missing" if number == errno.ENOENT else f"cannot be read: {os.strerror(number)}"
        assert f"step-00000012 is not valid, trying the one before: {file} {said}." in capsys.readouterr().out
    else:
        with pytest.raises(ConfigError, match=re.escape(f"{file} cannot be read ({os.strerror(number)})")):
            checkpoint.newest_valid(whole / "checkpoints")


def test_fault_26_manifest_that_points_outside_is_refused(whole: Path, tmp_path: Path) -> None:
    path = tmp_path / "step-00000006"
    shutil.copytree(whole / "checkpoints/step-00000006", path)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"]["../outside"] = {"size": 0, "sha256": ""}
    (path / "manifest.json").write_text(json.dumps(manifest))
    assert checkpoint.defects(path) == ["../outside lies outside the checkpoint"]


def test_fault_23_an_old_checkpoint_that_cannot_be_removed_is_no_failed_save(
    run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(path: Path) -> None:
        if checkpoint.step_of(path) == 3:
            raise PermissionError(errno.EACCES, "Permission denied")
        shutil.rmtree(path)

    monkeypatch.setattr(checkpoint, "_remove", refuse)
    folder = run("checkpoint.every=3", "checkpoint.keep=1")
    assert [checkpoint.step_of(path) for path in checkpoint.available(folder / "checkpoints")] == [3, 12]
    assert json.loads((folder / "exit.json").read_text())["reason"] == "finished"
    said = capsys.readouterr().out
    assert said.count("step-00000003 cannot be removed, and takes space: Permission denied") == 1
    assert "could not be written" not in said


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "{}",
        "[" * 100_000,
        '{"state": {"step": "12"}}',
        '{"state": {"step": 12, "samples": 1, "tokens": 1%s}, "optimizer_steps": 1, "assignments": [], '
        '"data_fingerprint": {}}' % ("0" * 400),
        '{"state": {"step": 12}, "optimizer_steps": 1, "assignments": [["a"]], "data_fingerprint": {}}',
        '{"state": {"step": 12}, "optimizer_steps": 1, "assignments": [], "data_fingerprint": []}',
        '{"state": {"step": 12}, "optimizer_steps": 1, "assignments": [], "data_fingerprint": {}, "engine": "ddp"}',
    ],
)
def test_a_state_of_another_shape_is_one_paragraph(tmp_path: Path, text: str) -> None:
    """As an edited checkpoint with an edited manifest has it."""
    (tmp_path / "state.json").write_text(text)
    with pytest.raises(ConfigError, match="has been changed"):
        checkpoint.load_state(tmp_path)


def test_records_of_another_shape_stop_nothing(whole: Path, go_on: Callable[..., Path]) -> None:
    huge = b'{"step": 12, "tokens": 1' + b"0" * 400 + b"}"

    def edit(folder: Path) -> None:
        lines = (folder / "metrics.jsonl").read_bytes().splitlines()
        edited = [lines[0], b"{}", b'{"step": "2"}', *lines[1:], b'{"step": []}', huge]
        (folder / "metrics.jsonl").write_bytes(b"\n".join(edited))
        (folder / "evals.jsonl").write_bytes(b'{"step": 6, "corpus": ["overall"]}\n\xff\n{"step": 1e400}\n')
        (folder / "run.json").write_text('{"id": 4, "parent": 5, "starts": {"a": 1}}')
        (folder / "exit.json").write_text("[" * 100_000)
        (folder / checkpoint.SAVED).write_bytes(b"\xff")

    folder = go_on(6, prepare=edit)
    assert without_timing(read_lines(folder / "metrics.jsonl")) == without_timing(read_lines(whole / "metrics.jsonl"))
    assert "2 line(s) of metrics.jsonl cannot be read" in (folder / "report.html").read_text()
    assert (folder / "run.json.unreadable").exists()
    assert len(json.loads((folder / "run.json").read_text())["starts"]) == 1


@pytest.mark.parametrize("changed", [False, True])
def test_what_changes_the_rounding_between_starts_is_logged(
    whole: Path, go_on: Callable[..., Path], capsys: pytest.CaptureFixture[str], changed: bool
) -> None:
    record = json.loads((whole / "run.json").read_text())
    if changed:
        record["starts"][-1]["hardware"] |= {"kernels": ["flash_attention_2", "grouped_mm"], "machine": "z80"}

    go_on(6, prepare=lambda folder: (folder / "run.json").write_text(json.dumps(record)) and None)
    said = " ".join(capsys.readouterr().out.split())
    assert ("kernels flash_attention_2, grouped_mm → " in said) is changed
    assert (f"; machine z80 → {platform.machine()}: sums may be rounded differently" in said) is changed
    assert ("sums may be rounded" in said) is changed


def test_fault_23_only_own_checkpoints_are_pruned_and_enough_are_kept(run: Callable[..., Path], tmp_path: Path) -> None:
    strange = tmp_path / "tiny/checkpoints/step-00000001-backup"
    strange.mkdir(parents=True)
    folder = run("checkpoint.every=2", "checkpoint.keep=3")
    names = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert names == ["step-00000001-backup", "step-00000008", "step-00000010", "step-00000012"]


# ------------------------------------------------------------------------------------------------ changed settings


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("run.seed=1", "run.seed: 0 → 1"),
        ("model.rope_theta=500", "model.rope_theta"),
        ("optimizer.weight_decay=0.2", "optimizer.weight_decay: 0.1 → 0.2"),
        ("balance.scope=micro", "balance.scope: lagged → micro"),
        ("mup.rule=fan_in", "mup.rule"),
        ("precision=bf16", "precision: fp32 → bf16"),
        ("run.tokens_seen=5", "run.tokens_seen"),
        ("schedule.a=3", "Step 2 was taken at the learning rate"),
        ("schedule.warmup_tokens=701", "Step 2 was taken at the learning rate"),
        ("batch.sequences=16", "Step 1 was taken with a batch of 8 sequences and would now have had 16"),
        ("batch.ramp=[{from_tokens: 512, sequences: 16}]", "Step 3 was taken with a batch of 8"),
        ("data.stages=[{from_tokens: 512, mixture: {words: 2}}]", "48 sequences were drawn by other mixtures"),
        ("data.corpora.words.validation_fraction=0.3", "The corpus 'words' was described otherwise"),
    ],
)
def test_fault_17_a_change_to_what_is_trained_is_refused(go_on: Callable[..., Path], change: str, named: str) -> None:
    with pytest.raises(ConfigError) as refused:
        go_on(6, change)
    assert named in str(refused.value)


@pytest.mark.parametrize(
    "change",
    [
        "run.tokens=4096",
        "batch.micro_sequences=2",
        "evaluation.every=1",
        "schedule.decay.tokens=512",
        "schedule.decay.shape=linear",
        "batch.ramp=[{from_tokens: 1536, sequences: 12}]",
        "data.stages=[{from_tokens: 1536, mixture: {words: 2}}]",
    ],
)
def test_fault_17_a_change_ahead_passes_and_is_recorded(
    go_on: Callable[..., Path], whole: Path, change: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = go_on(6, change)
    said = " ".join(capsys.readouterr().out.split())
    assert ("Warning: batch.micro_sequences 4 → 2: " in said) == (change == "batch.micro_sequences=2")  # with dropout
    start = json.loads((folder / "run.json").read_text())["starts"][-1]
    assert start["from"].endswith("step-00000006")
    name = change.partition("=")[0]
    assert f"differ from the checkpoint's, from here on: {name}" in said
    assert any(setting.startswith(name) for setting in start["changed_settings"])
    before = without_timing(read_lines(whole / "metrics.jsonl"))[:6]
    assert without_timing(read_lines(folder / "metrics.jsonl"))[:6] == before


def test_what_another_split_of_the_batch_changes_is_said(
    whole: Path, tiny: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    from powertrain.train import resume
    from powertrain.train.compose import composed

    path = whole / "checkpoints/step-00000006"
    config = composed(tiny())

    def said(scope: str, dropout: float, before: int, micro: int, ranks: int) -> str:
        config.balance.scope, config.model.attention_dropout, config.batch.micro_sequences = scope, dropout, before
        then = copy.deepcopy(config)
        monkeypatch.setattr(resume, "load", lambda path: then)
        config.batch.micro_sequences = micro
        return resume.why_losses_differ(path, config, ranks) or ""

    for micro, ranks in itertools.product((2, 4), (1, 2)):  # 4 on one rank before, of batches of 8
        split = (micro, ranks) != (4, 1)
        for scope in ("lagged", "accumulated", "dp", "micro"):
            counted = {"lagged": False, "micro": micro != 4}.get(scope, split)
            assert (f"balance.scope={scope}" in said(scope, 0.0, 4, micro, ranks)) == counted
            assert ("dropout" in said(scope, 0.1, 4, micro, ranks)) == split
    assert "batch.micro_sequences 4 → 2, ranks 1 → 2: " in said("dp", 0.0, 4, 2, 2)
    assert resume.changes(path, config, 2) == {"batch.micro_sequences": [4, 2], "ranks": [1, 2]}
    # The whole batch in one forward pass is that on any number of ranks, as long as it does not grow.
    assert said("dp", 0.0, 8, 4, 2) == ""
    config.batch.ramp = [RampConfig(2048, 16)]
    assert "dp" in said("dp", 0.0, 8, 4, 2)


def test_fault_17_going_on_after_a_decay_began_needs_a_rewarmup(go_on: Callable[..., Path]) -> None:
    with pytest.raises(ConfigError, match=r"The decay had begun.*schedule.rewarmup.start=2816"):
        go_on(11, "run.tokens=6144")


def test_rewarmup_after_a_decay(go_on: Callable[..., Path]) -> None:
    folder = go_on(11, "run.tokens=6144", "schedule.rewarmup.start=2816", "schedule.rewarmup.tokens=1024")
    rates = {line["tokens"]: line["lr"] for line in read_lines(folder / "metrics.jsonl")}
    assert rates[2816] == 0
    assert rates[2816 + 512] < rates[2816 + 768] < rates[2816 + 1024]
    assert rates[2816 + 1024] == 4 * 0.0625 * (2816 + 1024) ** -0.51  # back on the trunk
    assert max(rates) == 6144 - 256


def test_a_raised_budget_goes_on_without_a_jump(go_on: Callable[..., Path]) -> None:
    folder = go_on(9, "run.tokens=4096")  # 2304 tokens: the decay would have begun with the next step
    rates = {line["tokens"]: line["lr"] for line in read_lines(folder / "metrics.jsonl")}
    for n in range(1024, 4096 - 768, 256):
        assert rates[n] == 4 * 0.0625 * n**-0.51


def test_a_budget_below_what_is_trained_is_refused_and_nothing_of_the_run_changes(go_on: Callable[..., Path]) -> None:
    with pytest.raises(ConfigError, match=r"run\.tokens=1,024 ends at 1,024 tokens, and 2,304 are trained already"):
        go_on(9, "run.tokens=1024", "schedule.decay.tokens=0")


def test_fault_18_changed_bytes_of_a_corpus_are_noticed(
    go_on: Callable[..., Path], words: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(words, other)
    (other / "00.txt").write_text("quite another text " * 9)

    def move_the_text(folder: Path) -> None:
        for path in (folder / "checkpoints").glob("step-*"):
            config = (path / "config.yaml").read_text().replace(str(words), str(other))
            (path / "config.yaml").write_text(config)
            manifest = json.loads((path / "manifest.json").read_text())
            manifest["files"]["config.yaml"] = {
                "size": (path / "config.yaml").stat().st_size,
                "sha256": sha256(path / "config.yaml"),
            }
            (path / "manifest.json").write_text(json.dumps(manifest))

    with pytest.raises(ConfigError, match="The tokens of the corpus 'words' are not those"):
        go_on(6, f"data.corpora.words.path={other}/*.txt", prepare=move_the_text)


def test_fault_18_the_fingerprint_of_an_earlier_version(
    go_on: Callable[..., Path], whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A large corpus, of which a sample was hashed when the checkpoint was written."""
    monkeypatch.setattr("powertrain.data.tokens.BLOCK", 64)
    monkeypatch.setattr("powertrain.data.tokens.SAMPLED_BLOCKS", 4)

    def written_then(value: Callable[[str], str]) -> Callable[[Path], None]:
        def change(folder: Path) -> None:
            for path in (folder / "checkpoints").glob("step-*"):
                state = json.loads((path / "state.json").read_text())
                state["data_fingerprint"]["words"] = value(state["data_fingerprint"]["words"])
                (path / "state.json").write_text(json.dumps(state))
                manifest = json.loads((path / "manifest.json").read_text())
                manifest["files"]["state.json"] = {
                    "size": (path / "state.json").stat().st_size,
                    "sha256": sha256(path / "state.json"),
                }
                (path / "manifest.json").write_text(json.dumps(manifest))

        return change

    def sampled(fingerprint: str) -> str:
        cache = Path(OmegaConf.load(whole / "config.yaml").data.cache_dir)
        files = [TokenFile(path.with_suffix("")) for path in cache.glob("words-*/train.bin")]
        return next(file for file in files if file.fingerprint() == fingerprint).sampled_fingerprint()

    shutil.rmtree(go_on(6, prepare=written_then(sampled)))
    with pytest.raises(ConfigError, match="The tokens of the corpus 'words' are not those"):
        go_on(6, prepare=written_then(lambda _: "0" * 64))


# ------------------------------------------------------------------------------------------------------ stopping


def test_never_refuses_an_earlier_run(go_on: Callable[..., Path]) -> None:
    with pytest.raises(ConfigError, match="holds checkpoints of an earlier run"):
        go_on(6, "run.resume=never")


def test_fault_07_the_file_stop_stops_and_the_run_goes_on(
    whole: Path, run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from powertrain.train.track import Tracker

    original = Tracker.step

    def stop_at_5(self: Tracker, record: dict[str, Any]) -> None:
        original(self, record)
        if record["step"] == 5:
            (tmp_path / "tiny/stop").touch()

    monkeypatch.setattr(Tracker, "step", stop_at_5)
    folder = run(*SETTINGS[:1], "checkpoint.keep=20", "run.name=tiny")
    assert [path.name for path in checkpoint.available(folder / "checkpoints")] == ["step-00000005"]
    monkeypatch.setattr(Tracker, "step", original)
    run(*SETTINGS)
    assert_same_run(whole, folder)


def test_an_evaluation_that_a_stop_came_before_is_made_up_for(
    run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from powertrain.train.track import Tracker

    settings, original = ("evaluation.every=4", "schedule.decay.tokens=0"), Tracker.step

    def stop_at_4(self: Tracker, record: dict[str, Any]) -> None:
        original(self, record)
        if record["step"] == 4:
            (tmp_path / "stopped/stop").touch()

    whole = read_lines(run("run.name=whole", *settings) / "evals.jsonl")
    assert [line["step"] for line in whole][::2] == [0, 4, 8, 12]
    monkeypatch.setattr(Tracker, "step", stop_at_4)
    run("run.name=stopped", *settings)
    monkeypatch.setattr(Tracker, "step", original)
    evaluations = run("run.name=stopped", *settings) / "evals.jsonl"
    assert read_lines(evaluations) == whole
    assert len(evaluations.read_text().splitlines()) == 8  # none of them twice


def test_a_finished_run_only_says_so(
    go_on: Callable[..., Path], whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = go_on(12)
    said = " ".join(capsys.readouterr().out.split())
    assert "The run had finished" in said and "validation loss" in said and str(folder / "model") in said
    assert read_lines(folder / "evals.jsonl") == read_lines(whole / "evals.jsonl")
    assert len((folder / "evals.jsonl").read_text().splitlines()) == 2
    cards = [(run / "model/README.md").read_text().replace(f"# {run.name}", "#") for run in (folder, whole)]
    assert cards[0] == cards[1]


def test_a_finished_run_is_evaluated_again_when_that_is_asked_for(go_on: Callable[..., Path], whole: Path) -> None:
    before = read_lines(whole / "evals.jsonl")
    after = read_lines(go_on(12, "evaluation.sequences=2") / "evals.jsonl")
    assert [line["step"] for line in after] == [line["step"] for line in before]
    assert after[-1]["targets"] < before[-1]["targets"]


# ------------------------------------------------------------------------------------- what a run must not lose


def flip_last_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_fault_23_an_invalid_checkpoint_does_not_count_among_those_kept(go_on: Callable[..., Path]) -> None:
    def damage(folder: Path) -> None:
        flip_last_byte(folder / "checkpoints/step-00000009/weights.safetensors")
        for path in checkpoint.available(folder / "checkpoints")[:5]:
            shutil.rmtree(path)

    folder = go_on(9, "checkpoint.keep=2", "run.tokens=2304", "schedule.decay.tokens=0", prepare=damage)
    found = checkpoint.available(folder / "checkpoints")
    assert [path.name for path in found] == ["step-00000008", "step-00000009"]
    assert not any(checkpoint.defects(path) for path in found)
    assert (folder / "checkpoints/step-00000009.invalid").is_dir()


def test_a_damaged_last_checkpoint_is_written_anew(whole: Path, go_on: Callable[..., Path]) -> None:
    folder = go_on(12, prepare=lambda copy: flip_last_byte(copy / "checkpoints/step-00000012/weights.safetensors"))
    assert checkpoint.defects(folder / "checkpoints/step-00000012") == []
    assert_same_run(whole, folder)


def test_a_refused_start_leaves_the_records_of_the_run(whole: Path, go_on: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        go_on(6, "run.seed=1")
    for name in ("config.yaml", "run.json", "tokenizer/tokenizer.json", "metrics.jsonl"):
        assert (tmp_path / "cut" / name).read_bytes() == (whole / name).read_bytes(), name
    assert "seed: 0" in (tmp_path / "cut/config.yaml").read_text()
    assert len(json.loads((tmp_path / "cut/run.json").read_text())["starts"]) == 1


def test_another_tokenizer_is_refused(go_on: Callable[..., Path], tmp_path: Path) -> None:
    from tokenizers import normalizers
    from transformers import AutoTokenizer

    def other_tokenizer(folder: Path) -> None:
        tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
        tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()  # the text has lower case only: same tokens
        tokenizer.save_pretrained(tmp_path / "other")

    with pytest.raises(ConfigError, match="The tokenizer is not the one"):
        go_on(6, f"data.tokenizer.path={tmp_path}/other", prepare=other_tokenizer)


def test_metrics_after_the_checkpoint_are_dropped(go_on: Callable[..., Path]) -> None:
    folder = go_on(6, "run.tokens=2048", "schedule.decay.tokens=0")  # metrics.jsonl was of 12 steps
    assert [line["step"] for line in read_lines(folder / "metrics.jsonl")] == list(range(1, 9))


def test_a_start_before_any_checkpoint_leaves_no_tokenizer_behind(
    tiny: Callable[..., list[str]], run: Callable[..., Path], tmp_path: Path
) -> None:
    run()
    shutil.rmtree(tmp_path / "tiny/checkpoints")  # as if it had been killed before the first
    (tmp_path / "tiny/.saved").unlink()
    folder = run("data.tokenizer.vocab_size=280")
    for name in ("tokenizer", "model"):
        vocabulary = json.loads((folder / name / "tokenizer.json").read_text())["model"]["vocab"]
        assert len(vocabulary) == 280, name


def test_a_branch_by_path_keeps_its_parents_tokenizer(run: Callable[..., Path]) -> None:
    trunk = run("run.name=trunk", "checkpoint.every=6", "data.tokenizer.vocab_size=280")
    branch = run("run.name=branch", f"run.resume={trunk}/checkpoints/step-00000006")
    paths = [folder / "model/tokenizer.json" for folder in (trunk, branch)]
    assert paths[0].read_bytes() == paths[1].read_bytes()
