"""Where a start of a run begins, and what may change when it resumes.

A change that would have altered what is already trained is refused with a diff; a change that lies ahead (budget,
decay, later stages, micro-batch, engine, logging) passes. Schedule and batch are compared by their values at the
steps already taken, not by their settings.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from powertrain.data.files import read_record
from powertrain.data.tokens import TokenFile
from powertrain.schedulers import Schedule
from powertrain.train.checkpoint import SAVED, available, load_state, newest_valid, read_state, trained_by, verified
from powertrain.train.compose import load
from powertrain.train.config import Config, as_dict
from powertrain.train.errors import ConfigError
from powertrain.train.state import Beginning, State

# How a step is computed, saved or logged, never what it computes.
_FREE = (
    "run.name",
    "run.folder",
    "run.tokens",
    "run.resume",
    "run.export",
    "batch.micro_sequences",
    "data.cache_dir",
    "data.workers",
    "data.tokenizer",  # compared by the tokens it made: fingerprints
    "model.attn_implementation",
    "model.experts_implementation",
    "evaluation",
    "checkpoint",
    "average",
    "engine",
    "tracker",
    "threads",
    "sample_prompt",
)
COMPARED = 16  # steps between two edges, where the batch is constant and the learning rate is one formula
TOKENIZER = "(tokenizer)"  # among the fingerprints of corpora, whose names have no brackets
_BY_EFFECT = (
    "run.tokens",
    "batch.sequences",
    "batch.ramp",
    "schedule",
    "data.mixture",
    "data.stages",
    "data.corpora",
)


def where_to_begin(config: Config, ranks: int) -> Beginning:
    """The checkpoint to resume from, and what has changed since. It changes nothing on disk; `checkpoint.tidy` does.

    Raises:
        ConfigError: no checkpoint is valid, run.resume does not fit the run's folder, or a changed setting affects what
            is already trained.
    """
    checkpoints, wanted = config.run_folder / "checkpoints", config.run.resume
    branched_off = parent(config.run_folder)
    chosen = None
    if wanted == "never":
        if available(checkpoints):
            raise ConfigError(
                f"run.resume=never, but {config.run_folder} holds checkpoints of an earlier run. Choose another "
                "run.name, or move that folder away."
            )
    elif wanted == "auto" or Path(wanted).resolve().parent != checkpoints.resolve():
        chosen = newest_valid(checkpoints)
        if chosen is None and wanted != "auto":  # the beginning of a branch off another run
            chosen = verified(Path(wanted))
        elif wanted != "auto" and branched_off != Path(wanted).resolve():
            raise ConfigError(
                f"{config.run_folder} has checkpoints of its own and did not begin from run.resume={wanted}. To branch "
                "off that one choose another run.name; to resume this run leave run.resume out."
            )
    else:
        chosen = verified(Path(wanted))
        if newer := [path for path in available(checkpoints) if path.name > chosen.name]:
            raise ConfigError(
                f"{config.run_folder} has gone further than run.resume={wanted}: it holds {newer[-1].name}. Move the "
                "newer checkpoints away to resume from there, or choose another run.name to branch off."
            )
    saved = config.run_folder / SAVED
    if wanted != "never" and saved.exists() and not available(checkpoints):
        step = saved.read_text(encoding="utf-8", errors="replace").strip()
        raise ConfigError(
            f"{config.run_folder} had saved step {step}, but there is no checkpoint in "
            f"{checkpoints}. Bring them back to resume; to begin again choose another run.name, or run.resume=never."
        )
    if chosen is None:
        return Beginning(None, False, {}, config.run.tokens_seen, branched_off)
    own = chosen.resolve().parent == checkpoints.resolve()
    tokens = load_state(chosen).tokens
    return Beginning(chosen, own, changes(chosen, config, ranks), tokens, branched_off if own else chosen.resolve())


def parent(folder: Path) -> Path | None:
    """The checkpoint of another run that the run in `folder` branched off, from its run.json."""
    recorded = read_record(folder / "run.json").get("parent", "")
    if isinstance(recorded, str) and recorded:
        return Path(recorded)
    if recorded is not None:  # run.json is lost; a branch's config.yaml has it, too
        with contextlib.suppress(ConfigError):
            resume = load(folder / "config.yaml").run.resume
            began = Path(resume).resolve()
            if resume not in ("auto", "never") and began.parent.parent != folder.resolve():
                return began
    return None


def changes(checkpoint: Path, config: Config, ranks: int) -> dict[str, list[Any]]:
    """What differs from the checkpoint's settings: setting, or `ranks` → [then, now].

    Raises:
        ConfigError: a difference that affects steps already taken.
    """
    then = load(checkpoint / "config.yaml")
    state = load_state(checkpoint)
    old, new = _flat(as_dict(then)), _flat(as_dict(config))
    differences = {
        name: [old.get(name), new.get(name)] for name in sorted({*old, *new}) if old.get(name) != new.get(name)
    }
    refused = {
        name: pair for name, pair in differences.items() if not _under(name, _FREE) and not _under(name, _BY_EFFECT)
    }
    if refused:
        raise ConfigError(
            f"The run cannot resume from step {state.step:,} with settings that it was not trained with:\n"
            f"{_diff(refused)}\nPut them back, or begin another run (run.name=…)."
        )
    if "run.tokens" in differences and config.end_tokens < min(state.tokens, then.end_tokens):
        raise ConfigError(
            f"run.tokens={config.run.tokens:,} ends at {config.end_tokens:,} tokens, and {state.tokens:,} are trained "
            f"already (the budget was {then.run.tokens:,}). Give a larger budget; for a model of fewer tokens branch "
            "off an earlier checkpoint (run.resume=PATH run.name=ANOTHER)."
        )
    decay = config.make_schedule().decay
    if "run.tokens" in differences and decay is not None and not decay.floor:
        ends = decay.start + decay.tokens
        if config.end_tokens > max(ends, then.end_tokens):
            parent = then.run.resume if then.run.resume not in ("auto", "never") else None
            longer = "" if parent is None else f", or branch a longer decay off {parent} (powertrain decay)"
            raise ConfigError(
                f"The decay ends at {ends:,} tokens, and from there to the end of run.tokens={config.run.tokens} the "
                "learning rate would be 0. Warm it up again from here, with a decay at the new end: "
                f"schedule.rewarmup.start={state.tokens} schedule.rewarmup.tokens=… schedule.decay.start=null{longer}."
            )
    effects = {name: pair for name, pair in differences.items() if _under(name, _BY_EFFECT)}
    if effects:
        check_steps_taken(then, config, state, effects)
        _check_samples_taken(then, config, state, effects)
    trained_on = trained_by(checkpoint)[1]
    return differences | ({"ranks": [trained_on, ranks]} if trained_on != ranks else {})


def why_losses_differ(checkpoint: Path, config: Config, ranks: int) -> str | None:
    """Why the losses will differ from those of an uninterrupted run by more than rounding, or None if they will not.

    They do when a batch is split into other forward passes, and something is counted or drawn in each.
    """
    then, state = load(checkpoint / "config.yaml"), load_state(checkpoint)
    micro = then.batch.micro_sequences, config.batch.micro_sequences
    on = trained_by(checkpoint)[1], ranks
    kernels = then.model.attn_implementation, config.model.attn_implementation
    changed = [
        f"{name} {pair[0]} → {pair[1]}"
        for name, pair in (("batch.micro_sequences", micro), ("ranks", on), ("model.attn_implementation", kernels))
        if pair[0] != pair[1]
    ]
    split = micro[0] != micro[1] or on[0] != on[1]
    batches = config.batches_from(state.tokens)
    whole = all(sequences <= m * n for sequences in batches for m, n in zip(micro, on, strict=True))
    scope = config.balance.scope
    balanced = config.model.is_moe and config.balance.router_aux_loss_coef != 0
    why = []
    # `micro` sees the same slices of a batch on any number of ranks, the others one slice of each rank at a time.
    if balanced and (
        (scope in ("accumulated", "dp") and split and not whole) or (scope == "micro" and micro[0] != micro[1])
    ):
        why.append(f"balance.scope={scope} counts the experts' tokens by them (lagged does not)")
    if config.model.attention_dropout and changed:
        why.append("attention dropout is drawn anew in each of them")
    if not why:
        return None
    return (
        f"{', '.join(changed)}: a batch goes forward in other parts than before, and {' and '.join(why)}. From step "
        f"{state.step + 1:,} on the losses are others than they would have been."
    )


def check_steps_taken(then: Config, now: Config, state: State, effects: dict[str, list[Any]]) -> None:
    """Check that batch and learning rate of every step already taken are the same under both configurations.

    Between two edges the batches are constant and each learning rate is one formula. Two different formulas agree at a
    step or two at most, so a few steps between two edges stand for all, however many there are.

    Args:
        effects: the changed settings, for the message.

    Raises:
        ConfigError: a step differs.
    """
    old, new = then.make_schedule(), now.make_schedule()
    rewarmed = now.rewarmup_start != then.rewarmup_start and now.rewarmup_start == state.tokens
    n, length, step = then.run.tokens_seen, then.data.sequence_length, 0
    edges = {math.ceil(edge) for edge in (*_edges(then, old), *_edges(now, new)) if n < edge < state.tokens}
    for edge in (*sorted(edges), state.tokens):
        sequences = then.sequences_at(n)
        size, beta = sequences * length, then.beta(sequences)
        steps = -((n - edge) // size)  # that begin before the edge
        spread = {(steps - 1) * i // COMPARED for i in range(COMPARED + 1)}
        for taken in sorted({*spread, 1, 2, steps - 3, steps - 2}):
            if not 0 <= taken < steps:
                continue
            number, at = step + taken + 1, n + taken * size
            other = now.sequences_at(at)
            if sequences != other:
                raise ConfigError(
                    f"Step {number:,} was taken with a batch of {sequences} sequences and would now have had {other}:\n"
                    f"{_diff(effects)}\nPut them back; a batch can grow from here on: "
                    f"batch.ramp=[{{from_tokens: {then.trained(state.tokens)}, sequences: …}}]."
                )
            rates = old(tokens=at, batch=beta), new(tokens=at, batch=beta)
            if rates[0] != rates[1] and not rewarmed:
                advice = "Put them back, or begin another run (run.name=…)."
                if old.phase(at) == "decay":
                    advice = (
                        "The decay had begun. Branch off a checkpoint before it (run.resume=PATH run.name=ANOTHER), or "
                        "warm the learning rate up again from here: "
                        f"schedule.rewarmup.start={state.tokens} schedule.rewarmup.tokens=…"
                    )
                raise ConfigError(
                    f"Step {number:,} was taken at the learning rate {rates[0]:.6g} and would now have had "
                    f"{rates[1]:.6g}:\n{_diff(effects)}\n{advice}"
                )
        step += max(0, steps)
        n += max(0, steps) * size


def _edges(config: Config, schedule: Schedule) -> Iterator[float]:
    """Tokens at which the batch changes, or the learning rate begins to follow another formula."""
    yield from (config.run.tokens_seen + phase.from_tokens for phase in config.batch.ramp)
    yield from schedule.edges([config.beta(sequences) for _, sequences in config.batch_phases()])


def _check_samples_taken(then: Config, now: Config, state: State, effects: dict[str, list[Any]]) -> None:
    """Check that the stages begun so far, and the corpora they draw from, are the same."""
    done = state.samples
    old, new = ([row for row in config.stages() if row[0] < done] for config in (then, now))
    if old != new:
        raise ConfigError(
            f"{done:,} sequences were drawn by other mixtures than these settings have:\n{_diff(effects)}\n"
            f"Put them back; a mixture can change from here on: data.stages=[…, {{from_tokens: "
            f"{done * then.data.sequence_length}, mixture: …}}]."
        )
    for name in {name for _, mixture in old for name in mixture}:
        if then.data.corpora[name] != now.data.corpora[name]:
            raise ConfigError(
                f"The corpus '{name}' was described otherwise when sequences of it were trained on:\n"
                f"{_diff(effects)}\nPut it back, or add the new description under another name."
            )


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """What a checkpoint records of its tokenizer, beside the fingerprints of the corpora."""
    return hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()


def check_fingerprints(checkpoint: Path, data_fingerprint: dict[str, str], files: Mapping[str, TokenFile]) -> None:
    """Check that tokenizer and tokens are those that the checkpoint was trained on.

    Raises:
        ConfigError: those of a corpus, which it names, or the tokenizer have changed.
    """
    trained_on = read_state(checkpoint)["data_fingerprint"]
    for name, fingerprint in trained_on.items():
        if data_fingerprint.get(name, fingerprint) != fingerprint:
            if name in files and files[name].sampled_fingerprint() == fingerprint:
                continue  # the checkpoint was written when that was the fingerprint
            if name == TOKENIZER:
                raise ConfigError(
                    f"The tokenizer is not the one that {checkpoint} was trained with. Name that one in "
                    "data.tokenizer.path; the run's own copy is in its folder tokenizer/."
                )
            raise ConfigError(
                f"The tokens of the corpus '{name}' are not those that {checkpoint} was trained on: its text or its "
                "tokenizer has changed. Restore it, or begin another run (run.name=…)."
            )


def _under(name: str, prefixes: tuple[str, ...]) -> bool:
    return any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes)


def _flat(node: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in node.items():
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def _diff(differences: dict[str, list[Any]]) -> str:
    return "\n".join(f"  {name}: {then} → {now}" for name, (then, now) in differences.items())
