"""What is wrong with a configuration (problems), and what is allowed and seldom meant (doubts): a paragraph each."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

from powertrain.data import DataError
from powertrain.data.mixture import mixture_of
from powertrain.train.config import ATTENTION, ENGINES, EXPERTS, MODELS, TRACKERS, Config, DataConfig, setting_values
from powertrain.train.errors import ConfigError

ABOVE_CRITICAL = 0.1  # share of the tokens above the critical batch from which it is reported


def check(config: Config) -> None:
    """Check a configuration.

    Raises:
        ConfigError: it would fail later, or give a run that nobody meant.
    """
    _raise_first(problems(config))


def check_data(data: DataConfig) -> None:
    """Check its part `data` alone.

    Raises:
        ConfigError: as `check`.
    """
    _raise_first(_data_problems(data))


def problems(config: Config) -> Iterator[str]:
    """All that `check` would raise, a paragraph each. What follows from values that are out of range is not checked."""
    model, batch, length = config.model, config.batch, config.data.sequence_length
    for name, value in setting_values(config):
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            yield f"{name} is {value}; it has to fit 64 bits."
            return
    yield from _unless_one_of("model.model_type", model.model_type, MODELS)
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
        ("model.shared_intermediate_size", model.shared_intermediate_size),
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
    window = config.average.window
    if window is not None and not 0 < window <= 1:
        yield (
            f"average.window is {window}; it is a share of the tokens seen, above 0 and at most 1, such as 0.1. It is "
            "null where no running average is kept."
        )
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
    if model.is_moe and not 1 <= model.num_experts_per_tok <= model.num_local_experts:
        yield (
            f"model.num_experts_per_tok is {model.num_experts_per_tok} with model.num_local_experts "
            f"{model.num_local_experts}; a token needs at least one expert and at most all of them."
        )
    if model.model_type == "granitemoeshared" and model.shared_intermediate_size == 0:
        yield (
            "model.shared_intermediate_size is 0, which is the width of granitemoeshared's shared expert. Give it one "
            "above 0; the family without a shared expert is model.model_type=granitemoe."
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
    decay = schedule.decay
    if schedule.warmup_tokens >= config.end_tokens:
        yield (
            f"schedule.warmup_tokens {schedule.warmup_tokens:,} is not shorter than the run, which ends at "
            f"{config.end_tokens:,} tokens: the learning rate would never leave warmup. The paper's warmup of 1B "
            "tokens belongs to runs of 100B and more; 1 to 5% of the budget is common in short ones."
        )
    if decay is not None and decay.start + decay.tokens > config.end_tokens:
        yield (
            f"The decay starts at {decay.start:,} tokens and takes {decay.tokens:,}, but the run ends at "
            f"{config.end_tokens:,}: it would stop before the decay does. Shorten schedule.decay.tokens, or "
            f"raise run.tokens to {config.trained(decay.start + decay.tokens):,}."
        )


def _decay_problems(config: Config) -> Iterator[str]:
    """A decay in which no step begins: a step takes the learning rate at the tokens before it."""
    ramp = config.batch.ramp
    if min(config.data.sequence_length, config.batch.sequences, *(phase.sequences for phase in ramp)) <= 0:
        return
    try:
        schedule = config.make_schedule()
    except ConfigError:
        return  # reported by _schedule_problems
    if schedule.fall is None:
        return
    (start, end), decay, what = schedule.fall, schedule.decay, "decay"
    if decay is None:
        end, what = min(end, config.end_tokens), f"fall of the {config.schedule['name']}"
    if start >= config.run.tokens_seen and config.step_after(start) >= end:
        step = config.sequences_at(start) * config.data.sequence_length
        yield (
            f"The {what} from {start:,} to {end:,} tokens would never be seen: no step begins inside it, where a step "
            f"is {step:,} tokens and its learning rate that at the tokens before it. Make it longer than a step"
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
    decay = config.make_schedule().decay
    if decay is not None and not decay.floor and decay.start + decay.tokens < config.end_tokens:
        yield (
            f"The decay ends at {decay.start + decay.tokens:,} tokens and the run at {config.end_tokens:,}: in between "
            "the learning rate is 0. Leave schedule.decay.start out, and the decay ends with the run."
        )
    if config.model.is_moe and config.model.num_experts_per_tok == 1:
        yield (
            "model.num_experts_per_tok is 1: GraniteMoe weighs the chosen experts by a softmax over their logits, "
            "which for a single one is 1 whatever the router says. The router then learns from the balance and z "
            "losses alone, and from no token which expert suits it. Take 2 or more (docs/balance.md)."
        )


def batch_doubts(config: Config) -> Iterator[str]:
    """What a Power schedule's law makes doubtful about the batch, a paragraph each; a sweep goes beyond it on purpose.

    A batch above the critical batch is reported: the first one if it is for more than ABOVE_CRITICAL of the run (every
    batch is at the first tokens), one of batch.ramp if it is for more than that share of its own tokens; and not if
    that ends with the warmup. A batch that grows, and its learning rate with it, is reported if it stays below half of
    the critical batch: no cap is near.
    """
    power = config.make_schedule().power
    if power is None or power.batch_exponent <= 0:
        return
    above, grown, tokens_above, previous = [], [], 0, math.inf
    phases = config.batch_phases()
    for (begin, sequences), (end, _) in zip(phases, [*phases[1:], (config.run.tokens, 0)], strict=True):
        end, beta = min(end, config.run.tokens), config.beta(sequences)
        if begin >= end:
            break
        release = power.cap_release(beta)
        in_warmup = release <= power.warmup_tokens  # whose learning rates follow the law at its end
        until = math.ceil(min(end, config.trained(release)))
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
            f"{', '.join(above)}. There a larger batch {gains}. If a sweep has seen that schedule.max_lr is a cap, it "
            "also needs more tokens for the same loss: take a smaller one, or begin with one (`powertrain estimate … "
            "--ramp` prints a batch.ramp that follows the critical batch). If `powertrain fit` reported that it saw no "
            "cap, sweep larger batches first (docs/schedule.md)."
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


def check_batch(config: Config, world_size: int, tokens: int | None = None) -> None:
    """Check that every batch splits over ranks and micro-batches.

    Args:
        tokens: reading of the clock from which on batches are checked; default: the run's beginning.

    Raises:
        ConfigError: one does not.
    """
    _raise_first(batch_problems(config, world_size, tokens))


def batch_problems(config: Config, world_size: int, tokens: int | None = None) -> Iterator[str]:
    """All that `check_batch` would raise, a paragraph each."""
    micro = config.batch.micro_sequences
    for sequences in config.batches_from(config.run.tokens_seen if tokens is None else tokens):
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


def _unless_one_of(name: str, value: str, allowed: Sequence[str]) -> Iterator[str]:
    if value not in allowed:
        yield f"{name} is '{value}'; it is one of {', '.join(allowed)}."


def _raise_first(found: Iterator[str]) -> None:
    for problem in found:
        raise ConfigError(problem)
