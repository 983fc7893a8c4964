"""What may change when a run goes on, and what may not.

A change that would have altered what is already trained is refused with a diff; a change that lies ahead (budget,
decay, later stages, micro-batch, engine, logging) passes. Schedule and batch are judged by what they give for
the steps already taken, not by their spelling.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from train.checkpoint import load_state
from train.config import Config, ConfigError, as_dict, load
from train.state import State

# How a step is computed or told of, never what it computes.
_FREE = (
    "run.name",
    "run.folder",
    "run.tokens",
    "run.resume",
    "batch.micro_sequences",
    "data.cache_dir",
    "data.workers",
    "data.tokenizer",  # judged by the tokens it made: fingerprints
    "model.attn_implementation",
    "model.experts_implementation",
    "evaluation",
    "checkpoint",
    "engine",
    "tracker",
    "threads",
    "sample_prompt",
)
TOKENIZER = "(tokenizer)"  # among the fingerprints of corpora, whose names have no brackets
_BY_EFFECT = ("run.tokens", "batch", "schedule", "data.mixture", "data.stages", "data.corpora")


def changes(checkpoint: Path, config: Config) -> dict[str, list[Any]]:
    """What differs from the configuration that the checkpoint was trained with: setting → [then, now].

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
            f"The run cannot go on from step {state.step:,} with settings that it was not trained with:\n"
            f"{_diff(refused)}\nPut them back, or begin another run (run.name=…)."
        )
    effects = {name: pair for name, pair in differences.items() if _under(name, _BY_EFFECT)}
    if effects:
        _check_steps_taken(then, config, state, effects)
        _check_samples_taken(then, config, state, effects)
    return differences


def _check_steps_taken(then: Config, now: Config, state: State, effects: dict[str, list[Any]]) -> None:
    """Batch and rate of every step already taken are the same under both configurations."""
    old, new = then.make_schedule(), now.make_schedule()
    rewarmed = now.rewarmup_start != then.rewarmup_start and now.rewarmup_start == state.tokens
    n, length, step = then.run.tokens_seen, then.data.sequence_length, 0
    while n < state.tokens:
        step += 1
        sequences, other = (config.batch_at(n - config.run.tokens_seen) for config in (then, now))
        if sequences != other:
            raise ConfigError(
                f"Step {step:,} was taken with a batch of {sequences} sequences and would now have had {other}:\n"
                f"{_diff(effects)}\nPut them back; a batch can grow from here on: "
                f"batch.ramp=[{{from_tokens: {state.tokens - then.run.tokens_seen}, sequences: …}}]."
            )
        beta = then.beta(sequences)
        rates = old(tokens=n, batch=beta), new(tokens=n, batch=beta)
        if rates[0] != rates[1] and not rewarmed:
            advice = "Put them back, or begin another run (run.name=…)."
            if old.phase(n) == "decay":
                advice = (
                    "The decay had begun. Branch off a checkpoint before it (run.resume=PATH run.name=ANOTHER), or say "
                    "that the rate is to be warmed up again from here: "
                    f"schedule.rewarmup.start={state.tokens} schedule.rewarmup.tokens=…"
                )
            raise ConfigError(
                f"Step {step:,} was taken at the rate {rates[0]:.6g} and would now have had {rates[1]:.6g}:\n"
                f"{_diff(effects)}\n{advice}"
            )
        n += sequences * length


def _check_samples_taken(then: Config, now: Config, state: State, effects: dict[str, list[Any]]) -> None:
    """The stages begun so far, and the corpora they draw from, are the same."""
    done = state.samples
    old, new = ([row for row in config.stages() if row[0] < done] for config in (then, now))
    if old != new:
        raise ConfigError(
            f"{done:,} samples were drawn by other mixtures than these settings say:\n{_diff(effects)}\n"
            f"Put them back; a mixture can change from here on: data.stages=[…, {{from_tokens: "
            f"{done * then.data.sequence_length}, mixture: …}}]."
        )
    for name in {name for _, mixture in old for name in mixture}:
        if then.data.corpora[name] != now.data.corpora[name]:
            raise ConfigError(
                f"The corpus '{name}' was described otherwise when samples of it were trained on:\n"
                f"{_diff(effects)}\nPut it back, or add the new description under another name."
            )


def check_fingerprints(checkpoint: Path, data_fingerprint: dict[str, str]) -> None:
    """The bytes that samples are drawn from are those of before.

    Raises:
        ConfigError: naming the corpus.
    """
    trained_on = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))["data_fingerprint"]
    for name, fingerprint in trained_on.items():
        if data_fingerprint.get(name, fingerprint) != fingerprint:
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
