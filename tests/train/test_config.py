import contextlib
import copy
import math
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from powertrain.schedulers import WSD, Constant, Cosine, Power
from powertrain.train import config as config_module
from powertrain.train.check import batch_doubts as doubts_of_batch
from powertrain.train.check import check, check_batch
from powertrain.train.compose import composed, load
from powertrain.train.config import Config, RampConfig, StageConfig
from powertrain.train.errors import ConfigError
from powertrain.train.redact import settings_text

EXPERIMENTS = [
    "quickstart",
    "proxy_12m",
    "proxy_36m",
    "proxy_121m",
    "dense_1b",
    "moe_1b",
    "powerlm_3b",
    "powermoe_3b",
    "proxy_tiny",
]


QUICK = "+experiment=quickstart"
# Its length is a matter of taste, which these numbers are not to depend on.
BUDGET = ("run.tokens=2_000_000", "schedule.warmup_tokens=100_000")


@cache
def _quickstart() -> Config:
    return composed([QUICK, *BUDGET, "schedule.decay.tokens=500_000"])


@pytest.fixture
def quickstart() -> Config:
    """2,000,000 tokens in steps of 16 × 256, warmup 100,000, the last 500,000 in decay; hidden 128, 2 heads."""
    return copy.deepcopy(_quickstart())


def change(config: Config, settings: dict[str, Any]) -> Config:
    for dotted, value in settings.items():
        *path, last = dotted.split(".")
        node: Any = config
        for name in path:
            node = node[name] if isinstance(node, dict) else getattr(node, name)
        if isinstance(node, dict):
            node[last] = value
        else:
            assert hasattr(node, last), dotted
            setattr(node, last, value)
    return config


def paragraph(error: BaseException) -> str:
    """The message, which has to be one readable paragraph."""
    message = str(error)
    assert message and "\n" not in message and "Traceback" not in message
    return message


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_is_valid(name: str) -> None:
    config = composed([f"+experiment={name}"])
    check_batch(config, world_size=1)
    assert config.run.name == name


def test_there_are_no_other_experiments() -> None:
    folder = Path(config_module.__file__).parent.parent / "configs" / "experiment"
    assert sorted(path.stem for path in folder.glob("*.yaml")) == sorted(EXPERIMENTS)


def ramp(*phases: tuple[int, int]) -> list[RampConfig]:
    return [RampConfig(tokens, sequences) for tokens, sequences in phases]


def stages(*phases: tuple[int, dict[str, float]]) -> list[StageConfig]:
    return [StageConfig(tokens, mixture) for tokens, mixture in phases]


# Settings, and what the message has to contain: the value, and the setting or the limit.
BAD: list[tuple[dict[str, Any], list[str]]] = [
    ({"model.model_type": "llama"}, ["model.model_type", "'llama'", "granitemoe, granite"]),
    ({"mup.rule": "fanin"}, ["mup.rule", "'fanin'", "paper, fan_in"]),
    ({"balance.scope": "global"}, ["balance.scope", "'global'", "lagged, accumulated, dp, micro"]),
    ({"balance.pool": "none"}, ["balance.pool", "'none'", "layer, all"]),
    ({"optimizer.weight_decay_mode": "none"}, ["optimizer.weight_decay_mode", "'none'", "coupled, independent"]),
    ({"precision": "fp16"}, ["precision", "'fp16'", "bf16, fp32"]),
    ({"model.vocab_size": 0}, ["model.vocab_size is 0", "greater than zero"]),
    ({"model.hidden_size": -128}, ["model.hidden_size is -128"]),
    ({"model.intermediate_size": 0}, ["model.intermediate_size is 0"]),
    ({"model.num_hidden_layers": 0}, ["model.num_hidden_layers is 0"]),
    ({"model.num_attention_heads": 0}, ["model.num_attention_heads is 0"]),
    ({"mup.base_hidden_size": 0}, ["mup.base_hidden_size is 0"]),
    ({"data.sequence_length": 0}, ["data.sequence_length is 0"]),
    ({"batch.sequences": 0}, ["batch.sequences is 0"]),
    ({"batch.micro_sequences": 0}, ["batch.micro_sequences is 0"]),
    ({"run.tokens": 0}, ["run.tokens is 0"]),
    ({"optimizer.max_grad_norm": 0.0}, ["optimizer.max_grad_norm is 0.0"]),
    ({"optimizer.max_grad_norm": -1.0}, ["optimizer.max_grad_norm is -1.0"]),
    ({"optimizer.max_grad_norm": math.inf}, ["optimizer.max_grad_norm is inf"]),
    ({"optimizer.weight_decay": -0.1}, ["optimizer.weight_decay is -0.1", "0 or greater"]),
    ({"optimizer.weight_decay": math.nan}, ["optimizer.weight_decay is nan"]),
    ({"optimizer.weight_decay": math.inf}, ["optimizer.weight_decay is inf"]),
    ({"optimizer.eps": -1e-8}, ["optimizer.eps is -1e-08"]),
    ({"optimizer.betas": (0.9, math.nan)}, ["optimizer.betas", "nan"]),
    ({"balance.router_aux_loss_coef": -0.01}, ["balance.router_aux_loss_coef is -0.01"]),
    ({"balance.router_aux_loss_coef": math.nan}, ["balance.router_aux_loss_coef is nan"]),
    ({"balance.router_z_loss_coef": -0.001}, ["balance.router_z_loss_coef is -0.001"]),
    ({"data.tokenizer.vocab_size": -1}, ["data.tokenizer.vocab_size is -1"]),
    ({"model.num_key_value_heads": 0}, ["model.num_key_value_heads is 0"]),
    ({"model.model_type": "granite", "model.num_local_experts": -3}, ["model.num_local_experts is -3"]),
    ({"optimizer.max_grad_norm": math.nan}, ["optimizer.max_grad_norm is nan"]),
    ({"evaluation.sequences": 0}, ["evaluation.sequences is 0"]),
    ({"checkpoint.keep": 0}, ["checkpoint.keep is 0"]),
    ({"run.tokens_seen": -5}, ["run.tokens_seen is -5"]),
    ({"optimizer.betas": (0.9, 1.0)}, ["optimizer.betas", "[0.9, 1.0]"]),
    ({"optimizer.betas": (-0.1, 0.9)}, ["optimizer.betas", "[-0.1, 0.9]"]),
    ({"optimizer.betas": (0.9,)}, ["optimizer.betas", "[0.9]", "two numbers"]),
    ({"run.name": "a/b"}, ["run.name is 'a/b'", "run.folder"]),
    ({"run.name": ""}, ["run.name is ''"]),
    ({"run.name": "."}, ["run.name is '.'"]),
    ({"run.name": ".."}, ["run.name is '..'"]),
    ({"run.name": "/absolute"}, ["run.name is '/absolute'"]),
    ({"run.name": "trailing/"}, ["run.name is 'trailing/'"]),
    ({"tracker.project": ".."}, ["tracker.project is '..'", "one folder"]),
    ({"tracker.project": "../.."}, ["tracker.project is '../..'", "one folder"]),
    ({"tracker.project": ""}, ["tracker.project is ''"]),
    ({"run.tokens": 10**30}, ["run.tokens is 1000", "64 bits"]),
    ({"run.seed": 2**63}, ["run.seed is 9223372036854775808", "64 bits"]),
    ({"batch.ramp": ramp((10**30, 16))}, ["batch.ramp[0].from_tokens is 1000", "64 bits"]),
    ({"model.num_attention_heads": 3}, ["128", "model.num_attention_heads 3", "42.67"]),
    ({"model.num_attention_heads": 128}, ["head size", "= 1 is odd"]),
    ({"model.num_attention_heads": 4, "model.num_key_value_heads": 3}, ["heads 4", "model.num_key_value_heads 3"]),
    ({"model.num_key_value_heads": -1}, ["model.num_key_value_heads", "-1"]),
    ({"evaluation.every": -1}, ["evaluation.every", "-1"]),
    ({"checkpoint.every": -1}, ["checkpoint.every", "-1"]),
    ({"model.num_experts_per_tok": 9}, ["model.num_experts_per_tok is 9", "model.num_local_experts 8"]),
    ({"model.num_experts_per_tok": 0}, ["model.num_experts_per_tok is 0"]),
    ({"model.max_position_embeddings": 255}, ["data.sequence_length 256", "model.max_position_embeddings 255"]),
    ({"schedule.decay": None, "schedule.warmup_tokens": 2_000_000}, ["warmup_tokens 2,000,000", "1 to 5%"]),
    ({"schedule.decay.start": 1_600_000}, ["starts at 1,600,000", "takes 500,000", "2,000,000", "raise", "2,100,000"]),
    (
        {"schedule.decay.start": 1_600_000, "run.tokens_seen": 50_000},
        ["2,050,000", "run.tokens to 2,050,000"],
    ),
    ({"schedule.decay.tokens": 1_950_000}, ["schedule", "50,000", "warmup of 100,000"]),
    # Steps of 4096 tokens: the last of 2,000,000 tokens begins at 488 × 4096 = 1,998,848.
    ({"schedule.decay.tokens": 1}, ["1,999,999 to 2,000,000", "never be seen", "4,096 tokens"]),
    ({"schedule.decay.tokens": 1_152}, ["1,998,848 to 2,000,000", "never be seen"]),
    ({"schedule.decay.tokens": 4_096, "run.tokens": 4_096 * 400}, ["1,634,304 to 1,638,400"]),
    ({"schedule.decay.start": 1_200_129, "schedule.decay.tokens": 4_095}, ["1,200,129 to 1,204,224"]),  # 293, 294 steps
    ({"schedule.decay.tokens": True}, ["tokens must be", "True"]),
    ({"schedule.a": -1.0}, ["schedule", "a must be", "-1"]),
    ({"schedule.nope": 1}, ["schedule", "'nope'", "warmup_tokens"]),
    ({"schedule.name": "powre"}, ["schedule", "'powre'", "Did you mean 'power'"]),
    ({"batch.ramp": ramp((0, 32))}, ["batch.ramp", "[0]", "above zero"]),
    ({"batch.ramp": ramp((200, 32), (100, 64))}, ["batch.ramp", "[200, 100]"]),
    ({"batch.ramp": ramp((200, 0))}, ["batch.ramp", "0"]),
    ({"batch.ramp": ramp((200, -16))}, ["batch.ramp", "-16"]),
    ({"data.stages": stages((9, {}), (9, {}))}, ["data.stages", "[9, 9]"]),
    ({"data.mixture": {"wiki": 1.0}}, ["data.mixture", "'wiki'", "it has: stdlib"]),
    ({"data.mixture": {"stdlib": -1.0}}, ["data.mixture", "'stdlib'", "-1.0"]),
    ({"data.mixture": {"stdlib": math.nan}}, ["data.mixture", "'stdlib'", "nan"]),
    ({"data.mixture": {"stdlib": math.inf}}, ["data.mixture", "'stdlib'", "inf"]),
    ({"data.mixture": {"stdlib": 0.0}}, ["data.mixture", "'stdlib'", "0.0", "above 0"]),
    ({"data.stages": stages((1_000_000, {}))}, ["data.stages from 1,000,000", "names no corpus"]),
    ({"data.stages": stages((1_000_000, {"wiki": 1.0}))}, ["data.stages from 1,000,000", "'wiki'"]),
    ({"data.corpora": {}, "data.mixture": {"wiki": 1.0}}, ["'wiki'", "it has: none"]),
]


@pytest.mark.parametrize(
    ("settings", "said"), BAD, ids=[",".join(f"{k}={v}" for k, v in settings.items()) for settings, _ in BAD]
)
def test_a_bad_setting_is_named_with_its_value(quickstart: Config, settings: dict[str, Any], said: list[str]) -> None:
    check(quickstart)
    with pytest.raises(ConfigError) as error:
        check(change(quickstart, settings))
    message = paragraph(error.value)
    assert [part for part in said if part not in message] == [], message


@pytest.mark.parametrize(
    "settings",
    [
        {"schedule.decay.start": 1_500_000},  # ends exactly with the run
        {"schedule.decay.tokens": 1_153},  # the last step begins one token into it
        {"schedule.decay.tokens": 4_097, "run.tokens": 4_096 * 400},
        {"schedule.decay.start": 1_200_127, "schedule.decay.tokens": 2},  # step 294 begins at 1,200,128
        {"schedule.decay.tokens": 4_097, "run.tokens_seen": 1_998_849, "run.tokens": 4_096 * 2},
        {"schedule.decay": None, "schedule.warmup_tokens": 1_999_999},
        {"model.num_experts_per_tok": 8},
        {"model.num_experts_per_tok": 1},
        {"model.model_type": "granite", "model.num_experts_per_tok": 0, "model.num_local_experts": 0},
        {"model.max_position_embeddings": 256},
        {"model.num_attention_heads": 64},  # heads of 2
        {"model.num_attention_heads": 4, "model.num_key_value_heads": 2},
        {"optimizer.betas": (0.0, 0.999)},
        {"data.mixture": {"stdlib": 0.5}},
        {"batch.ramp": ramp((100, 32), (200, 64))},
        {"evaluation.every": 0, "checkpoint.every": 0, "data.corpora": {}},
    ],
    ids=str,
)
def test_a_setting_at_its_limit_is_accepted(quickstart: Config, settings: dict[str, Any]) -> None:
    check(change(quickstart, settings))


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ([QUICK, "model.hiden_size=64"], ["'model.hiden_size'", "Did you mean 'model.hidden_size'"]),
        ([QUICK, "+model.hiden_size=64"], ["'model.hiden_size'"]),
        ([QUICK, "+data.corpora.stdlib.paht=x"], ["'data.corpora.stdlib.paht'"]),
        ([QUICK, "+nothing=1"], ["'nothing'"]),
        ([QUICK, "run.tokens=many"], ["run.tokens", "'many'"]),
        ([QUICK, "model.hidden_size=null"], ["model.hidden_size"]),
        ([QUICK, "schedule=pwoer"], ["'pwoer'", "configs/schedule", "constant, cosine, power, wsd"]),
        ([QUICK, "run.name=${run.nmae}"], ["run.nmae"]),
        (["+experiment=quikstart"], ["'quikstart'", "Did you mean 'quickstart'", "--config-dir"]),
        ([], ["batch.sequences", "run.tokens", "experiment"]),
        ([QUICK, "run.tokens=???"], ["run.tokens", "no value"]),
        ([QUICK, "batch.ramp=[{from_tokens: 5}]"], ["batch.ramp[0].sequences", "no value"]),
        ([QUICK, "-m", "run.seed=1,2"], ["multirun", "powertrain sweep"]),
        ([QUICK, "--sed=1"], ["'--sed=1'", "--help"]),
        ([QUICK, "--config-dir", "does/not/exist"], ["'does/not/exist'", "not a folder"]),
        ([QUICK, "just_a_word"], ["just_a_word"]),
        *(
            ([QUICK, f"{sign}{setting}"], [setting, "Hydra itself", "--config-dir"])
            for sign in ("", "+", "++")
            for setting in ("hydra.searchpath=[pkg://evil]", "hydra.run.dir=/x", "hydra/launcher=basic")
        ),
        ([QUICK, "tracker.project=.."], ["tracker.project is '..'"]),
        ([QUICK, f"schedule.warmup_tokens={'9' * 400}"], ["schedule.warmup_tokens is 999", "64 bits"]),
    ],
    ids=str,
)
def test_a_bad_command_line_is_explained(overrides: list[str], said: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        composed(overrides)
    message = paragraph(error.value)
    assert [part for part in said if part not in message] == [], message


def test_a_file_cannot_have_code_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "evil").mkdir()
    (tmp_path / "evil/__init__.py").write_text(f"open({str(tmp_path / 'mark')!r}, 'w')")
    (tmp_path / "experiment").mkdir()
    call = {"_target_": "evil.call"}
    for own in ({"searchpath": ["pkg://evil"]}, {"callbacks": {"x": call}, "launcher": call, "job_logging": call}):
        experiment = {"defaults": ["/experiment/quickstart"], "hydra": own}
        for path in (tmp_path / "train.yaml", tmp_path / "experiment/evil.yaml"):
            path.write_text("# @package _global_\n" + OmegaConf.to_yaml(OmegaConf.create(experiment)))
        with contextlib.suppress(ConfigError):
            composed(["--config-dir", str(tmp_path), "+experiment=evil"])
        assert not (tmp_path / "mark").exists()


TEN = ", ".join(["{0}"] * 10)
BOMB = "\n".join(["a0: &a0 x", *(f"a{i}: &a{i} [{TEN.format(f'*a{i - 1}')}]" for i in range(1, 10))])
UNREADABLE = [
    (BOMB, ["mine.yaml has more than 100,000 values"]),
    ("data: &data {corpora: *data}", ["mine.yaml has more than 100,000 values"]),  # which holds itself
    ("a: " + "[" * 500 + "]" * 500, ["nested too deep"]),
    ("a: \xff", ["not in UTF-8"]),
]


@pytest.mark.parametrize(("text", "said"), UNREADABLE, ids=["bomb", "itself", "deep", "bytes"])
def test_a_file_that_cannot_be_read_is_told_at_once(tmp_path: Path, text: str, said: list[str]) -> None:
    """A run's own config.yaml, too."""
    (tmp_path / "experiment").mkdir()
    mine = tmp_path / "experiment/mine.yaml"
    mine.write_bytes(b"# @package _global_\n" + text.encode("latin-1"))
    with pytest.raises(ConfigError) as error:
        composed([f"--config-dir={tmp_path}", "+experiment=mine"])
    assert all(part in paragraph(error.value) for part in said)
    with pytest.raises(ConfigError, match="cannot be read"):
        load(mine)


@pytest.mark.parametrize("reference", ["${tracker.init_kwargs.wandb.a%d}", "${.a%d}"])
def test_interpolations_that_mean_too_much_are_one_paragraph(tmp_path: Path, reference: str) -> None:
    lines = ["a0: ten letters"] + [f"a{n}: '{(reference % (n - 1)) * 2}'" for n in range(1, 31)]
    (tmp_path / "experiment").mkdir()
    text = "# @package _global_\ntracker:\n  log_with: [wandb]\n  init_kwargs:\n    wandb:\n"
    (tmp_path / "experiment/bomb.yaml").write_text(text + "".join(f"      {line}\n" for line in lines))
    with pytest.raises(ConfigError, match=r"interpolations written out .*init_kwargs.wandb.a"):
        composed([f"--config-dir={tmp_path}", "+experiment=[quickstart,bomb]"])
    few = text + "      a0: ten letters\n      a1: '${.a0} and ${run.name}'\n"
    (tmp_path / "experiment/few.yaml").write_text(few)
    config = composed([f"--config-dir={tmp_path}", "+experiment=[quickstart,few]"])
    assert config.tracker.init_kwargs["wandb"]["a1"] == "ten letters and quickstart"


def test_aliases_as_people_use_them_are_read(tmp_path: Path) -> None:
    (tmp_path / "schedule").mkdir()
    text = "defaults: [power]\na: &a 3.5\nbelongs_to: &two {x: *a}\ndecay:\n  <<: *two\n  tokens: 5\n"
    (tmp_path / "schedule/mine.yaml").write_text(text)
    with pytest.raises(ConfigError, match="decay has no field 'x'"):
        composed([f"--config-dir={tmp_path}", QUICK, "schedule=mine"])


def test_what_an_earlier_version_allowed_can_be_read(small_config: Callable[..., Config], tmp_path: Path) -> None:
    config = small_config()
    config.tracker.project = "../.."
    (tmp_path / "config.yaml").write_text(settings_text(config))
    assert load(tmp_path / "config.yaml").tracker.project == "../.."
    with pytest.raises(ConfigError, match=r"tracker\.project"):
        load(tmp_path / "config.yaml", {"run.seed": 1})


@pytest.mark.parametrize("prefix", ["", "+"])
def test_a_mixture_can_be_given_on_the_command_line(prefix: str) -> None:
    """Whatever Hydra's spelling is, what is refused must not be called unknown in favour of itself."""
    try:
        config = composed([QUICK, f"{prefix}data.mixture={{stdlib: 2}}"])
    except ConfigError as error:
        assert "Did you mean 'data.mixture'" not in str(error)
        assert not prefix
    else:
        assert config.data.mixture == {"stdlib": 2.0}


# --------------------------------------------------------------------------------------------------- the batch


@pytest.mark.parametrize(
    ("sequences", "micro", "ranks", "near", "fitting"),
    [
        (16, 3, 1, "15, 18", "1, 2, 4, 8, 16"),
        (16, 5, 2, "10, 20", "1, 2, 4, 8"),
        (12, 4, 2, "8, 16", "1, 2, 3, 6"),
        (6, 4, 3, "12", "1, 2"),  # none below
        (16, 16, 3, "48", "none on 3 ranks"),
    ],
)
def test_fault_13_a_batch_that_does_not_split_is_told_what_would(
    quickstart: Config, sequences: int, micro: int, ranks: int, near: str, fitting: str
) -> None:
    config = change(quickstart, {"batch.sequences": sequences, "batch.micro_sequences": micro})
    with pytest.raises(ConfigError) as error:
        check_batch(config, ranks)
    message = paragraph(error.value)
    assert f"batch of {sequences} sequences" in message and f"micro-batches of {micro} on {ranks} rank" in message
    assert f"{micro * ranks} sequences at a time" in message
    assert f"that do: {near}." in message
    assert f"fit this batch: {fitting}." in message
    for good in fitting.split(", ") if "none" not in fitting else []:
        check_batch(change(config, {"batch.micro_sequences": int(good)}), ranks)


def test_every_phase_of_a_ramp_has_to_split(quickstart: Config) -> None:
    check_batch(change(quickstart, {"batch.ramp": ramp((100, 32), (200, 48))}), 1)
    growing = change(quickstart, {"batch.ramp": ramp((100, 48))})
    with pytest.raises(ConfigError, match="A batch of 16"):
        check_batch(growing, 3, tokens=99)
    check_batch(growing, 3, tokens=100)  # what has been trained need not divide any more
    with pytest.raises(ConfigError, match="A batch of 24 sequences"):
        check_batch(change(quickstart, {"batch.ramp": ramp((100, 32), (200, 24))}), 1)
    with pytest.raises(ConfigError, match="A batch of 48 sequences"):
        check_batch(change(quickstart, {"batch.ramp": ramp((100, 32), (200, 48)), "batch.sequences": 64}), 2)


def test_a_ramp_counts_this_runs_tokens(quickstart: Config) -> None:
    config = change(quickstart, {"batch.ramp": ramp((100, 32), (200, 64)), "run.tokens_seen": 10**9})
    clock = [10**9 + n for n in (-1, 0, 99, 100, 199, 200, 10**9)]
    assert [config.sequences_at(tokens) for tokens in clock] == [16, 16, 16, 32, 32, 64, 64]
    assert [config.trained(tokens) for tokens in clock[:2]] == [-1, 0]
    with pytest.raises(ConfigError, match="A batch of 32"):
        check_batch(config, 4, clock[4])
    check_batch(config, 4, clock[5])


@pytest.mark.parametrize(("length", "sequences", "beta"), [(4096, 128, 128.0), (256, 16, 1.0), (8192, 3, 6.0)])
def test_beta_is_in_units_of_4096_tokens(quickstart: Config, length: int, sequences: int, beta: float) -> None:
    assert change(quickstart, {"data.sequence_length": length}).beta(sequences) == beta


# ------------------------------------------------------------------------------------------------- the schedule


def test_a_decay_without_a_start_ends_with_the_budget(quickstart: Config) -> None:
    schedule = quickstart.make_schedule()
    assert isinstance(schedule, Power) and schedule.decay is not None
    assert (schedule.decay.start, schedule.decay.tokens) == (1_500_000, 500_000)
    later = change(quickstart, {"run.tokens_seen": 10**6}).make_schedule()
    assert isinstance(later, Power) and later.decay is not None and later.decay.start == 2_500_000
    assert quickstart.end_tokens == 3_000_000
    without = change(quickstart, {"schedule.decay.tokens": 0}).make_schedule()
    assert isinstance(without, Power) and without.decay is None


@pytest.mark.parametrize(("name", "kind"), [("power", Power), ("wsd", WSD), ("cosine", Cosine), ("constant", Constant)])
def test_every_schedule_can_replace_the_experiments(name: str, kind: type) -> None:
    config = composed([QUICK, f"schedule={name}", *BUDGET])
    schedule = config.make_schedule()
    assert type(schedule) is kind
    assert schedule.warmup_tokens == 100_000
    if isinstance(schedule, Cosine):
        assert schedule.total_tokens == 2_000_000


@pytest.mark.parametrize("seen", [0, 777])
def test_the_step_after_a_token_count_is_that_of_the_loop(quickstart: Config, seen: int) -> None:
    phases = ramp((5_000, 24), (5_001, 8), (40_000, 64))  # no step begins in the first, and they end between steps
    config = change(quickstart, {"run.tokens_seen": seen, "batch.ramp": phases})
    begins = [0]
    while begins[-1] < 200_000:
        begins.append(begins[-1] + config.sequences_at(seen + begins[-1]) * 256)
    for tokens in (0, 1, 4_095, 4_096, 4_999, 5_000, 8_192, 9_999, 39_999, 40_960, 45_056, 57_344, 150_000):
        assert config.step_after(seen + tokens) == seen + next(n for n in begins if n > tokens), tokens


def test_a_cosine_that_no_step_sees_is_refused() -> None:
    settings = [QUICK, "schedule=cosine", "run.tokens=819200"]  # 200 steps of 4096
    check(composed([*settings, "schedule.warmup_tokens=815103"]))
    with pytest.raises(ConfigError, match="The fall of the cosine from 815,104 to 819,200 tokens would never be seen"):
        composed([*settings, "schedule.warmup_tokens=815104"])


def test_a_run_that_began_with_a_decay_of_one_step_is_still_read(quickstart: Config, tmp_path: Path) -> None:
    change(quickstart, {"schedule.decay.tokens": 1})
    (tmp_path / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(config_module.as_dict(quickstart))))
    assert load(tmp_path / "config.yaml") == quickstart
    with pytest.raises(ConfigError, match="never be seen"):
        load(tmp_path / "config.yaml", {"run.name": "another"})


# ------------------------------------------------------------------------------------------------- round trips


def test_what_a_run_writes_down_it_can_read(small_config: Callable[..., Config], tmp_path: Path) -> None:
    config = small_config("batch.ramp=[{from_tokens: 100, sequences: 32}]", "optimizer.betas=[0.8,0.9]", "run.seed=4")
    path = tmp_path / "config.yaml"
    OmegaConf.save(OmegaConf.create(config_module.as_dict(config)), path)
    assert load(path) == config


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("batch.ramp=30000:16", "'batch.ramp=[{from_tokens: …, sequences: …}, …]', not '30000:16'"),
        ("batch.ramp=[3]", "'batch.ramp=[{from_tokens: …, sequences: …}, …]', not [3]"),
        ("optimizer.betas=0.9", "'optimizer.betas=[…, …]', not 0.9"),
        ("data.mixture=3", "'data.mixture={NAME: …, …}', not 3"),
        ("batch.ramp=${nowhere}", "Interpolation key 'nowhere' not found"),
        ("optimizer=3", "optimizer is 3, but it has settings of its own, as optimizer.betas=…"),
    ],
)
def test_a_value_of_another_shape_is_refused_with_the_right_one(given: str, said: str) -> None:
    with pytest.raises(ConfigError) as refused:
        composed([QUICK, given])
    assert said in str(refused.value)


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.yaml does not exist"):
        load(tmp_path / "config.yaml")


def test_setting_names_are_every_leaf() -> None:
    names = config_module.setting_names()
    assert {"precision", "run.tokens", "model.hidden_size", "data.tokenizer.path", "batch.ramp", "schedule"} <= set(
        names
    )
    assert len(names) == len(set(names))


def test_one_expert_a_token_is_doubted() -> None:
    from powertrain.train.check import doubts

    make = ["+experiment=quickstart"]
    assert list(doubts(composed(make))) == []
    (doubt,) = doubts(composed([*make, "model.num_experts_per_tok=1"]))
    assert doubt.startswith("model.num_experts_per_tok is 1")
    assert list(doubts(composed([*make, "model.model_type=granite", "model.num_experts_per_tok=1"]))) == []


@cache
def _without_decay(*overrides: str) -> Config:
    return composed([QUICK, "schedule.decay.tokens=0", *overrides])


def batch_doubts(settings: dict[str, Any], *overrides: str) -> list[str]:
    return list(doubts_of_batch(change(copy.deepcopy(_without_decay(*overrides)), settings)))


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_no_experiment_trains_above_its_critical_batch(experiment: str) -> None:
    assert list(doubts_of_batch(composed([f"+experiment={experiment}"]))) == []


def test_a_batch_above_the_critical_batch_is_pointed_out_with_where_it_is() -> None:
    # β = 4: (4 · 4 / 0.02)^(1/0.51) = 492,5xx of 1,200,000 tokens.
    until, larger = math.ceil(800 ** (1 / 0.51)), {"batch.sequences": 64, "run.tokens": 1_200_000}
    (doubt,) = batch_doubts(larger)
    assert f"in {until / 1_200_000:.0%} of the run: 64 sequences from 0 to {until:,} tokens" in doubt
    assert "no further" in doubt and "more tokens for the same loss" in doubt and "--ramp" in doubt
    (smooth,) = batch_doubts({**larger, "schedule.cap": "smooth"})
    assert "hardly" in smooth and f"to {until:,} tokens" in smooth
    # A tenth of the run decides, by the run's own tokens; the law goes by the clock.
    assert batch_doubts({**larger, "run.tokens": 10 * until}) == []
    assert batch_doubts({**larger, "run.tokens": 10 * until - 100})
    assert batch_doubts({**larger, "schedule.warmup_tokens": until}) == []
    assert batch_doubts({**larger, "schedule.warmup_tokens": until - 1})
    again = {**larger, "schedule.rewarmup.tokens": 1000, "schedule.warmup_tokens": 0}
    assert f"from 0 to {until - 200_000:,} tokens" in batch_doubts({**again, "run.tokens_seen": 200_000})[0]
    assert batch_doubts({**again, "run.tokens_seen": until}) == []
    # A part of a ramp goes by its own tokens, and one behind the end by none.
    late = {"batch.ramp": ramp((400_000, 64)), "run.tokens": 1_200_000}
    assert batch_doubts({**late, "run.tokens": 1_400_000}) == []  # 92,5xx of its 1,000,000
    assert f"64 sequences from 400,000 to {until:,} tokens" in batch_doubts(late)[0]
    assert batch_doubts({**late, "batch.ramp": ramp((1_200_000, 640))}) == []
    for other in ("wsd", "constant", "cosine"):
        assert batch_doubts({**larger, "schedule.lr": 0.01, "schedule.warmup_tokens": 1000}, f"schedule={other}") == []
    assert batch_doubts({**larger, "schedule.batch_exponent": 0.0}) == []  # no batch raises the rate


def test_a_batch_that_grows_without_a_cap_is_warned_of() -> None:
    grows = {"batch.ramp": ramp((300_000, 64)), "schedule.max_lr": 1000.0}
    (doubt,) = batch_doubts(grows)
    assert "grows from 16 to 64 sequences at 300,000 tokens" in doubt
    assert "128" in doubt and "512" in doubt and "1.35 nats" in doubt and "schedule.max_lr 1000" in doubt
    assert batch_doubts({**grows, "schedule.batch_exponent": 0.5}) == []
    assert batch_doubts({**grows, "batch.sequences": 128}) == []  # it shrinks
    assert batch_doubts({**grows, "run.tokens": 300_000}) == []  # it never does
    # The power law gives 4 · 4 · 300,000^-0.51 there: of a cap that is near it, or below, nothing is said of the kind.
    law = 16 * 300_000**-0.51
    assert "1.35" in batch_doubts({**grows, "schedule.max_lr": 2.01 * law})[0]
    for cap in (0.5, 1, 1.99):
        assert not any("1.35" in doubt for doubt in batch_doubts({**grows, "schedule.max_lr": cap * law}))
