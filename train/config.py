"""The configuration of a run: dataclasses, sizes derived from them, and the checks across fields.

Hydra composes `configs/`; `from_hydra` turns the result into a `Config` or says in one paragraph what is
wrong with it. Names are Transformers' wherever Transformers has one.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_args, get_origin, get_type_hints

import omegaconf._utils
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException
from yaml import CollectionNode, MappingNode, Node, YAMLError

from powertrain import schedulers
from powertrain.data import DataError, expand
from powertrain.data.mixture import mixture_of
from powertrain.data.prepare import TokenizerSpec
from powertrain.data.sources import Corpus
from powertrain.train.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Sequence

T = TypeVar("T")

# The unit of the law: a batch of 1 is 4096 tokens, whatever the sequence length (arXiv 2408.13359).
LAW_SEQUENCE_LENGTH = 4096

ATTENTION = ("auto", "eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3")
EXPERTS = ("auto", "eager", "sorted", "grouped_mm", "batched_mm", "sonicmoe")
ENGINES = ("plain", "ddp", "zero1", "zero2", "zero3")
TRACKERS = ("wandb", "tensorboard", "trackio", "comet_ml", "aim", "mlflow", "clearml", "dvclive", "swanlab")


ABOVE_CRITICAL = 0.1  # of the tokens, from which a batch above the critical one is pointed out
MOST_YAML_VALUES = 100_000
MOST_WRITTEN_OUT = 1_000_000  # characters and values, interpolations written out


class _Loader(omegaconf._utils.get_yaml_loader()):  # type: ignore[misc]
    """OmegaConf's, which copies what an alias stands for wherever it stands: nine lines can mean 10^9 values."""

    def get_single_node(self) -> Any:
        node = super().get_single_node()
        if node is not None and _values(node, {}) > MOST_YAML_VALUES:
            raise YAMLError(f"{node.start_mark.name} has more than {MOST_YAML_VALUES:,} values, aliases written out")
        return node


def _values(node: Node, counted: dict[int, float]) -> float:
    """How many values a node of YAML is with its aliases written out; infinitely many when it holds itself."""
    if id(node) not in counted:
        counted[id(node)] = math.inf
        inside = node.value if isinstance(node, CollectionNode) else []
        parts = itertools.chain(*inside) if isinstance(node, MappingNode) else inside
        counted[id(node)] = 1 + sum(_values(part, counted) for part in parts)
    return counted[id(node)]


omegaconf._utils.get_yaml_loader = lambda: _Loader  # Hydra's files, a run's config.yaml and KEY=VALUE are read by it


@dataclass
class RunConfig:
    """What to do, for how long, and where."""

    name: str = "run"  # the run's folder is folder/name
    folder: str = "runs"  # of all runs; relative to where the command is given
    seed: int = 0  # of the initial weights and of the order of samples
    tokens: int = MISSING  # budget of this run: without tokens_seen, but with what a branch's parent trained
    tokens_seen: int = 0  # where the clock of the schedule starts: tokens that the initial weights were trained on
    init_from: str | None = None  # a Hugging Face GraniteMoe or Granite model (folder or hub name), or a run's folder
    resume: str = "auto"  # auto: from the newest valid checkpoint; never: refuse if there is one; or a path

    def __post_init__(self) -> None:
        self.folder, self.resume = expand(self.folder), expand(self.resume)
        self.init_from = self.init_from and expand(self.init_from)


@dataclass
class ModelConfig:
    """Transformers' GraniteMoe or Granite configuration, by its names."""

    model_type: str = "granitemoe"  # granitemoe | granite
    vocab_size: int = MISSING  # rows of the embedding: the tokenizer's, or more
    hidden_size: int = MISSING  # width; muP's m_width is this over mup.base_hidden_size
    intermediate_size: int = MISSING  # of one expert, or of the dense MLP
    num_hidden_layers: int = MISSING  # blocks of attention and experts, or MLP
    num_attention_heads: int = MISSING  # the paper's heads are of 64: hidden_size / 64
    num_key_value_heads: int | None = None  # fewer share keys and values; default: num_attention_heads
    num_local_experts: int = 0  # of a layer; of no meaning for granite
    num_experts_per_tok: int = 0  # that a token is sent to (top-k); 2 or more, see docs/balance.md
    max_position_embeddings: int | None = None  # default: data.sequence_length
    rope_theta: float = 10000.0  # base of the rotary position embeddings
    rms_norm_eps: float = 1e-6  # added to the mean square in RMSNorm
    tie_word_embeddings: bool = True  # the output head is the embedding
    attention_dropout: float = 0.0  # share of attention weights that training drops
    initializer_range: float = 0.1  # σ of the embedding; internal matrices have σ / √m_width
    embedding_multiplier: float = 12.0  # on the output of the embedding
    residual_multiplier: float | None = None  # default: 1.4 / sqrt(num_hidden_layers)
    attention_multiplier: float | None = None  # default: 1 / head size
    logits_scaling: float | None = None  # default: m_width
    attn_implementation: str = "auto"  # one of ATTENTION
    experts_implementation: str = "auto"  # one of EXPERTS


@dataclass
class MupConfig:
    """Maximal update parametrisation, table 1 of arXiv 2408.13359."""

    base_hidden_size: int = 256  # d_base; m_width = hidden_size / d_base
    rule: str = "paper"  # paper | fan_in: what m is for the down-projection; see docs/mup.md


@dataclass
class StageConfig:
    """From this many tokens of the run on, samples are drawn by this mixture."""

    from_tokens: int = MISSING  # tokens of this run, as run.tokens counts: without tokens_seen
    mixture: dict[str, float] = field(default_factory=dict)  # corpus: weight


@dataclass
class DataConfig:
    """Corpora, the tokenizer, and the order in which windows of them are seen."""

    cache_dir: str = "~/.cache/powertrain"  # of tokenised corpora and trained tokenizers
    workers: int | None = None  # processes that tokenise what is not in the cache; default: one for each core
    sequence_length: int = 4096  # tokens of a window; the same for the whole run
    tokenizer: TokenizerSpec = field(default_factory=TokenizerSpec)  # path, or vocab_size of one that is trained
    corpora: dict[str, Corpus] = field(default_factory=dict)  # NAME: what it is made of
    mixture: dict[str, float] = field(default_factory=dict)  # corpus: weight, of which ratios count; default: equal
    stages: list[StageConfig] = field(default_factory=list)  # later mixtures, by tokens of the run


@dataclass
class RampConfig:
    """From this many tokens of the run on, a step holds this many sequences."""

    from_tokens: int = MISSING  # tokens of this run, as run.tokens counts: without tokens_seen
    sequences: int = MISSING  # of a step from there on


@dataclass
class BatchConfig:
    """Sequences in a step over all ranks, and in one forward pass of one rank."""

    sequences: int = MISSING  # of a step, over all ranks
    micro_sequences: int = 1  # of a forward pass of one rank; fewer take less memory
    ramp: list[RampConfig] = field(default_factory=list)  # larger batches, later in the run


@dataclass
class OptimizerConfig:
    """AdamW. `independent` weight decay is not weakened by muP's rate multiplier, `coupled` (torch's) is."""

    betas: tuple[float, float] = (0.9, 0.95)  # decays of the two moments
    eps: float = 1e-10  # added to the root of the second moment
    weight_decay: float = 0.1  # of matrices; norms have none
    weight_decay_mode: str = "coupled"  # coupled | independent
    max_grad_norm: float = 1.0  # a larger gradient is scaled down to this norm


@dataclass
class BalanceConfig:
    """Auxiliary losses on the routers of a mixture of experts."""

    scope: str = "lagged"  # lagged | accumulated | dp | micro: where loads are counted; see docs/balance.md
    pool: str = "layer"  # layer | all: what is to be balanced, each layer or their mean
    router_aux_loss_coef: float = 0.01  # of the balance loss of each layer
    router_z_loss_coef: float = 0.001  # of the z loss, which keeps router logits small


@dataclass
class EvaluationConfig:
    """Validation loss of every corpus that has a validation split, and benchmarks; also at the end."""

    every: int = 0  # steps between evaluations, the first before step 1; 0: at the end only
    sequences: int = 64  # windows of each corpus at most; `overall` is of all these windows, whatever the mixture
    tasks: list[str] = field(default_factory=list)  # of lm-eval, those that choose by log-probability
    limit: int | None = None  # only the first so many questions of each task
    data: str | None = None  # the tasks' datasets, DIR/NAME/CONFIG/SPLIT; default: the hub's


@dataclass
class CheckpointConfig:
    """Checkpoints, to resume and to branch from; also at the end."""

    every: int = 0  # steps between checkpoints; 0: at the end only
    keep: int = 2  # the newest so many stay


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
    project: str = "powertrain"  # that trackers file the run under
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

    def batch_phases(self) -> list[tuple[int, int]]:
        """(tokens of the run, sequences) where each batch size begins, in the order of the run."""
        return [(0, self.batch.sequences), *((phase.from_tokens, phase.sequences) for phase in self.batch.ramp)]

    def step_after(self, tokens: int) -> int:
        """Clock reading before the first step that begins after `tokens`, however long the budget."""
        begins, length = 0, self.data.sequence_length
        starts = [*(phase.from_tokens for phase in self.batch.ramp), math.inf]
        for until in starts:
            step = self.batch_at(begins) * length
            after = begins + max(0, (tokens - self.run.tokens_seen - begins) // step + 1) * step
            if after < until:
                return self.run.tokens_seen + after
            begins = max(begins, begins + -(-(int(until) - begins) // step) * step)
        raise AssertionError  # the last phase has no end

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


def from_hydra(composed: DictConfig, given: Collection[str] = ()) -> Config:
    """The checked `Config` of a composed Hydra configuration; with `run.init_from`, the model is that folder's.

    Args:
        given: settings of the model that were asked for by name; see `train.init_from.adopt`.

    Raises:
        ConfigError: a value that is missing, or values that cannot work together.
    """
    config = unchecked(composed, given)
    check(config)
    return config


def unchecked(composed: DictConfig, given: Collection[str] = ()) -> Config:
    """As `from_hydra`, without looking at what the values are; see `problems`."""
    config = typed(composed, Config)
    if config.run.init_from is not None:
        from powertrain.train.init_from import adopt  # imports Transformers

        adopt(config, given)
    return config


def load(path: Path, changed: dict[str, Any] | None = None, overrides: Sequence[str] = ()) -> Config:
    """The configuration that a run left in its config.yaml, with changes by dotted name and KEY=VALUE on top.

    Without a change it is not checked again: what an earlier version allowed can still be read, and gone on from.

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
    except (OmegaConfBaseException, YAMLError, TypeError, ValueError, RecursionError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{path}, or a change to it, cannot be read: {str(error).partition(chr(10))[0]}") from error
    if changed or overrides:
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
    check_interpolations(composed)  # before anything resolves them
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
                raise ConfigError(f"{name} takes text, but YAML reads {value!r}: put the value in quotes.")
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


def check_interpolations(composed: DictConfig) -> None:
    """Raises ConfigError where interpolations, written out, would mean more than a configuration can: as with aliases,
    thirty lines of ${a}${a} are 10^9 values."""
    root = OmegaConf.to_container(composed, resolve=False)
    sizes: dict[tuple[str, ...], float] = {}

    def size(path: tuple[str, ...], node: Any) -> float:
        """Characters and values of a node; infinitely many of one that holds itself."""
        if path not in sizes:
            sizes[path] = math.inf
            parts = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
            total = 1.0 + sum(size((*path, str(key)), part) for key, part in parts)
            if isinstance(node, str):
                total += len(node)
                for dots, name in re.findall(r"\$\{(\.*)([^${}:]+)\}", node):
                    target = (*(path[: -len(dots)] if dots else ()), *re.findall(r"[^.\[\]]+", name))
                    total += size(target, _at(root, target))
            sizes[path] = total
        return sizes[path]

    if size((), root) > MOST_WRITTEN_OUT:
        first = min((path for path in sizes if sizes[path] > MOST_WRITTEN_OUT), key=lambda path: sizes[path])
        raise ConfigError(
            f"With its interpolations written out the configuration has more than {MOST_WRITTEN_OUT:,} characters and "
            f"values, as {'.'.join(first)} alone has. Give the values themselves."
        )


def _at(node: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        try:
            node = node[int(key) if isinstance(node, list) else key]
        except (KeyError, IndexError, TypeError, ValueError):
            return None  # OmegaConf says so
    return node


def check(config: Config) -> None:
    """Raises ConfigError for what would fail later, or give a run that nobody meant."""
    _raise_first(problems(config))


def problems(config: Config) -> Iterator[str]:
    """All that `check` would raise, a paragraph each. Where values are out of their range, what follows from them is
    not looked at."""
    model, batch, length = config.model, config.batch, config.data.sequence_length
    for name, value in setting_values(config):
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            yield f"{name} is {value}; it has to fit 64 bits."
            return
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
    if Path(config.tracker.project).name != config.tracker.project or config.tracker.project in ("", ".", ".."):
        yield (
            f"tracker.project is '{config.tracker.project}'; it names one folder inside the run's, so it cannot be "
            "empty, '.' or '..' or hold a path separator."
        )
    for tracker in config.tracker.init_kwargs:
        if tracker not in config.tracker.log_with:
            yield (
                f"tracker.init_kwargs has settings for '{tracker}', which tracker.log_with does not name. Add it there "
                f"(tracker={tracker}), or remove these settings."
            )
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
        *((("model.num_key_value_heads", model.num_key_value_heads),) if model.num_key_value_heads is not None else ()),
        ("data.tokenizer.vocab_size", config.data.tokenizer.vocab_size),
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
    for name, value in (
        ("model.num_local_experts", model.num_local_experts),
        ("model.num_experts_per_tok", model.num_experts_per_tok),
        ("optimizer.weight_decay", config.optimizer.weight_decay),
        ("balance.router_aux_loss_coef", config.balance.router_aux_loss_coef),
        ("balance.router_z_loss_coef", config.balance.router_z_loss_coef),
    ):
        if not value >= 0:
            yield f"{name} is {value}; it has to be 0 or greater."
    if not 0 <= model.attention_dropout < 1:
        yield f"model.attention_dropout is {model.attention_dropout}; it is a share from 0 to below 1."
    for name, value in (("evaluation.every", config.evaluation.every), ("checkpoint.every", config.checkpoint.every)):
        if value < 0:
            yield f"{name} is {value}; it is a number of steps, or 0 for the end only."
    if len(config.optimizer.betas) != 2 or not all(0 <= beta < 1 for beta in config.optimizer.betas):
        yield f"optimizer.betas is {list(config.optimizer.betas)}; it holds two numbers from 0 to below 1."
    if config.run.tokens_seen < 0:
        yield f"run.tokens_seen is {config.run.tokens_seen}; a token count cannot be negative."
    unprintable = not config.run.name.isprintable() or not config.run.name.strip()
    if unprintable or Path(config.run.name).name != config.run.name or config.run.name in (".", ".."):
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
    yield from _decay_problems(config)
    for name, phases in (("batch.ramp", batch.ramp), ("data.stages", config.data.stages)):
        starts = [phase.from_tokens for phase in phases]
        if any(later <= earlier for earlier, later in zip([0, *starts], starts, strict=False)):
            yield f"{name} has from_tokens {starts}; they have to rise, from above zero."
    yield from _data_problems(config.data)
    for name, value in setting_values(config):
        if isinstance(value, float) and not math.isfinite(value):
            yield f"{name} is {value}; it has to be a finite number."


def _schedule_problems(config: Config) -> Iterator[str]:
    belongs_to = (config.schedule or {}).get("belongs_to")
    if belongs_to is not None and not isinstance(belongs_to, dict):
        yield f"schedule.belongs_to is {belongs_to!r}; it holds names and values of a parametrisation."
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


def _decay_problems(config: Config) -> Iterator[str]:
    """A decay in which no step begins: a step's rate is that at the tokens before it, and full at a decay's start."""
    ramp = config.batch.ramp
    if min(config.data.sequence_length, config.batch.sequences, *(phase.sequences for phase in ramp)) <= 0:
        return
    try:
        schedule: Any = config.make_schedule()
    except ConfigError:
        return  # said above
    schedule = getattr(schedule, "schedule", schedule)  # of a second warmup
    start, what = schedule.warmup_tokens, "fall of the cosine"
    end = min(getattr(schedule, "total_tokens", math.inf), config.end_tokens)
    if (decay := getattr(schedule, "decay", None)) is not None:
        start, end, what = decay.start, decay.start + decay.tokens, "decay"
    elif not isinstance(schedule, schedulers.Cosine):
        return
    if start >= config.run.tokens_seen and config.step_after(start) >= end:
        step = config.batch_at(start - config.run.tokens_seen) * config.data.sequence_length
        yield (
            f"The {what} from {start:,} to {end:,} tokens would never be seen: no step begins inside it, where a step "
            f"is {step:,} tokens and its rate that at the tokens before it. Make it longer than a step"
            + (", or set schedule.decay.tokens to 0 for no decay." if decay is not None else ".")
        )


def _data_problems(data: DataConfig) -> Iterator[str]:
    corpora = data.corpora
    if data.workers is not None and data.workers < 1:
        yield f"data.workers is {data.workers}; it is a number of processes, one or more."
    for where, mixture in (
        ("data.mixture", data.mixture),
        *((f"data.stages from {s.from_tokens:,}", s.mixture) for s in data.stages),
    ):
        for name in mixture:
            if name not in corpora:
                yield (
                    f"{where} names the corpus '{name}', which data.corpora does not define "
                    f"(it has: {', '.join(corpora) or 'none'})."
                )
        if mixture or where != "data.mixture":
            try:
                mixture_of(mixture)
            except DataError as error:
                yield f"{where}: {error}"


def doubts(config: Config) -> Iterator[str]:
    """What is allowed and seldom meant, a paragraph each."""
    decay = getattr(config.make_schedule(), "decay", None)
    if decay is not None and not decay.floor and decay.start + decay.tokens < config.end_tokens:
        yield (
            f"The decay ends at {decay.start + decay.tokens:,} tokens and the run at {config.end_tokens:,}: in between "
            "the rate is 0. Leave schedule.decay.start out, and the decay ends with the run."
        )
    if config.model.model_type == "granitemoe" and config.model.num_experts_per_tok == 1:
        yield (
            "model.num_experts_per_tok is 1: GraniteMoe weighs the chosen experts by a softmax over their logits, "
            "which for a single one is 1 whatever the router says. The router then learns from the balance and z "
            "losses alone, and from no token which expert suits it. Take 2 or more (docs/balance.md)."
        )


def batch_doubts(config: Config) -> Iterator[str]:
    """What a Power schedule's law says of the batch, a paragraph each; a sweep goes beyond it on purpose.

    The batch is pointed out where it lies above the critical batch: the first one for more than ABOVE_CRITICAL of the
    run (every batch does at the first tokens), one of batch.ramp for more than that share of its own tokens; and not if
    that is over with the warmup. A batch that grows, and its rate with it, is when it stays below half of the critical
    batch: no cap is near.
    """
    power = schedulers.power_of(config.make_schedule())
    if power is None or power.batch_exponent <= 0:
        return
    above, grown, tokens_above, previous = [], [], 0, math.inf
    phases = config.batch_phases()
    for (begin, sequences), (end, _) in zip(phases, [*phases[1:], (config.run.tokens, 0)], strict=True):
        end, beta = min(end, config.run.tokens), config.beta(sequences)
        if begin >= end:
            break
        release = power.cap_release(beta)
        in_warmup = release <= power.warmup_tokens  # whose rates go by the law at its end
        until = math.ceil(min(end, release - config.run.tokens_seen))
        if not in_warmup and until - begin > ABOVE_CRITICAL * (end - begin if begin else config.run.tokens):
            above.append(f"{sequences:,} sequences from {begin:,} to {until:,} tokens")
            tokens_above += until - begin
        critical = power.critical_batch(config.run.tokens_seen + begin)
        if sequences > previous and power.batch_exponent >= 1 and beta < critical / 2:
            grown.append(f"from {previous:,} to {sequences:,} sequences at {begin:,} tokens")
        previous = sequences
    if above:
        gains = "hardly raises the learning rate" if power.cap == "smooth" else "raises the learning rate no further"
        yield (
            f"The batch is above the schedule's critical batch in {tokens_above / config.run.tokens:.0%} of the run: "
            f"{', '.join(above)}. There a larger batch {gains}, and needs more tokens for the same loss. Take a "
            "smaller one, or begin with one: `powertrain estimate … --ramp` prints a batch.ramp that follows "
            "the critical batch (docs/schedule.md)."
        )
    if grown:
        yield (
            f"The batch grows {', '.join(grown)}, and the learning rate in proportion (schedule.batch_exponent "
            f"{power.batch_exponent:g}): no cap binds there, schedule.max_lr {power.max_lr:g} is more than twice the "
            "rate. In published runs of others (Step Law, arXiv 2503.04715) the best learning rate of a batch of 128 "
            "(× 4096 tokens), carried so to a batch of 512 without a cap, cost 1.35 nats on average. Go on if "
            "schedule.max_lr was found by a sweep (docs/law.md); if not, sweep it, or set a smaller "
            "schedule.batch_exponent."
        )


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
        elif isinstance(value, list) and any(
            dataclasses.is_dataclass(each) or isinstance(each, dict) for each in value
        ):
            yield from setting_values({f"{name}[{i}]": each for i, each in enumerate(value)}, prefix)
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
