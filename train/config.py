"""The configuration of a run: dataclasses, sizes derived from them, and the checks across fields.

Hydra composes `configs/`; `from_hydra` turns the result into a `Config` or says in one paragraph what is
wrong with it. Names are Transformers' wherever Transformers has one.
"""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_args, get_origin, get_type_hints

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException
from yaml import YAMLError

import schedulers
from data import expand
from data.prepare import TokenizerSpec
from data.sources import Corpus

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

T = TypeVar("T")

# The unit of the law: a batch of 1 is 4096 tokens, whatever the sequence length (arXiv 2408.13359).
LAW_SEQUENCE_LENGTH = 4096

ATTENTION = ("auto", "eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3")
EXPERTS = ("auto", "eager", "sorted", "grouped_mm", "batched_mm", "sonicmoe")
ENGINES = ("plain", "ddp", "zero1", "zero2", "zero3")
TRACKERS = ("wandb", "tensorboard", "trackio", "comet_ml", "aim", "mlflow", "clearml", "dvclive", "swanlab")


class ConfigError(ValueError):
    """Something a user can mend. The message is one readable paragraph: value, limit, remedy."""


class RunFailed(RuntimeError):
    """The run broke for a reason that is known; the message is one paragraph."""


class Diverged(RunFailed):
    """The gradients are no longer finite."""


@dataclass
class RunConfig:
    """What to do, for how long, and where."""

    name: str = "run"  # the run's folder is folder/name
    folder: str = "runs"
    seed: int = 0
    tokens: int = MISSING  # budget of this run; the clock may start later (tokens_seen)
    tokens_seen: int = 0  # offsets n only: tokens that the initial weights have been trained on
    init_from: str | None = None  # a Hugging Face GraniteMoe or Granite folder to take the weights from
    resume: str = "auto"  # auto | never | path of a checkpoint

    def __post_init__(self) -> None:
        self.folder, self.resume = expand(self.folder), expand(self.resume)
        self.init_from = self.init_from and expand(self.init_from)


@dataclass
class ModelConfig:
    """Transformers' GraniteMoe or Granite configuration. `None` means derived."""

    model_type: str = "granitemoe"  # granitemoe | granite
    vocab_size: int = MISSING
    hidden_size: int = MISSING
    intermediate_size: int = MISSING  # of one expert, or of the dense MLP
    num_hidden_layers: int = MISSING
    num_attention_heads: int = MISSING
    num_key_value_heads: int | None = None
    num_local_experts: int = 0
    num_experts_per_tok: int = 0
    max_position_embeddings: int | None = None  # default: data.sequence_length
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = True
    attention_dropout: float = 0.0
    initializer_range: float = 0.1
    embedding_multiplier: float = 12.0
    residual_multiplier: float | None = None  # default: 1.4 / sqrt(num_hidden_layers)
    attention_multiplier: float | None = None  # default: 1 / head size
    logits_scaling: float | None = None  # default: m_width
    attn_implementation: str = "auto"  # one of ATTENTION
    experts_implementation: str = "auto"  # one of EXPERTS


@dataclass
class MupConfig:
    """Maximal update parametrisation, table 1 of arXiv 2408.13359."""

    base_hidden_size: int = 256  # d_base; m_width = hidden_size / d_base
    rule: str = "paper"  # paper | fan_in


@dataclass
class StageConfig:
    """From this many tokens of the run on, samples are drawn by this mixture."""

    from_tokens: int = MISSING
    mixture: dict[str, float] = field(default_factory=dict)


@dataclass
class DataConfig:
    """Corpora, the tokenizer, and the order in which windows of them are seen."""

    cache_dir: str = "~/.cache/powertrain"
    workers: int | None = None  # processes that tokenise what is not in the cache; default: one for each core
    sequence_length: int = 4096
    tokenizer: TokenizerSpec = field(default_factory=TokenizerSpec)
    corpora: dict[str, Corpus] = field(default_factory=dict)
    mixture: dict[str, float] = field(default_factory=dict)  # weights; default: equal
    stages: list[StageConfig] = field(default_factory=list)  # later mixtures, by tokens of the run


@dataclass
class RampConfig:
    """From this many tokens of the run on, a step holds this many sequences."""

    from_tokens: int = MISSING
    sequences: int = MISSING


@dataclass
class BatchConfig:
    """Sequences in a step over all ranks, and in one forward pass of one rank."""

    sequences: int = MISSING
    micro_sequences: int = 1
    ramp: list[RampConfig] = field(default_factory=list)


@dataclass
class OptimizerConfig:
    """AdamW. `independent` weight decay is not weakened by muP's rate multiplier, `coupled` (torch's) is."""

    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-10
    weight_decay: float = 0.1
    weight_decay_mode: str = "coupled"  # coupled | independent
    max_grad_norm: float = 1.0


@dataclass
class BalanceConfig:
    """Auxiliary losses on the routers; see train.balance."""

    scope: str = "lagged"  # lagged | accumulated | dp | micro
    pool: str = "layer"  # layer | all
    router_aux_loss_coef: float = 0.01
    router_z_loss_coef: float = 0.001


@dataclass
class EvaluationConfig:
    """Every so many steps (0: at the end only) validation loss on at most so many windows a corpus, and benchmarks."""

    every: int = 0
    sequences: int = 64
    tasks: list[str] = field(default_factory=list)  # of lm-eval, those that choose by log-probability; see train.tasks
    limit: int | None = None  # only the first so many questions of each task
    data: str | None = None  # the tasks' datasets, DIR/NAME/CONFIG/SPLIT; default: the hub's


@dataclass
class CheckpointConfig:
    """A checkpoint every so many steps (0: at the end only); the newest `keep` stay."""

    every: int = 0
    keep: int = 2


@dataclass
class EngineConfig:
    """What has to run the model, and how long all ranks may wait for one."""

    expect: str | None = None  # one of ENGINES: refuse to begin with another
    activation_checkpointing: bool = False  # keep only the layers' inputs, and compute the rest again: a quarter slower
    torch_compile: bool = False  # compile the layers, which takes half a minute and a C++ compiler on a CPU
    timeout: float = 1800.0  # seconds for a step, an evaluation, a save, or for all ranks to come together


@dataclass
class TrackerConfig:
    """accelerate's trackers beside metrics.jsonl, which is always written."""

    log_with: list[str] = field(default_factory=list)  # several of TRACKERS
    project: str = "powertrain"
    init_kwargs: dict[str, dict[str, Any]] = field(default_factory=dict)  # by tracker: what its own init takes


@dataclass
class Config:
    """A whole run. `schedule` holds the fields of one of the `schedulers`, and its `name`."""

    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    mup: MupConfig = field(default_factory=MupConfig)
    data: DataConfig = field(default_factory=DataConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    schedule: dict[str, Any] = field(default_factory=dict)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    balance: BalanceConfig = field(default_factory=BalanceConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    tracker: TrackerConfig = field(default_factory=TrackerConfig)
    precision: str = "bf16"  # bf16 | fp32
    threads: int | None = None  # of one CPU rank; default: its share of the cores
    sample_prompt: str | None = None  # text to continue when the run has ended

    @property
    def run_folder(self) -> Path:
        return Path(self.run.folder) / self.run.name

    @property
    def end_tokens(self) -> int:
        """Clock reading at the end of the budget."""
        return self.run.tokens_seen + self.run.tokens

    def batch_at(self, run_tokens: int) -> int:
        """Sequences in the step that begins after `run_tokens` tokens of this run."""
        sequences = self.batch.sequences
        for phase in self.batch.ramp:
            if run_tokens >= phase.from_tokens:
                sequences = phase.sequences
        return sequences

    def beta(self, sequences: int) -> float:
        """Batch size in the law's unit: tokens of a step over 4096."""
        return sequences * self.data.sequence_length / LAW_SEQUENCE_LENGTH

    @property
    def rewarmup_start(self) -> int | None:
        """Tokens at which a second warmup begins, if there is one; by default where the run's clock starts."""
        rewarmup = (self.schedule or {}).get("rewarmup") or {}
        if not rewarmup.get("tokens"):
            return None
        start = rewarmup.get("start")
        return self.run.tokens_seen if start is None else start

    def stages(self) -> list[tuple[int, dict[str, float]]]:
        """Rows (first sample, mixture): `data.mixture`, by default all corpora equally, then `data.stages`."""
        first = self.data.mixture or {name: 1.0 for name in self.data.corpora}
        length = self.data.sequence_length
        return [(0, first), *((-(-stage.from_tokens // length), stage.mixture) for stage in self.data.stages)]

    def make_schedule(self) -> schedulers.Schedule:
        """The schedule, with a decay that has no `start` put at the end of the budget."""
        fields = dict(self.schedule or {})
        name = fields.pop("name", None)
        rewarmup = fields.pop("rewarmup", None)
        fields.pop("belongs_to", None)  # of a fitted law; see train.model.mup
        if name in ("cosine", "constant"):
            fields.pop("decay", None)  # an experiment's, for the schedules that have one
        try:
            if (decay := fields.get("decay")) is not None:
                decay = dict(decay)
                if not decay.get("tokens"):
                    decay = None
                elif decay.get("start") is None:
                    decay["start"] = self.end_tokens - decay["tokens"]
                    if decay["start"] < 0:
                        raise ConfigError(
                            f"schedule.decay.tokens {decay['tokens']:,} is more than the whole run, which ends at "
                            f"{self.end_tokens:,} tokens. Shorten it, or set it to 0 for no decay."
                        )
                fields["decay"] = decay
            if name == "cosine" and fields.get("total_tokens") is None:
                fields["total_tokens"] = self.end_tokens
            schedule: schedulers.Schedule = schedulers.build(str(name), **fields)
            if rewarmup and rewarmup["tokens"]:
                start = self.rewarmup_start
                assert start is not None
                schedule = schedulers.Rewarmup(schedule=schedule, start=start, tokens=rewarmup["tokens"])
            return schedule
        except ConfigError:
            raise
        except (ValueError, TypeError) as error:
            raise ConfigError(f"schedule: {error}") from error


def from_hydra(composed: DictConfig) -> Config:
    """The checked `Config` of a composed Hydra configuration; with `run.init_from`, the model is that folder's.

    Raises:
        ConfigError: a value that is missing, or values that cannot work together.
    """
    config = unchecked(composed)
    check(config)
    return config


def unchecked(composed: DictConfig) -> Config:
    """As `from_hydra`, without looking at what the values are; see `problems`."""
    config = typed(composed, Config)
    if config.run.init_from is not None:
        from train.init_from import adopt  # imports Transformers

        adopt(config)
    return config


def load(path: Path, changed: dict[str, Any] | None = None, overrides: Sequence[str] = ()) -> Config:
    """The configuration that a run left in its config.yaml, with changes by dotted name and KEY=VALUE on top.

    Raises:
        ConfigError: no such file, one of another version, or a change that cannot be.
    """
    if not path.is_file():
        raise ConfigError(f"{path} does not exist; {path.parent} is not the folder of a run.")
    try:
        saved = DictConfig(OmegaConf.load(path))
        for name, value in (changed or {}).items():
            OmegaConf.update(saved, name, value, merge=False)
        given = OmegaConf.from_dotlist([as_typed(override) for override in overrides])
        config = typed(DictConfig(OmegaConf.merge(saved, given)), Config)
    except (OmegaConfBaseException, YAMLError, TypeError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{path}, or a change to it, cannot be read: {str(error).partition(chr(10))[0]}") from error
    check(config)
    return config


def data_from_hydra(composed: DictConfig) -> DataConfig:
    """The `data` of a composed configuration whose other settings need no value.

    Raises:
        ConfigError: a value that is missing.
    """
    data = typed(composed.data, DataConfig)
    _raise_first(_data_problems(data))
    return data


def typed(composed: DictConfig, kind: type[T]) -> T:
    try:
        if missing := sorted(OmegaConf.missing_keys(composed)):
            names = ", ".join(missing)
            raise ConfigError(
                f"These settings have no value yet: {names}. Give them as KEY=VALUE; +experiment=NAME brings most."
            )
        # As plain values first: a key added with + becomes part of the typed configuration.
        plain = OmegaConf.to_container(composed, resolve=True)
        for name, value in setting_values(plain):
            hint, each = type_of(name, kind), value if isinstance(value, list) else [value]
            if hint in (str, str | None, list[str]) and not all(isinstance(text, str | None) for text in each):
                raise ConfigError(f"{name} is a text, and YAML reads {value!r} here: put what is meant into quotes.")
        typed = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(kind), plain))
    except ConfigKeyError as error:
        hint = " An experiment is chosen with a plus: +experiment=NAME." if error.full_key == "experiment" else ""
        raise ConfigError(f"There is no setting '{error.full_key}'.{hint}") from error
    except MissingMandatoryValue as error:
        raise ConfigError(f"{error.full_key} has no value.") from error
    except OmegaConfBaseException as error:
        hint = " Whole numbers are written 1_000_000." if "Integer" in str(error) else ""
        raise ConfigError(f"{error.full_key}: {str(error).partition(chr(10))[0]}.{hint}") from error
    assert isinstance(typed, kind)
    return typed


def check(config: Config) -> None:
    """Raises ConfigError for what would fail later, or give a run that nobody meant."""
    _raise_first(problems(config))


def problems(config: Config) -> Iterator[str]:
    """All that `check` would raise, a paragraph each. Where values are out of their range, what follows from them is
    not looked at."""
    model, batch, length = config.model, config.batch, config.data.sequence_length
    yield from _unless_one_of("model.model_type", model.model_type, ("granitemoe", "granite"))
    yield from _unless_one_of("mup.rule", config.mup.rule, ("paper", "fan_in"))
    yield from _unless_one_of("balance.scope", config.balance.scope, ("lagged", "accumulated", "dp", "micro"))
    yield from _unless_one_of("balance.pool", config.balance.pool, ("layer", "all"))
    yield from _unless_one_of(
        "optimizer.weight_decay_mode", config.optimizer.weight_decay_mode, ("coupled", "independent")
    )
    yield from _unless_one_of("precision", config.precision, ("bf16", "fp32"))
    yield from _unless_one_of("model.attn_implementation", model.attn_implementation, ATTENTION)
    yield from _unless_one_of("model.experts_implementation", model.experts_implementation, EXPERTS)
    if config.engine.expect is not None:
        yield from _unless_one_of("engine.expect", config.engine.expect, ENGINES)
    for tracker in config.tracker.log_with:
        yield from _unless_one_of("tracker.log_with", tracker, TRACKERS)
    for tracker in config.tracker.init_kwargs:
        yield from _unless_one_of("A name in tracker.init_kwargs", tracker, config.tracker.log_with)
    for name, value in (
        ("model.vocab_size", model.vocab_size),
        ("model.hidden_size", model.hidden_size),
        ("model.intermediate_size", model.intermediate_size),
        ("model.num_hidden_layers", model.num_hidden_layers),
        ("model.num_attention_heads", model.num_attention_heads),
        ("mup.base_hidden_size", config.mup.base_hidden_size),
        ("data.sequence_length", length),
        ("batch.sequences", batch.sequences),
        ("batch.micro_sequences", batch.micro_sequences),
        ("run.tokens", config.run.tokens),
        ("optimizer.max_grad_norm", config.optimizer.max_grad_norm),
        ("model.rope_theta", model.rope_theta),
        ("model.rms_norm_eps", model.rms_norm_eps),
        ("model.initializer_range", model.initializer_range),
        *(
            (f"model.{name}", value)
            for name, value in vars(model).items()
            if name.endswith("_multiplier") and value is not None
        ),
        *((("model.logits_scaling", model.logits_scaling),) if model.logits_scaling is not None else ()),
        ("optimizer.eps", config.optimizer.eps),
        *((("threads", config.threads),) if config.threads is not None else ()),
        ("evaluation.sequences", config.evaluation.sequences),
        *((("evaluation.limit", config.evaluation.limit),) if config.evaluation.limit is not None else ()),
        ("engine.timeout", config.engine.timeout),
        ("checkpoint.keep", config.checkpoint.keep),
        *((f"batch.ramp[{i}].sequences", phase.sequences) for i, phase in enumerate(batch.ramp)),
    ):
        if not value > 0:
            yield f"{name} is {value}; it has to be greater than zero."
    if not 0 <= model.attention_dropout < 1:
        yield f"model.attention_dropout is {model.attention_dropout}; it is a share from 0 to below 1."
    if not -(2**63) <= config.run.seed < 2**63:
        yield f"run.seed is {config.run.seed}; it has to fit 64 bits."
    for name, value in (("evaluation.every", config.evaluation.every), ("checkpoint.every", config.checkpoint.every)):
        if value < 0:
            yield f"{name} is {value}; it is a number of steps, or 0 for the end only."
    if len(config.optimizer.betas) != 2 or not all(0 <= beta < 1 for beta in config.optimizer.betas):
        yield f"optimizer.betas is {list(config.optimizer.betas)}; it holds two numbers from 0 to below 1."
    if config.run.tokens_seen < 0:
        yield f"run.tokens_seen is {config.run.tokens_seen}; a token count cannot be negative."
    if Path(config.run.name).name != config.run.name or config.run.name in ("", ".", ".."):
        yield (
            f"run.name is '{config.run.name}'; it names one folder inside run.folder, so it cannot be empty, "
            "'.' or '..' or hold a path separator. Put the path into run.folder."
        )

    if model.hidden_size <= 0 or model.num_attention_heads <= 0:
        return
    heads, kv_heads = model.num_attention_heads, model.num_key_value_heads or model.num_attention_heads
    if model.hidden_size % heads:
        yield (
            f"model.hidden_size {model.hidden_size} is not divisible by model.num_attention_heads {heads}: "
            f"the head size would be {model.hidden_size / heads:.2f}. The paper keeps heads of 64."
        )
    if (model.hidden_size // heads) % 2:
        yield (
            f"The head size hidden_size / num_attention_heads = {model.hidden_size // heads} is odd; rotary "
            "position embeddings need an even one."
        )
    if kv_heads < 1 or heads % kv_heads:
        yield f"model.num_attention_heads {heads} is not divisible by model.num_key_value_heads {kv_heads}."
    if model.model_type == "granitemoe" and not 1 <= model.num_experts_per_tok <= model.num_local_experts:
        yield (
            f"model.num_experts_per_tok is {model.num_experts_per_tok} with model.num_local_experts "
            f"{model.num_local_experts}; a token needs at least one expert and at most all of them."
        )
    if model.max_position_embeddings is not None and model.max_position_embeddings < length:
        yield (
            f"data.sequence_length {length} is longer than model.max_position_embeddings "
            f"{model.max_position_embeddings}."
        )

    yield from _schedule_problems(config)
    for name, phases in (("batch.ramp", batch.ramp), ("data.stages", config.data.stages)):
        starts = [phase.from_tokens for phase in phases]
        if any(later <= earlier for earlier, later in zip([0, *starts], starts, strict=False)):
            yield f"{name} has from_tokens {starts}; they have to rise, from above zero."
    yield from _data_problems(config.data)
    for name, value in setting_values(config):
        if isinstance(value, float) and not math.isfinite(value):
            yield f"{name} is {value}; it has to be a finite number."


def _schedule_problems(config: Config) -> Iterator[str]:
    try:
        schedule = config.make_schedule()
    except ConfigError as error:
        yield str(error)
        return
    decay = getattr(schedule, "decay", None)
    if schedule.warmup_tokens >= config.end_tokens:
        yield (
            f"schedule.warmup_tokens {schedule.warmup_tokens:,} is not shorter than the run, which ends at "
            f"{config.end_tokens:,} tokens: the rate would never leave warmup. The paper's warmup of 1B tokens "
            "belongs to runs of 100B and more; 1 to 5% of the budget is common in short ones."
        )
    if decay is not None and decay.start + decay.tokens > config.end_tokens:
        yield (
            f"The decay starts at {decay.start:,} tokens and takes {decay.tokens:,}, but the run ends at "
            f"{config.end_tokens:,}: it would stop before the decay does. Shorten schedule.decay.tokens, or "
            f"raise run.tokens to {decay.start + decay.tokens - config.run.tokens_seen:,}."
        )


def _data_problems(data: DataConfig) -> Iterator[str]:
    corpora = data.corpora
    if data.workers is not None and data.workers < 1:
        yield f"data.workers is {data.workers}; it is a number of processes, one or more."
    for where, mixture in (
        ("data.mixture", data.mixture),
        *((f"data.stages from {s.from_tokens:,}", s.mixture) for s in data.stages),
    ):
        for name, weight in mixture.items():
            if name not in corpora:
                yield (
                    f"{where} names the corpus '{name}', which data.corpora does not define "
                    f"(it has: {', '.join(corpora) or 'none'})."
                )
            if not weight >= 0 or math.isinf(weight):
                yield f"{where} gives '{name}' the weight {weight}; weights are finite, 0 or more."


def check_batch(config: Config, world_size: int, tokens: int = 0) -> None:
    """Raises ConfigError unless the batch, `tokens` into the run and later, splits over ranks and micro-batches."""
    _raise_first(batch_problems(config, world_size, tokens))


def batch_problems(config: Config, world_size: int, tokens: int = 0) -> Iterator[str]:
    """All that `check_batch` would raise, a paragraph each."""
    micro = config.batch.micro_sequences
    ahead = [phase.sequences for phase in config.batch.ramp if phase.from_tokens > tokens]
    for sequences in (config.batch_at(tokens), *ahead):
        unit = micro * world_size
        if sequences % unit:
            below, above = sequences // unit * unit, -(-sequences // unit) * unit
            fitting = [m for m in range(1, sequences // world_size + 1) if sequences % (m * world_size) == 0]
            yield (
                f"A batch of {sequences} sequences does not split into micro-batches of {micro} on {world_size} "
                f"rank(s), {unit} sequences at a time. Batches near it that do: "
                f"{', '.join(str(n) for n in (below, above) if n)}. Values of batch.micro_sequences that fit "
                f"this batch: {', '.join(map(str, fitting)) or f'none on {world_size} ranks'}."
            )


def as_dict(config: Config) -> dict[str, Any]:
    """Plain containers, as written to config.yaml."""
    plain = OmegaConf.to_container(OmegaConf.structured(config), resolve=True)
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def _unless_one_of(name: str, value: str, allowed: Sequence[str]) -> Iterator[str]:
    if value not in allowed:
        yield f"{name} is '{value}'; it is one of {', '.join(allowed)}."


def _raise_first(found: Iterator[str]) -> None:
    for problem in found:
        raise ConfigError(problem)


def setting_values(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every setting of a configuration with its value, by dotted name."""
    entries = vars(node) if dataclasses.is_dataclass(node) else node
    for name, value in entries.items():
        if dataclasses.is_dataclass(value) or isinstance(value, dict):
            yield from setting_values(value, f"{prefix}{name}.")
        else:
            yield prefix + str(name), value


def type_of(name: str, kind: Any = Config) -> Any:
    """The type of a setting, by dotted name, or None where there is none of that name."""
    for part in name.split("."):
        if dataclasses.is_dataclass(kind):
            kind = get_type_hints(kind).get(part)
        else:  # a corpus, by its name
            kind = get_args(kind)[1] if get_origin(kind) is dict else None
    return kind


def as_typed(override: str, texts: Sequence[str] = ()) -> str:
    """KEY=VALUE with its value in quotes, where KEY is a text or one of `texts`: 123e456 is a name, and not infinity.

    `null` stays what it is where a text can be absent.
    """
    key, _, value = override.partition("=")
    name = key.lstrip("+")
    hint = str | None if name in texts else type_of(name)
    text = hint is str or (hint == str | None and value != "null")
    return f"{key}='{value}'" if text and re.fullmatch(r"[\w.:+/~-]+", value) else override


def setting_names(node: Any = Config, prefix: str = "") -> list[str]:
    """Every setting as a dotted name."""
    keys: list[str] = []
    for entry in dataclasses.fields(node):
        keys.append(prefix + entry.name)
        if dataclasses.is_dataclass(entry.default_factory):
            keys += setting_names(entry.default_factory, f"{prefix}{entry.name}.")
    return keys
