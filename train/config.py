"""The configuration of a run: dataclasses, and what follows from them. train.compose makes it, train.check checks it.

Names are Transformers' wherever Transformers has one.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from omegaconf import MISSING, OmegaConf

from powertrain import schedulers
from powertrain.data import expand
from powertrain.data.prepare import TokenizerSpec
from powertrain.data.sources import Corpus
from powertrain.train.errors import ConfigError

Number = TypeVar("Number", int, float)

# The unit of the law: a batch of 1 is 4096 tokens, whatever the sequence length (arXiv 2408.13359).
LAW_SEQUENCE_LENGTH = 4096

ATTENTION = ("auto", "eager", "sdpa", "blockwise", "flex_attention", "flash_attention_2", "flash_attention_3")
MOE = ("granitemoe", "granitemoeshared")  # Transformers' model types of mixtures of experts
MODELS = (*MOE, "granite")
EXPERTS = ("auto", "eager", "sorted", "grouped_mm", "batched_mm", "sonicmoe")
ENGINES = ("plain", "ddp", "zero1", "zero2", "zero3")
TRACKERS = ("wandb", "tensorboard", "trackio", "comet_ml", "aim", "mlflow", "clearml", "dvclive", "swanlab")


@dataclass
class RunConfig:
    """What to do, for how long, and where."""

    name: str = "run"  # the run's folder is folder/name
    folder: str = "runs"  # of all runs; relative to where the command is given
    seed: int = 0  # of the initial weights and of the order of sequences
    tokens: int = MISSING  # budget of this run: without tokens_seen, but with what a branch's parent trained
    tokens_seen: int = 0  # where the clock of the schedule starts: tokens that the initial weights were trained on
    init_from: str | None = None  # a Hugging Face model of a family of ours (folder or hub name), or a run's folder
    resume: str = "auto"  # auto: from the newest valid checkpoint; never: refuse if there is one; or a path
    export: bool = True  # at its end, write the model as a Hugging Face folder, and report.html; sweeps do not

    def __post_init__(self) -> None:
        self.folder, self.resume = expand(self.folder), expand(self.resume)
        self.init_from = self.init_from and expand(self.init_from)


@dataclass
class ModelConfig:
    """Transformers' configuration of the model's family, by its names."""

    model_type: str = "granitemoe"  # one of MODELS
    vocab_size: int = MISSING  # rows of the embedding: the tokenizer's, or more
    hidden_size: int = MISSING  # width; muP's m_width is this over mup.base_hidden_size
    intermediate_size: int = MISSING  # of one expert, or of the dense MLP
    num_hidden_layers: int = MISSING  # blocks of attention and experts, or MLP
    num_attention_heads: int = MISSING  # the paper's heads are of 64: hidden_size / 64
    num_key_value_heads: int | None = None  # fewer share keys and values; default: num_attention_heads
    num_local_experts: int = 0  # of a layer; of no meaning for granite
    num_experts_per_tok: int = 0  # that a token is sent to (top-k); 2 or more, see docs/balance.md
    shared_intermediate_size: int = 0  # of the expert that every token meets, in granitemoeshared alone
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

    @property
    def is_moe(self) -> bool:
        """Whether a router sends each token to some of a layer's experts."""
        return self.model_type in MOE

    @property
    def shared_size(self) -> int:
        """Width of the shared expert of a layer; 0: there is none."""
        return self.shared_intermediate_size if self.model_type == "granitemoeshared" else 0


@dataclass
class MupConfig:
    """Maximal update parametrisation, table 1 of arXiv 2408.13359."""

    base_hidden_size: int = 256  # d_base; m_width = hidden_size / d_base
    rule: str = "paper"  # paper | fan_in: what m is for the down-projection; see docs/mup.md


@dataclass
class StageConfig:
    """From this many tokens of the run on, sequences are drawn by this mixture."""

    from_tokens: int = MISSING  # tokens of this run, as run.tokens counts: without tokens_seen
    mixture: dict[str, float] = field(default_factory=dict)  # corpus: weight


@dataclass
class DataConfig:
    """Corpora, the tokenizer, and the order in which sequences of them are trained on."""

    cache_dir: str = "~/.cache/powertrain"  # of tokenised corpora and trained tokenizers
    workers: int | None = None  # processes that tokenise what is not in the cache; default: one for each core
    sequence_length: int = 4096  # tokens of a sequence; the same for the whole run
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
    """AdamW. `independent` weight decay is not weakened by muP's learning-rate multiplier, `coupled` (torch's) is."""

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
    sequences: int = 64  # of each corpus at most; `overall` is over all of them, whatever the mixture
    tasks: list[str] = field(default_factory=list)  # of lm-eval, those that choose by log-probability
    limit: int | None = None  # only the first so many questions of each task
    data: str | None = None  # the tasks' datasets, DIR/NAME/CONFIG/SPLIT; default: the hub's


@dataclass
class CheckpointConfig:
    """Checkpoints, to resume and to branch from; also at the end."""

    every: int = 0  # steps between checkpoints; 0: at the end only
    keep: int = 2  # the newest so many stay


@dataclass
class AverageConfig:
    """A running average of the weights beside them, evaluated and exported too; see docs/averages.md."""

    window: float | None = None  # share of the tokens seen that it is over, above 0 to 1; default: none is kept


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
    average: AverageConfig = field(default_factory=AverageConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    tracker: TrackerConfig = field(default_factory=TrackerConfig)
    precision: str = "bf16"  # bf16 | fp32
    threads: int | None = None  # of one CPU rank; default: its share of the cores
    sample_prompt: str | None = None  # text to continue when the run has ended

    @property
    def run_folder(self) -> Path:
        """run.folder/run.name."""
        return Path(self.run.folder) / self.run.name

    @property
    def end_tokens(self) -> int:
        """Clock reading at the end of the budget."""
        return self.run.tokens_seen + self.run.tokens

    def trained(self, tokens: Number) -> Number:
        """Tokens trained in this run at a reading of the clock, which begins at `run.tokens_seen`."""
        return tokens - self.run.tokens_seen

    def sequences_at(self, tokens: int) -> int:
        """Sequences in the step that begins at this reading of the clock."""
        return self.batches_from(tokens)[0]

    def batches_from(self, tokens: int) -> list[int]:
        """Sequences in the step that begins at this reading of the clock, and those of later steps as they change."""
        phases = self.batch_phases()
        begun = [sequences for start, sequences in phases if start <= self.trained(tokens)] or [self.batch.sequences]
        return [begun[-1], *(sequences for start, sequences in phases if start > self.trained(tokens))]

    def batch_phases(self) -> list[tuple[int, int]]:
        """(tokens of the run, sequences) where each batch size begins, in the order of the run."""
        return [(0, self.batch.sequences), *((phase.from_tokens, phase.sequences) for phase in self.batch.ramp)]

    def step_after(self, tokens: int) -> int:
        """Clock reading before the first step that begins after `tokens`, however long the budget."""
        begins, length = self.run.tokens_seen, self.data.sequence_length
        for until in (*(self.run.tokens_seen + phase.from_tokens for phase in self.batch.ramp), math.inf):
            step = self.sequences_at(begins) * length
            after = begins + max(0, (tokens - begins) // step + 1) * step
            if after < until:
                return after
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
        """Rows (first sequence, mixture): `data.mixture`, by default all corpora equally, then `data.stages`."""
        first = self.data.mixture or {name: 1.0 for name in self.data.corpora}
        length = self.data.sequence_length
        return [(0, first), *((-(-stage.from_tokens // length), stage.mixture) for stage in self.data.stages)]

    def make_schedule(self) -> schedulers.Schedule:
        """The schedule; a decay without `start`, and a cosine without `total_tokens`, end with the budget.

        Raises:
            ConfigError: `schedule` names no schedule, or has a field or value that it refuses.
        """
        fields = dict(self.schedule or {})
        name = fields.pop("name", None)
        rewarmup = fields.pop("rewarmup", None)
        fields.pop("belongs_to", None)  # of a fitted law; see train.model.mup
        if "decay" not in schedulers.fields_of(str(name)):
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
            if "total_tokens" in schedulers.fields_of(str(name)) and fields.get("total_tokens") is None:
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


def as_dict(config: Config) -> dict[str, Any]:
    """Plain containers, as written to config.yaml."""
    plain = OmegaConf.to_container(OmegaConf.structured(config), resolve=True)
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


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


def setting_names(node: Any = Config, prefix: str = "") -> list[str]:
    """Every setting as a dotted name."""
    keys: list[str] = []
    for entry in dataclasses.fields(node):
        keys.append(prefix + entry.name)
        if dataclasses.is_dataclass(entry.default_factory):
            keys += setting_names(entry.default_factory, f"{prefix}{entry.name}.")
    return keys
