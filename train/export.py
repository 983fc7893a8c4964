"""A model as a Hugging Face folder: weights, configuration, tokenizer, model card; loaded again and compared."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from powertrain.data.files import replace_folder
from powertrain.data.tokenizer import SAMPLE, load_tokenizer, save_tokenizer
from powertrain.train.checkpoint import available, step_of
from powertrain.train.config import Config, setting_values
from powertrain.train.errors import ConfigError, RunFailed
from powertrain.train.metrics import parameters_of
from powertrain.train.model import granite
from powertrain.train.state import RAW, State
from powertrain.train.track import is_of_corpus, weights_of

_MARK = ".powertrain"  # in a folder that an export wrote, and so may replace: the steps its weights were trained
TOLERANCE = 1e-5  # largest difference of a logit, float32


def in_working_precision(config: Config, master: Tensor) -> Tensor:
    """A copy on the CPU of a float32 master, as the forward pass uses it: `precision`."""
    return master.detach().to("cpu", torch.bfloat16 if config.precision == "bf16" else torch.float32, copy=True)


def export(
    config: Config,
    weights: dict[str, Tensor],
    logits: Tensor,
    probe: Tensor,
    tokenizer_folder: Path,
    folder: Path,
    facts: dict[str, Any],
    merge: dict[str, Any] | None = None,
) -> float:
    """Write a model to `folder`, load it again with Transformers alone, compare tokens and logits. In one process.

    Transformers 4 and 5 load it alike. Its tokenizer pads on the left, with the end of text where it has no padding
    token, and has the model's number of positions.

    Args:
        weights: by parameter name, in working precision.
        logits: (B, S, V) float32, by the trainer's forward pass, of
        probe: (B, S) token ids.
        facts: rows of the model card about the training: tokens, validation losses, …
        merge: for merge.json, what a merged model was made from.

    Returns:
        The largest difference of a logit.

    Raises:
        RunFailed: it is above TOLERANCE, or a text has other tokens; the folder is not put in place.
        ConfigError: `folder` holds anything that an export does not write.
    """
    check_target(folder)
    model = granite.build(config, "meta")
    tokenizer = load_tokenizer(tokenizer_folder)
    hf_config = type(model.config).from_dict(model.config.to_dict())
    hf_config.dtype = next(iter(weights.values())).dtype
    hf_config.architectures = [type(model).__name__]
    hf_config.rope_theta = config.model.rope_theta  # where Transformers 4 looks for it
    hf_config.bos_token_id, hf_config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        # Not in the model's configuration: continued training would then have no gradient for the end of text.
        tokenizer.pad_token = tokenizer.eos_token
    else:
        hf_config.pad_token_id = tokenizer.pad_token_id
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    difference = math.nan

    def write(partial: Path) -> None:
        nonlocal difference
        try:
            model.save_pretrained(partial, state_dict=weights)
        except SafetensorError as error:  # how safetensors reports a full disk
            shutil.rmtree(partial, ignore_errors=True)
            raise RunFailed(f"The model could not be written to {folder}: {error}. Checkpoints are intact.") from error
        hf_config.save_pretrained(partial)
        GenerationConfig(**ids).save_pretrained(partial)
        save_tokenizer(tokenizer, partial, padding_side="left", model_max_length=hf_config.max_position_embeddings)
        (partial / "README.md").write_text(_model_card(config, facts, tokenizer), encoding="utf-8")
        if merge is not None:
            (partial / "merge.json").write_text(json.dumps(merge, indent=1) + "\n", encoding="utf-8")
        (partial / _MARK).write_text(facts.get("steps", ""), encoding="utf-8")
        texts = [SAMPLE, *tokenizer.batch_decode(probe)]
        loaded = AutoTokenizer.from_pretrained(partial)(texts, verbose=False)["input_ids"]
        if loaded != tokenizer(texts)["input_ids"]:
            raise RunFailed(
                f"The exported tokenizer gives other tokens than the one in {tokenizer_folder}: for {SAMPLE!r} "
                f"{loaded[0]}, not {tokenizer(SAMPLE)['input_ids']}. It was left in {partial}; the checkpoint is not "
                "affected."
            )
        difference = _largest_logit_difference(config, partial, probe, logits)
        if not difference <= TOLERANCE:
            raise RunFailed(
                f"The exported model's logits differ from the trainer's by {difference:.3g}, more than {TOLERANCE}. "
                f"It was left in {partial}; the checkpoint is not affected."
            )

    replace_folder(folder, write)
    return difference


def check_target(folder: Path) -> None:
    """Check that `folder` is new, or an earlier export to replace.

    Raises:
        ConfigError: it is neither.
    """
    if folder.is_symlink():
        raise ConfigError(f"{folder} is a link; give the plain path of the model folder.")
    if folder.exists() and not (folder / _MARK).is_file():
        raise ConfigError(f"{folder} exists and was not written by an export; it is not replaced. Choose another.")


@torch.no_grad()
def _largest_logit_difference(config: Config, folder: Path, probe: Tensor, logits: Tensor) -> float:
    device = logits.device
    kernels = granite.implementations(config, device)
    loaded = AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto", device_map=device, use_safetensors=True, trust_remote_code=False, **kernels
    ).eval()
    ids = probe.to(device)
    positions = torch.arange(ids.shape[1], device=device).expand_as(ids)
    exported = loaded(input_ids=ids, position_ids=positions, use_cache=False).logits.float()
    return (logits - exported).abs().max().item()


def config_in(folder: str | Path) -> Any:
    """The Transformers configuration in `folder` (or of that name), which brings no code with it.

    Raises:
        ValueError: it does, as a class of its own or as an attention kernel that is fetched from the hub.
    """
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if "/" in str(config._attn_implementation):
        raise ValueError(f"its config.json names the attention {config._attn_implementation}, which would be run")
    return config


def load(folder: str | Path) -> tuple[Any, Any]:
    """The tokenizer and the model in `folder`, by Transformers alone, in the precision that it was saved in.

    The tokenizer is that of tokenizer.json; see data.tokenizer.

    Raises:
        ConfigError: a file of it is missing or damaged.
    """
    try:
        config_in(folder)
        tokenizer = load_tokenizer(folder)
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype="auto", device_map="auto", use_safetensors=True, trust_remote_code=False
        )
        return tokenizer, model.eval()
    except Exception as error:  # whatever is wrong with a file
        message = " ".join(str(error).split()).rstrip(".")
        raise ConfigError(
            f"{folder} cannot be loaded: {message}. If a file of it is missing or damaged, export it again."
        ) from error


def warn_if_outdated(folder: Path) -> None:
    """Say so where `folder` is a run's model/ or model-average/ and the run has a checkpoint of a later step."""
    mark, saved = folder / _MARK, available(folder.parent / "checkpoints")
    of = mark.read_text(encoding="utf-8") if mark.is_file() else ""
    if folder.name in ("model", "model-average") and of and saved and f"{step_of(saved[-1]):,}" != of:
        print(
            f"Warning: {folder} is of step {of}, and the run's newest checkpoint is of step {step_of(saved[-1]):,}. "
            f"`powertrain export {folder.parent}` replaces it.",
            file=sys.stderr,
        )


def generate(folder: str | Path, prompt: str, max_new_tokens: int, seed: int | None = None) -> str:
    """The prompt continued by the model in `folder`: greedily, or sampled when a seed is given.

    Raises:
        ConfigError: see `load`.
    """
    tokenizer, model = load(folder)
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    if seed is not None:
        torch.manual_seed(seed)
    with torch.no_grad():
        output = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=max_new_tokens,
            do_sample=seed is not None,
        )
    return str(tokenizer.decode(output[0], skip_special_tokens=True))


def facts_of(state: State, evaluations: Iterable[dict[str, Any]], window: float | None = None) -> dict[str, str]:
    """Rows of the model card: tokens and steps trained, and the losses in lines of evals.jsonl.

    Args:
        window: of the running average that the model is; None for the weights themselves.
    """
    facts = {"tokens": f"{state.tokens:,}", "steps": f"{state.step:,}"}
    if window is not None:
        facts["weights"] = f"a running average over a window of {window:g} of the tokens seen"
    for line in sorted(evaluations, key=lambda line: line.get("corpus") == "overall"):
        if is_of_corpus(line) and (weights_of(line) == RAW) == (window is None):  # and not of a benchmark, or edited
            facts[f"validation loss, {line['corpus']}"] = loss_text(line)
    return facts


def loss_text(line: dict[str, Any]) -> str:
    """The loss in a line of evals.jsonl, with its units and number of targets."""
    return f"{in_units(line)} ({line['targets']:,} targets)"


def in_units(line: dict[str, Any]) -> str:
    """A loss in nats a token and, where the bytes are known, bits a byte."""
    bits = "" if line["bits_per_byte"] is None else f", {line['bits_per_byte']:.4f} bits a byte"
    return f"{math.nan if line['loss'] is None else line['loss']:.4f} nats a token{bits}"


def _hub_name(path: str | None) -> str | None:
    """The name of something on the hub; None for a local path, which does not belong into a model card."""
    return path if path and re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", path) and not os.path.exists(path) else None


def _mixtures(config: Config) -> str:
    """Each corpus's share of the sequences, and from which of the run's tokens on."""
    parts = []
    for start, (_, mixture) in zip([0, *(s.from_tokens for s in config.data.stages)], config.stages(), strict=True):
        shares = ", ".join(f"{name} {weight / sum(mixture.values()):.3g}" for name, weight in mixture.items())
        parts.append(f"from {start:,} tokens: {shares}" if start else shares)
    return "; ".join(parts)


def _model_card(config: Config, facts: dict[str, Any], tokenizer: Any) -> str:
    counts = parameters_of(config)
    family = granite.CLASSES[config.model.model_type].__name__.removesuffix("ForCausalLM")
    kind = family if config.model.is_moe else f"dense {family}"
    fields = {name: value for name, value in config.schedule.items() if name not in ("name", "belongs_to")}
    schedule = ", ".join(f"{name} {value}" for name, value in setting_values(fields) if value is not None)
    rows = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    corpora = ", ".join(
        f"{name} ({_hub_name(corpus.path) or corpus.source})" for name, corpus in config.data.corpora.items()
    )
    tokens = [
        f"{type(tokenizer.backend_tokenizer.model).__name__} of {len(tokenizer):,} tokens",
        "`{}` ends a text".format(tokenizer.eos_token.replace("|", r"\|")),
        _hub_name(config.data.tokenizer.path),
    ]
    balance = ""
    if config.model.is_moe:
        own = config.balance.router_aux_loss_coef
        exported = granite.transformers_config(config).router_aux_loss_coef
        balance = (
            f"\n| load balancing | {own:g} for each layer, whose loss is 1 when balanced; `router_aux_loss_coef` is "
            f"{exported:g} = {own:g} · layers / top-k, as Transformers' loss pools all layers and is top-k when "
            "balanced |"
        )
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [{config.model.model_type}, powertrain]
---

# {config.run.name}

A {kind} language model pretrained with powertrain: {granite.shape_of(config)};
{counts["total"]:,} parameters, {counts["active"]:,} active for a token besides the embedding.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
model = AutoModelForCausalLM.from_pretrained("path/to/this/folder", device_map="auto")
inputs = tokenizer("your text", return_tensors="pt").to(model.device)
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))
```

## Training

| | |
|---|---|
{rows}
| data | {corpora} |
| mixture | {_mixtures(config)} |
| tokenizer | {", ".join(filter(None, tokens))} |
| schedule | {config.schedule.get("name")}: {schedule} |
| batch | {config.batch.sequences} sequences of {config.data.sequence_length} tokens |
| muP | d_base {config.mup.base_hidden_size}, init std {config.model.initializer_range}, rule {config.mup.rule} |
| optimizer | AdamW {json.dumps(list(config.optimizer.betas))}, weight decay {config.optimizer.weight_decay} \
({config.optimizer.weight_decay_mode}) |
| precision | {config.precision} |{balance}

It is a base model: it continues text. It was not aligned, filtered or tested for any use.
"""
