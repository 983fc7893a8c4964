"""Branches, stages, growing batches, other people's weights, and the check that replays a run."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import tiny_overrides, train_here, without_timing
from safetensors.torch import load_file, save_file
from transformers import GraniteMoeConfig, GraniteMoeForCausalLM

from powertrain.schedulers import Decay, Power
from powertrain.train import checkpoint
from powertrain.train.compose import composed, existing_run
from powertrain.train.errors import ConfigError
from powertrain.train.run import train
from powertrain.train.track import read_lines


def decay(*arguments: str) -> int:
    from powertrain.launch import decay as verb

    with pytest.raises(SystemExit) as ended:
        verb.main(list(arguments))
    return int(ended.value.code or 0)


def replay(*arguments: str) -> int:
    from powertrain.launch.check import run as verb

    return verb.main(list(arguments))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# -------------------------------------------------------------------------------------------------- decay branches


def test_a_branch_is_the_run_that_had_been_planned_so(run: Callable[..., Path], tmp_path: Path) -> None:
    trunk = run("run.name=trunk", "schedule.decay.tokens=0", "checkpoint.every=2", "checkpoint.keep=9")
    before = contents(trunk)
    assert decay(str(trunk), "--at", "6", "--tokens", "768", "--name", "branch") == 0
    assert decay(str(trunk), "--at", "6", "--tokens", "1024", "--shape", "sqrt") == 0
    assert contents(trunk) == before
    # The branch goes on, or is done, only as what it was begun as.
    assert decay(str(trunk), "--at", "6", "--tokens", "768", "--name", "branch") == 0
    for other in (("--at", "4"), ("--tokens", "900"), ("--shape", "linear"), ("--floor", "0.5")):
        asked = {"--at": "6", "--tokens": "768", **dict([other])}
        assert decay(str(trunk), *(part for pair in asked.items() for part in pair), "--name", "branch") == 2

    planned = run("run.name=planned", "run.tokens=2304", "schedule.decay.tokens=768")
    branch = tmp_path / "branch"
    assert (
        without_timing(read_lines(branch / "metrics.jsonl"))
        == without_timing(read_lines(planned / "metrics.jsonl"))[6:]
    )
    for name in ("weights", "exp_avg", "exp_avg_sq"):
        paths = [folder / f"checkpoints/step-00000009/{name}.safetensors" for folder in (branch, planned)]
        assert paths[0].read_bytes() == paths[1].read_bytes()
    assert json.loads((branch / "run.json").read_text())["parent"].endswith("trunk/checkpoints/step-00000006")

    power = Power(max_lr=0.01, warmup_tokens=700, decay=Decay(start=1536, tokens=1024, shape="sqrt"))
    lines = read_lines(tmp_path / "trunk-decay-6-1024/metrics.jsonl")
    assert [line["lr"] for line in lines] == [power(tokens=n, batch=0.0625) for n in range(1536, 2560, 256)]


@pytest.mark.parametrize(
    ("at", "reason"), [(1, "lies in its warmup"), (11, "lies in its decay"), (99, "has no checkpoint of step 99")]
)
def test_a_branch_needs_a_rate_that_is_held(
    run: Callable[..., Path], capsys: pytest.CaptureFixture[str], at: int, reason: str
) -> None:
    folder = run("checkpoint.every=1", "checkpoint.keep=20")
    assert decay(str(folder), "--at", str(at), "--tokens", "256") == 2
    told = capsys.readouterr().err
    assert reason in told
    if at == 11:
        assert "Its other checkpoints are of steps [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12]." in told
        for path in (folder / "checkpoints").iterdir():
            if path.name != "step-00000011":
                shutil.rmtree(path)
        assert decay(str(folder), "--at", str(at), "--tokens", "256") == 2
        assert "off the trunk. It has no other checkpoint." in capsys.readouterr().err


def by_name(*overrides: str) -> Path:
    """As `train.py run.name=… KEY=VALUE` does, without the rest of what describes the run."""
    config = existing_run(list(overrides))
    assert config is not None
    train(config, ["test"])
    return config.run_folder


def test_a_run_that_is_not_there_is_told_beside_those_that_are(run: Callable[..., Path], tmp_path: Path) -> None:
    for name in ("mixed", "short"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").touch()
    with pytest.raises(ConfigError, match=r"no run .*mixd; .* has mixed, short\..* Did you mean 'mixed'\?"):
        existing_run([f"run.folder={tmp_path}", "run.name=mixd", "run.tokens=100"])
    # One that is described is new.
    assert existing_run([f"run.folder={tmp_path}", "run.name=new", "model.vocab_size=300"]) is None


def test_a_run_is_extended_by_its_name_and_a_larger_budget(run: Callable[..., Path], tmp_path: Path) -> None:
    settings = ("schedule.decay.tokens=0", "model.rope_theta=500", "optimizer.weight_decay=0.3")
    once = run("run.name=once", *settings, "run.tokens=4_096")
    run("run.name=twice", *settings)
    twice = by_name("run.name=twice", f"run.folder={tmp_path}", "run.tokens=4_096")
    lines = without_timing(read_lines(twice / "metrics.jsonl"))
    assert lines == without_timing(read_lines(once / "metrics.jsonl")) and len(lines) == 16


def test_a_branch_is_extended_by_its_name_and_a_larger_budget(run: Callable[..., Path], tmp_path: Path) -> None:
    trunk = run("run.name=trunk", "schedule.decay.tokens=0", "checkpoint.every=6")
    place = f"run.folder={tmp_path}"
    for name, floor in (("half", "0.5"), ("zero", "0")):
        assert decay(str(trunk), "--at", "6", "--tokens", "512", "--floor", floor, "--name", name) == 0
    # Half of the rate at the decay's start stays, times nothing for the tokens since.
    lines = read_lines(by_name("run.name=half", place, "run.tokens=2_560") / "metrics.jsonl")
    start = Power(max_lr=0.01, warmup_tokens=700)(tokens=1536, batch=0.0625)
    assert [line["lr"] for line in lines[2:]] == [start / 2] * 2 and lines[-1]["step"] == 10
    # Of one that has decayed to nothing the rate has to be warmed up again.
    with pytest.raises(
        ConfigError, match=r"ends at 2,048 .* would be 0.* schedule.rewarmup.start=2048 .*step-00000006"
    ):
        by_name("run.name=zero", place, "run.tokens=3_072")
    rewarmed = ("schedule.rewarmup.start=2048", "schedule.rewarmup.tokens=256", "schedule.decay.start=null")
    lines = read_lines(by_name("run.name=zero", place, "run.tokens=3_072", *rewarmed) / "metrics.jsonl")
    power = Power(max_lr=0.01, warmup_tokens=700, decay=Decay(start=3072 - 512, tokens=512))
    expected = [power(tokens=n, batch=0.0625) * (n > 2048) for n in range(2048, 3072, 256)]
    assert [line["lr"] for line in lines[2:]] == expected


def test_a_secret_that_config_yaml_left_out_is_asked_for(run: Callable[..., Path], tmp_path: Path) -> None:
    from powertrain.train.cli import run_training

    folder = run()
    settings = folder / "config.yaml"
    key = "  log_with: [wandb]\n  init_kwargs: {wandb: {api_key: (hidden)}}"
    settings.write_text(settings.read_text().replace("  log_with: []", key).replace("  init_kwargs: {}\n", ""))
    config = existing_run(["run.name=tiny", f"run.folder={tmp_path}", "run.tokens=4096"])
    assert config is not None
    with pytest.raises(ConfigError, match=r"tracker\.init_kwargs\.wandb\.api_key is a secret"):
        run_training(config, "train", [])


@pytest.mark.parametrize(
    "overrides",
    [
        ["+experiment=tiny", "run.name=there"],
        ["data=stdlib", "run.name=there"],
        ["--config-dir=conf", "run.name=there"],
        ["run.name=another", "model.vocab_size=300"],
        ["run.tokens=5"],
    ],
)
def test_what_is_described_is_not_taken_from_a_folder(tmp_path: Path, overrides: list[str]) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there/config.yaml").write_text("run: {tokens: 1}")
    assert existing_run([*overrides, f"run.folder={tmp_path}"]) is None


# ---------------------------------------------------------------------------------------------- mixtures and stages


def two_corpora(words: Path, *more: str) -> list[str]:
    return [f"data.corpora.late={{source: text, path: {words}/1*.txt, validation_fraction: 0.2}}", *more]


def test_a_stage_added_later_disturbs_nothing_before_it(run: Callable[..., Path], words: Path, tmp_path: Path) -> None:
    trunk = run("run.name=trunk", "schedule.decay.tokens=0", "checkpoint.every=6", "checkpoint.keep=9")
    shutil.copytree(trunk, tmp_path / "later")
    shutil.rmtree(tmp_path / "later/checkpoints/step-00000012")
    folder = run(
        "run.name=later",
        "schedule.decay.tokens=0",
        "data.mixture={words: 1}",
        *two_corpora(words, "data.stages=[{from_tokens: 1536, mixture: {words: 1, late: 3}}]"),
    )
    lines, changed = (without_timing(read_lines(path / "metrics.jsonl")) for path in (trunk, folder))
    assert changed[:6] == lines[:6]
    assert changed[6]["lm_loss"] != lines[6]["lm_loss"]
    assert changed[6]["lr"] == lines[6]["lr"]
    corpora = {line["corpus"] for line in read_lines(folder / "evals.jsonl")}
    assert corpora == {"words", "late", "overall"}


def test_a_branch_can_have_a_mixture_of_its_own(run: Callable[..., Path], words: Path, tmp_path: Path) -> None:
    trunk = run("run.name=trunk", "schedule.decay.tokens=0", "checkpoint.every=6")
    more = ("--mixture", "words=1,late=1", "--name", "mixed", *two_corpora(words))
    assert decay(str(trunk), "--at", "6", "--tokens", "512", *more) == 0
    lines = read_lines(tmp_path / "mixed/metrics.jsonl")
    assert [line["step"] for line in lines] == [7, 8]


# ------------------------------------------------------------------------------------------------ a growing batch


def test_a_growing_batch_takes_rate_clock_and_samples_along(run: Callable[..., Path]) -> None:
    ramp = "batch.ramp=[{from_tokens: 1024, sequences: 16}, {from_tokens: 2048, sequences: 24}]"
    lines = read_lines(run(ramp, "run.tokens=3584", "schedule.decay.tokens=1024") / "metrics.jsonl")
    assert [line["tokens"] for line in lines] == [0, 256, 512, 768, 1024, 1536, 2048, 2816]
    assert [line["samples"] for line in lines] == [0, 8, 16, 24, 32, 48, 64, 88]
    assert [line["batch"] * 128 for line in lines] == [8, 8, 8, 8, 16, 16, 24, 24]
    power = Power(max_lr=0.01, warmup_tokens=700, decay=Decay(start=3584 - 1024, tokens=1024))
    for line in lines:
        assert line["lr"] == power(tokens=line["tokens"], batch=line["batch"])


def test_a_phase_that_does_not_divide_is_refused_before_the_start(run: Callable[..., Path]) -> None:
    with pytest.raises(ConfigError, match="A batch of 18 sequences does not split into micro-batches of 4"):
        run("batch.ramp=[{from_tokens: 1024, sequences: 18}]")


# -------------------------------------------------------------------------------------------- continued pretraining


@pytest.fixture(scope="module")
def sound(words: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a model to begin from."""
    folder = tmp_path_factory.mktemp("sound")
    settings = ("run.tokens=256", "schedule.decay.tokens=0", "schedule.warmup_tokens=0")
    return train_here(tiny_overrides(words, cache, folder, *settings))


def test_going_on_from_an_exported_model(run: Callable[..., Path], tmp_path: Path) -> None:
    first = run("run.name=first", "evaluation.every=100")
    last = read_lines(first / "evals.jsonl")[-1]
    folder = run(
        "run.name=more",
        f"run.init_from={first}/model",
        "run.tokens_seen=3072",
        "run.tokens=1024",
        "schedule.decay.tokens=0",
        "schedule.rewarmup.tokens=512",
    )
    lines = read_lines(folder / "metrics.jsonl")
    assert [line["tokens"] for line in lines] == [3072, 3328, 3584, 3840]
    assert [line["samples"] for line in lines] == [0, 8, 16, 24]
    power = Power(max_lr=0.01, warmup_tokens=700)
    trunk = [power(tokens=line["tokens"], batch=0.0625) for line in lines]
    assert [line["lr"] for line in lines] == [0, trunk[1] / 2, trunk[2], trunk[3]]
    assert lines[0]["lm_loss"] == pytest.approx(last["loss"], abs=0.5)  # and not log(300)


def test_the_published_powermoe_configuration_with_small_weights(run: Callable[..., Path], tmp_path: Path) -> None:
    """ibm/PowerMoE-3b's config.json as published, but for the sizes, which would not fit here."""
    published = {
        "attention_bias": False, "attention_dropout": 0.1, "attention_multiplier": 0.015625, "bos_token_id": 0,
        "embedding_multiplier": 12.0, "eos_token_id": 0, "hidden_act": "silu", "hidden_size": 1536,
        "initializer_range": 0.02, "intermediate_size": 512, "logits_scaling": 6.0, "max_position_embeddings": 4096,
        "model_type": "granitemoe", "num_attention_heads": 24, "num_experts_per_tok": 8, "num_hidden_layers": 32,
        "num_key_value_heads": 8, "num_local_experts": 40, "output_router_logits": False, "residual_multiplier": 0.22,
        "rms_norm_eps": 1e-06, "rope_theta": 10000, "router_aux_loss_coef": 0.0, "tie_word_embeddings": True,
        "vocab_size": 49152,
    }  # fmt: skip
    small = {"hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 2,
             "intermediate_size": 32, "vocab_size": 512}  # fmt: skip
    torch.manual_seed(0)
    theirs = GraniteMoeForCausalLM(GraniteMoeConfig(**{**published, **small}))
    theirs.save_pretrained(tmp_path / "theirs")
    folder = run(f"run.init_from={tmp_path}/theirs", "run.tokens_seen=1_000_000", "run.tokens=256",
                 "schedule.decay.tokens=0", "mup.base_hidden_size=64")  # fmt: skip
    config = json.loads((folder / "model/config.json").read_text())
    for name in ("attention_multiplier", "embedding_multiplier", "logits_scaling", "residual_multiplier",
                 "num_local_experts", "num_experts_per_tok", "rms_norm_eps", "max_position_embeddings"):  # fmt: skip
        assert config[name] == published[name], name
    line = read_lines(folder / "metrics.jsonl")[0]
    assert line["tokens"] == 1_000_000
    assert line["lr_per_group"]["router"] == line["lr"] / 2  # m_width 128 / 64, whatever logits_scaling says


@pytest.mark.parametrize(
    ("change", "reason"),
    [({"model_type": "llama"}, "'llama' model"), ({"attention_bias": True}, "attention_bias True")],
)
def test_a_model_that_cannot_be_trained_is_refused(
    tiny: Callable[..., list[str]], run: Callable[..., Path], change: dict[str, object], reason: str
) -> None:
    folder = run()
    config = json.loads((folder / "model/config.json").read_text())
    (folder / "model/config.json").write_text(json.dumps(config | change))
    with pytest.raises(ConfigError, match=reason):
        composed(tiny(f"run.init_from={folder}/model"))


CONTINUED = ("run.name=more", "run.tokens_seen=3072", "run.tokens=1024", "schedule.decay.tokens=0")


def test_a_run_folder_stands_for_its_model_and_is_needed_only_to_begin(
    run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    wide = ("model.hidden_size=64", "model.num_hidden_layers=1", "model.num_key_value_heads=1")
    first = run("run.name=first", *wide, "run.tokens=512", "schedule.decay.tokens=0", "schedule.warmup_tokens=0")
    settings = (*CONTINUED, f"run.init_from={first}", "checkpoint.every=2", "checkpoint.keep=9")
    whole = run(*settings)
    assert json.loads((whole / "model/config.json").read_text())["hidden_size"] == 64
    lines = without_timing(read_lines(whole / "metrics.jsonl"))
    shutil.rmtree(whole / "checkpoints/step-00000004")
    first.rename(tmp_path / "away")
    monkeypatch.setattr("powertrain.train.init_from.config_in", None)  # nothing of it is looked at
    again = run(*settings)
    assert without_timing(read_lines(again / "metrics.jsonl")) == lines
    branch = run(*settings, "run.name=branch", f"run.resume={whole}/checkpoints/step-00000002")
    assert without_timing(read_lines(branch / "metrics.jsonl")) == lines[2:]
    with pytest.raises(ConfigError, match=r"model\.hidden_size 64, not 32"):
        run(*settings, "model.hidden_size=32")


def test_what_the_command_line_says_of_an_adopted_model_has_to_be_so(
    run: Callable[..., Path], tiny: Callable[..., list[str]]
) -> None:
    init_from = f"run.init_from={run()}"
    agreeing = (
        "model.hidden_size=32",
        "model.num_local_experts=4",
        "model.logits_scaling=2",
        "model.rope_theta=10_000",
    )
    assert composed(tiny(init_from, *agreeing, "model.attention_dropout=0.5")).model.attention_dropout == 0.5
    for setting, said in (
        ("model.hidden_size=256", "model.hidden_size 32, not 256"),
        ("++model.num_hidden_layers=3", "model.num_hidden_layers 2, not 3"),
        ("model.rope_theta=500", "model.rope_theta 10000.0, not 500.0"),
        ("model.num_experts_per_tok=1", "model.num_experts_per_tok 2, not 1"),
        ("model.residual_multiplier=1", "model.residual_multiplier 0.9"),
        ("model.tie_word_embeddings=false", "model.tie_word_embeddings True, not False"),
        ("model=proxy_12m", "model.model_type granitemoe, not granite"),
    ):
        with pytest.raises(ConfigError, match=re.escape(said)) as refused:
            composed(tiny(init_from, setting))
        assert "leave these settings" in str(refused.value)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        ("a run without a model", "the folder of a run that has no model yet"),
        ("no folder", "is no folder"),
        ("no weights", "there is no model.safetensors"),
        ("a pickle", "there is no model.safetensors"),
        ("cut weights", "cannot be read: SafetensorError"),
        ("whole numbers", "is I64, not one of"),
        ("another shape", "cannot be read"),
        ("a tensor too few", "lacks the tensors ['model.norm.weight']"),
        ("a tensor too many", "the tensors ['model.layers.0.self_attn.q_proj.bias']"),
        ("a word for a size", "cannot be read"),
        ("no json", "cannot be read"),
        ("code", "cannot be read"),
        ("code of the hub", "names the attention somebody/kernel"),
        ("quantised", "quantization_config"),
    ],
)
def test_weights_of_others_that_cannot_be_read_are_a_paragraph(
    sound: Path, tiny: Callable[..., list[str]], tmp_path: Path, damage: str, said: str
) -> None:
    shutil.copytree(sound / "model", tmp_path / "theirs")
    folder = tmp_path / "theirs"
    config, path = json.loads((folder / "config.json").read_text()), folder / "model.safetensors"
    tensors = load_file(path)
    if damage == "a run without a model":
        shutil.move(folder, tmp_path / "elsewhere")
        folder.mkdir()
        (folder / "config.yaml").touch()
    elif damage == "no folder":
        shutil.rmtree(folder)
    elif damage in ("no weights", "a pickle"):
        path.unlink()
        if damage == "a pickle":
            torch.save(tensors, folder / "pytorch_model.bin")
    elif damage == "cut weights":
        path.write_bytes(path.read_bytes()[:-9])
    elif damage in ("a word for a size", "code", "code of the hub", "quantised"):
        config |= {
            "a word for a size": {"hidden_size": "wide"},
            "code": {"model_type": "theirs", "auto_map": {"AutoConfig": "theirs.Theirs"}},
            "code of the hub": {"_attn_implementation": "somebody/kernel"},
            "quantised": {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
        }[damage]
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "theirs.py").write_text(f"import pathlib; pathlib.Path('{tmp_path}/mark').touch()")
    elif damage == "no json":
        (folder / "config.json").write_text("{")
    else:
        norm = tensors["model.norm.weight"]
        tensors |= {
            "whole numbers": {"model.norm.weight": norm.long()},
            "another shape": {"model.norm.weight": norm[:-1].clone()},
            "a tensor too few": {},
            "a tensor too many": {"model.layers.0.self_attn.q_proj.bias": norm.clone()},
        }[damage]
        if damage == "a tensor too few":
            del tensors["model.norm.weight"]
        save_file(tensors, path, {"format": "pt"})
    with pytest.raises(ConfigError) as refused:
        train(composed(tiny(*CONTINUED, f"run.init_from={folder}")), ["test"])
    assert said in str(refused.value) and f"run.init_from={folder}" in str(refused.value)
    assert "\n" not in str(refused.value) and not (tmp_path / "mark").exists()


# ---------------------------------------------------------------------------------------------------------- replay


def test_replay_passes_on_a_sound_run(run: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    folder = run("checkpoint.every=4", "checkpoint.keep=9", "data.sequence_length=32")
    before = contents(folder)
    assert replay(str(folder), "--steps", "6") == 0
    assert "PASS: steps 5 to 12" in capsys.readouterr().out
    assert contents(folder) == before


@pytest.mark.parametrize("name", ["lm_loss", "lr", "samples", "tokens"])
def test_replay_names_the_first_difference(
    run: Callable[..., Path], capsys: pytest.CaptureFixture[str], name: str
) -> None:
    folder = run("checkpoint.every=4", "checkpoint.keep=9")
    lines = read_lines(folder / "metrics.jsonl")
    lines[8][name] = lines[8][name] * 1.001 + 1
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert replay(str(folder), "--steps", "6") == 1
    assert f"FAIL: step 9: {name} was" in capsys.readouterr().out


@pytest.mark.parametrize("was", ["3.5", "NaN", '"3.5"', "null", "1" + "0" * 400, "{}"])
def test_replay_tells_of_what_no_run_writes(was: str) -> None:
    from powertrain.launch.check.run import _EXACT, _LOSSES, _difference

    record = {**dict.fromkeys(_EXACT, 1), **dict.fromkeys(_LOSSES, 2.5)}
    assert _difference(record, record, 0.0) is None
    assert _difference({**record, "grad_norm": 2.5001}, record, 1e-3) is None
    told = _difference({**record, "z_loss": json.loads(was)}, record, 1e-2)
    assert told is not None and told.startswith("z_loss was")
    assert _difference({"step": 1}, record, 1e-2) == "tokens was None and is 1"


def test_replay_finds_a_damaged_file(run: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    folder = run("checkpoint.every=4", "checkpoint.keep=9")
    path = checkpoint.available(folder / "checkpoints")[0] / "exp_avg_sq.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert replay(str(folder)) == 1
    assert "exp_avg_sq.safetensors has" in capsys.readouterr().out


def test_resuming_by_path_twice_goes_on_from_the_branch(
    run: Callable[..., Path], tiny: Callable[..., list[str]], tmp_path: Path
) -> None:
    trunk = run("run.name=trunk", "schedule.decay.tokens=0", "checkpoint.every=6")
    path = trunk / "checkpoints/step-00000006"
    branch = ("run.name=branch", f"run.resume={path}", "run.tokens=2048", "schedule.decay.tokens=0")
    train(composed(tiny(*branch)), ["test"])
    train(composed(tiny(*branch, "run.tokens=2560")), ["test"])
    lines = without_timing(read_lines(tmp_path / "branch/metrics.jsonl"))
    assert lines == without_timing(read_lines(trunk / "metrics.jsonl"))[6:10]


def test_a_branch_needs_its_parent_only_to_begin(run: Callable[..., Path], tmp_path: Path) -> None:
    trunk = run("run.name=trunk", "schedule.decay.tokens=0", "checkpoint.every=6", "checkpoint.keep=9")
    arguments = (str(trunk), "--at", "6", "--tokens", "1024", "--name", "branch", "checkpoint.every=1")
    assert decay(*arguments) == 0
    shutil.rmtree(tmp_path / "branch/checkpoints/step-00000010")
    shutil.rmtree(trunk / "checkpoints/step-00000006")
    assert decay(*arguments) == 0
    assert checkpoint.available(tmp_path / "branch/checkpoints")[-1].name == "step-00000010"


def test_replay_of_a_branch_begins_at_its_parent(
    run: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trunk = run("run.name=trunk", "schedule.decay.tokens=0", "checkpoint.every=6")
    assert decay(str(trunk), "--at", "6", "--tokens", "1024", "--name", "branch") == 0
    assert replay(str(tmp_path / "branch")) == 0
    assert "PASS: steps 7 to 10" in capsys.readouterr().out


def test_another_checkpoint_than_the_parent_is_refused(
    run: Callable[..., Path], tiny: Callable[..., list[str]]
) -> None:
    trunk = run("run.name=trunk", "schedule.decay.tokens=0", "checkpoint.every=4", "checkpoint.keep=9")
    for step, passes in ((4, True), (4, True), (8, False)):
        path = trunk / f"checkpoints/step-{step:08d}"
        config = composed(tiny("run.name=branch", f"run.resume={path}", "schedule.decay.tokens=0"))
        if passes:
            train(config, ["test"])
        else:
            with pytest.raises(ConfigError, match="did not begin from"):
                train(config, ["test"])
