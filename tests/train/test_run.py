"""Whole runs of a tiny model: what they write, and that the parts agree with each other."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import launch, without_timing
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from powertrain.schedulers import Decay, Power
from powertrain.train.errors import ConfigError
from powertrain.train.track import read_lines


def test_a_run_leaves_everything_and_learns(run: Callable[..., Path]) -> None:
    folder = run("run.tokens=15360", "schedule.decay.tokens=1536", "evaluation.every=20", "sample_prompt=ab")
    for name in ("config.yaml", "run.json", "metrics.jsonl", "evals.jsonl", "report.html", "model/config.json"):
        assert (folder / name).is_file(), name
    lines = read_lines(folder / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, 61))
    evals = [line["loss"] for line in read_lines(folder / "evals.jsonl") if line["corpus"] == "overall"]
    assert len(evals) == 4  # before the first step, after 20 and 40, at the end
    assert evals[-1] < evals[1] < 5.7 < evals[0]  # log(300): a uniform guess
    assert json.loads((folder / "run.json").read_text())["starts"][0]["versions"]["torch"] == torch.__version__


def test_a_run_without_export_ends_with_its_checkpoint(
    run: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """As a sweep's trials do. The same command with it writes what is missing, and trains nothing again."""
    folder = run("run.export=false")
    said = " ".join(capsys.readouterr().out.split())
    assert "ends without its model and report" in said and "earlier export" not in said
    assert not (folder / "model").exists() and not (folder / "report.html").exists()
    assert (folder / "checkpoints" / "step-00000012" / "manifest.json").is_file()
    records = [(folder / name).read_bytes() for name in ("metrics.jsonl", "evals.jsonl")]
    assert run() == folder and (folder / "model" / "config.json").is_file() and (folder / "report.html").is_file()
    assert records == [(folder / name).read_bytes() for name in ("metrics.jsonl", "evals.jsonl")]
    run("run.export=false")
    assert "model/ in it is an earlier export" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(("threads", "load", "told"), [("null", 9.0, True), ("null", 1.0, False), ("1", 9.0, False)])
def test_a_busy_machine_is_told_of_threads(
    run: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    threads: str,
    load: float,
    told: bool,
) -> None:
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 0.0, 0.0))
    monkeypatch.setattr("powertrain.train.engine.available_cores", lambda: 1)
    monkeypatch.setattr("powertrain.train.assemble.available_cores", lambda: 4)
    run("run.tokens=1536", "evaluation.every=0", "run.export=false", f"threads={threads}")
    said = " ".join(capsys.readouterr().out.split())
    assert "× cpu with 1 thread, " in said
    assert ("This machine is busy (load 9.0 on 4 cores)" in said) is told


def test_fault_14_the_rate_is_the_schedule_at_the_tokens_and_batch_of_each_line(run: Callable[..., Path]) -> None:
    folder = run("schedule.max_lr=0.5", "schedule.warmup_tokens=300")
    power = Power(max_lr=0.5, warmup_tokens=300, decay=Decay(start=3072 - 768, tokens=768))
    lines = read_lines(folder / "metrics.jsonl")
    assert [line["tokens"] for line in lines] == [256 * k for k in range(12)]
    for line in lines:
        assert line["batch"] == 8 * 32 / 4096
        assert line["lr"] == power(tokens=line["tokens"], batch=line["batch"])
        assert line["gamma"] == line["lr"] / line["batch"]
        assert line["lr_per_group"]["router"] == line["lr"] / 2  # m_width 2
        assert line["lr_per_group"]["embedding"] == line["lr"]
    assert [line["phase"] for line in lines] == ["warmup"] * 2 + ["trunk"] * 8 + ["decay"] * 2


def test_every_line_has_the_critical_batch_of_a_power_schedule_and_no_other(run: Callable[..., Path]) -> None:
    # 0.02 / (4 · n^-0.51), in the unit of `batch`, which is 1/16: below it from 141 tokens on.
    lines = read_lines(run("schedule.max_lr=0.02", "schedule.warmup_tokens=0") / "metrics.jsonl")
    assert [line["critical_batch"] for line in lines] == pytest.approx([0.005 * (256 * k) ** 0.51 for k in range(12)])
    trunk = [line for line in lines if line["phase"] == "trunk"]
    assert {line["at_cap"] for line in trunk} == {True, False}
    assert all(line["at_cap"] == (line["batch"] > line["critical_batch"]) for line in trunk)
    again = ("run.tokens=1024", "schedule.decay.tokens=0", "schedule.rewarmup.tokens=512")
    assert [line["critical_batch"] > 0 for line in read_lines(run(*again, "run.name=again") / "metrics.jsonl")][1:]
    flat = ("run.tokens=1024", "schedule.decay.tokens=0", "schedule.batch_exponent=0", "run.name=flat")
    assert not any("critical_batch" in line for line in read_lines(run(*flat) / "metrics.jsonl"))


def test_the_total_is_the_sum_of_its_terms(run: Callable[..., Path]) -> None:
    for line in read_lines(run("balance.router_z_loss_coef=0.5") / "metrics.jsonl"):
        assert line["loss"] == pytest.approx(line["lm_loss"] + 0.01 * line["balance_loss"] + 0.5 * line["z_loss"])


@pytest.mark.parametrize("micro", [1, 2, 8])
def test_micro_batches_only_split_the_batch(run: Callable[..., Path], micro: int) -> None:
    whole = read_lines(run() / "metrics.jsonl")
    split = read_lines(run(f"batch.micro_sequences={micro}", "run.name=split") / "metrics.jsonl")
    assert [line["lm_loss"] for line in split] == pytest.approx([line["lm_loss"] for line in whole], rel=1e-5)


@pytest.mark.slow
def test_two_ranks_follow_one_process(run: Callable[..., Path], tiny: Callable[..., list[str]]) -> None:
    alone = read_lines(run("run.name=alone") / "metrics.jsonl")
    done = launch(tiny("run.name=pair"), ranks=2)
    assert done.returncode == 0, done.stdout + done.stderr
    folder = Path(next(a for a in tiny() if a.startswith("run.folder")).partition("=")[2]) / "pair"
    pair = read_lines(folder / "metrics.jsonl")
    for one, two in zip(alone, pair, strict=True):
        for term in ("loss", "lm_loss", "balance_loss", "z_loss", "grad_norm"):
            assert two[term] == pytest.approx(one[term], rel=1e-5), (one["step"], term)
        assert one["lr"] == two["lr"]
        assert one["expert_load"] == two["expert_load"]
    assert json.loads((folder / "exit.json").read_text()) == {"code": 0, "reason": "finished", "step": 12}


def test_bf16_follows_fp32(run: Callable[..., Path]) -> None:
    fp32 = read_lines(run("run.name=fp32") / "metrics.jsonl")
    folder = run("run.name=bf16", "precision=bf16")
    bf16 = read_lines(folder / "metrics.jsonl")
    assert [line["lm_loss"] for line in bf16] == pytest.approx([line["lm_loss"] for line in fp32], rel=1e-2)
    weights = load_file(folder / "checkpoints/step-00000012/weights.safetensors")
    assert all(tensor.dtype == torch.float32 for tensor in weights.values())
    exported = AutoModelForCausalLM.from_pretrained(folder / "model")
    for name, parameter in exported.named_parameters():
        assert torch.equal(parameter, weights[name].bfloat16()), name


@pytest.mark.parametrize("scope", ["accumulated", "dp", "micro"])
def test_every_scope_trains(run: Callable[..., Path], capsys: pytest.CaptureFixture[str], scope: str) -> None:
    lines = read_lines(run(f"balance.scope={scope}", "balance.pool=all") / "metrics.jsonl")
    assert "Warning" not in capsys.readouterr().out
    assert all(1.5 < line["balance_loss"] < 6 for line in lines)  # 2 layers, each 1 when balanced


def test_one_expert_a_token_is_warned_of_and_its_router_has_no_moments(
    run: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """Without the losses of balance nothing reaches the router."""
    folder = run("model.num_experts_per_tok=1", "balance.router_aux_loss_coef=0", "balance.router_z_loss_coef=0")
    assert "Warning: model.num_experts_per_tok is 1" in capsys.readouterr().out
    moments = load_file(folder / "checkpoints/step-00000012/exp_avg_sq.safetensors")
    assert {bool(tensor.any()) for name, tensor in moments.items() if "router" not in name} == {True}
    assert {bool(tensor.any()) for name, tensor in moments.items() if "router" in name} == {False}


def test_a_batch_above_the_critical_one_is_said_before_the_first_step(
    run: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    run("schedule.max_lr=0.0001", "run.tokens=1024", "schedule.decay.tokens=0")
    said = capsys.readouterr().out
    assert "Warning: The batch is above the schedule's critical batch in 100% of the run" in said.partition("step ")[0]


def test_evaluation_changes_nothing(run: Callable[..., Path]) -> None:
    without = read_lines(run("run.name=without") / "metrics.jsonl")
    often = read_lines(run("run.name=often", "evaluation.every=1") / "metrics.jsonl")
    assert without_timing(often) == without_timing(without)


def test_an_evaluation_before_the_first_step_is_of_the_initial_weights(
    run: Callable[..., Path], tiny: Callable[..., list[str]], cache: Path
) -> None:
    """By Transformers and cross-entropy alone, window by window."""
    from powertrain.data.loader import sequence
    from powertrain.data.prepare import prepare
    from powertrain.train.compose import composed
    from powertrain.train.model import granite, mup

    first = read_lines(run("evaluation.every=100", "evaluation.sequences=100") / "evals.jsonl")[:2]
    assert [(line["step"], line["tokens"], line["corpus"]) for line in first] == [(0, 0, "overall"), (0, 0, "words")]

    config = composed(tiny())
    model = granite.build(config)
    mup.initialize(model.named_parameters(), mup.table(config), config.run.seed)
    file = prepare(config.data.corpora, config.data.tokenizer, cache).validation["words"]
    windows = [sequence(file, index, 32) for index in range((file.num_tokens - 1) // 32)]  # all there are
    ids, labels, positions = (torch.from_numpy(np.stack(part)) for part in zip(*windows, strict=True))
    with torch.no_grad():
        logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()).item()
    assert [line["loss"] for line in first] == pytest.approx([expected] * 2, rel=1e-5)


def test_what_begins_anew_keeps_no_evaluation_of_the_start_before(run: Callable[..., Path], tmp_path: Path) -> None:
    run("evaluation.every=100", "data.sequence_length=32")
    shutil.rmtree(tmp_path / "tiny/checkpoints")  # as if it had been killed before the first
    (tmp_path / "tiny/.saved").unlink()
    folder = run("run.seed=1")
    assert {line["step"] for line in read_lines(folder / "evals.jsonl")} == {12}


def test_every_corpus_is_told_of(run: Callable[..., Path], words: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`overall` has every corpus's windows in it: of equally many, whatever the mixture."""
    late = f"data.corpora.late={{source: text, path: {words}/1*.txt, validation_fraction: 0.2}}"
    folder = run(late, "data.mixture={words: 9, late: 1}", "evaluation.sequences=1", "evaluation.every=100")
    said = capsys.readouterr().out
    lines = {(line["step"], line["corpus"]): line for line in read_lines(folder / "evals.jsonl")}
    for step in (0, 12):
        overall, one, other = (lines[step, name] for name in ("overall", "late", "words"))
        nats = sum(line["loss"] * line["targets"] for line in (one, other))
        assert overall["loss"] == pytest.approx(nats / (one["targets"] + other["targets"]))
        each = f"{overall['loss']:.4f} overall (late {one['loss']:.4f}, words {other['loss']:.4f})"
        assert f"step {step}: validation loss {each}" in said
    for name, line in (("late", one), ("words", other)):  # and once more at the end
        assert f"{name:<15} {line['loss']:.4f} nats a token" in said


def test_dense_model_trains(run: Callable[..., Path]) -> None:
    folder = run("model.model_type=granite", "model.tie_word_embeddings=false")
    lines = read_lines(folder / "metrics.jsonl")
    assert lines[-1]["lm_loss"] < lines[0]["lm_loss"]
    assert "expert_load" not in lines[0]
    assert (folder / "model/config.json").is_file()


def test_exported_model_loads_with_transformers_alone(run: Callable[..., Path]) -> None:
    folder = run()
    model = AutoModelForCausalLM.from_pretrained(folder / "model", device_map="auto")
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    model.eval()
    # The lines of the model's documentation page, but for path and prompt.
    input_tokens = tokenizer("abc", return_tensors="pt")
    output = model.generate(**input_tokens, max_new_tokens=5)
    output = tokenizer.batch_decode(output)
    assert output[0].startswith("abc")
    assert model.config.logits_scaling == 2.0
    assert model.config.attention_multiplier == 1 / 16
    assert model.config.eos_token_id == tokenizer.eos_token_id
    weights = load_file(folder / "checkpoints/step-00000012/weights.safetensors")
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, weights[name]), name


def test_wandb_offline_without_an_account(run: Callable[..., Path]) -> None:
    folder = run("tracker=wandb")
    assert list(folder.glob("wandb/offline-run-*/*.wandb"))


@pytest.mark.slow
def test_trackers_show_a_resumed_run_as_one_run(tiny: Callable[..., list[str]], tmp_path: Path) -> None:
    import shutil
    import sqlite3

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = tmp_path / "tiny"
    settings = tiny("tracker.log_with=[wandb,tensorboard,trackio]", "checkpoint.every=6", "checkpoint.keep=9")
    for _ in range(2):
        shutil.rmtree(folder / "checkpoints/step-00000012", ignore_errors=True)  # what followed step 6 is lost
        done = launch(settings, TRACKIO_DIR=str(tmp_path / "trackio"))
        assert done.returncode == 0, done.stdout + done.stderr
        assert "Warning" not in done.stdout
    losses = {line["step"]: line["lm_loss"] for line in read_lines(folder / "metrics.jsonl")}
    record = json.loads((folder / "run.json").read_text())
    assert len(losses) == 12
    assert len(record["starts"]) == 2

    offline = sorted(folder.glob("wandb/offline-run-*"))
    assert len(offline) == 2
    assert {path.name.rpartition("-")[2] for path in offline} == {record["id"]}

    events = EventAccumulator(str(folder / "powertrain")).Reload()
    shown = {event.step: event.value for event in events.Scalars("lm_loss")}
    assert shown == pytest.approx(losses)
    assert [event.step for event in events.Scalars("lm_loss")] == list(range(1, 13))  # none of them twice
    assert len(events.Scalars("evaluation/words/loss")) == 1

    with sqlite3.connect(next((tmp_path / "trackio").glob("*.db"))) as database:
        rows = database.execute("SELECT run_name, step, metrics FROM metrics").fetchall()
    assert {name for name, _, _ in rows} == {f"tiny-{record['id']}"}
    values = [(step, json.loads(metrics)) for _, step, metrics in rows]
    assert {step: metrics["lm_loss"] for step, metrics in values if "lm_loss" in metrics} == losses


def test_a_tracker_that_is_not_installed_is_told_at_once(
    run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("accelerate.tracking._available_trackers", [])
    with pytest.raises(ConfigError, match="pip install tensorboard"):
        run("tracker=tensorboard")


def test_fault_09_a_skipped_step_leaves_weights_and_moments(
    run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from powertrain.train.engine import Engine

    original, seen = Engine.backward, {"calls": 0}

    def poisoned(self: Engine, loss: torch.Tensor) -> None:
        seen["calls"] += 1
        original(self, loss * float("nan") if seen["calls"] == 12 else loss)  # second micro-batch of step 6

    monkeypatch.setattr(Engine, "backward", poisoned)
    folder = run("checkpoint.every=1", "checkpoint.keep=20", "run.tokens=2048")
    lines = read_lines(folder / "metrics.jsonl")
    assert [line["skipped"] for line in lines] == [False] * 5 + [True] + [False] * 2
    assert lines[5]["grad_norm"] is None
    before, after = (folder / f"checkpoints/step-0000000{step}" for step in (5, 6))
    for name in ("weights", "exp_avg", "exp_avg_sq"):
        earlier, later = load_file(before / f"{name}.safetensors"), load_file(after / f"{name}.safetensors")
        assert all(torch.equal(earlier[key], later[key]) for key in earlier)
    states = [json.loads((path / "state.json").read_text()) for path in (before, after)]
    assert states[0]["assignments"] == states[1]["assignments"]
    assert states[1]["state"]["tokens"] == 6 * 256  # the data was used


def test_fault_10_gradients_that_are_never_finite_stop_the_run(
    run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from powertrain.train.engine import Engine
    from powertrain.train.errors import RunFailed

    original = Engine.backward
    monkeypatch.setattr(Engine, "backward", lambda self, loss: original(self, loss * float("inf")))
    with pytest.raises(RunFailed, match="10 steps in a row"):
        run()


def test_token_files_of_others_are_used_as_they_are(run: Callable[..., Path], tmp_path: Path) -> None:
    import numpy as np

    from powertrain.data import DataError
    from powertrain.data.tokens import TokenWriter

    first = run("run.name=first")
    for name, top in (("good", 290), ("bad", 301)):
        with TokenWriter(tmp_path / name, np.uint16) as writer:
            for document in range(40):
                writer.add(np.arange(50) % top if document else np.array([top - 1]))
    data = "data.corpora={theirs: {source: tokens, path: " + str(tmp_path) + "/NAME}}"
    tokenizer = f"data.tokenizer.path={first}/tokenizer"
    lines = read_lines(run("run.name=good", data.replace("NAME", "good"), tokenizer) / "metrics.jsonl")
    assert lines[-1]["lm_loss"] < lines[0]["lm_loss"]
    for _ in range(2):  # a refusal is not remembered as a pass
        with pytest.raises(DataError, match="bad"):
            run("run.name=bad", data.replace("NAME", "bad"), tokenizer)
