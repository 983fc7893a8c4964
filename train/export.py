"""A finished run as a Hugging Face folder: weights, configuration, tokenizer, model card; checked on the way out."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from train.config import Config, ConfigError, RunFailed
from train.environment import replace_folder
from train.metrics import parameters_of
from train.model import granite

_MARK = ".powertrain"  # in a folder that an export wrote, and so may replace
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
) -> float:
    """Write a model to `folder`, load it again with Transformers alone, and compare logits. In one process.

    Args:
        weights: by parameter name, in working precision.
        logits: (B, S, V) float32, by the trainer's forward pass, of
        probe: (B, S) token ids.
        facts: what the model card tells of the training: tokens, validation losses, …

    Returns:
        The largest difference of a logit.

    Raises:
        RunFailed: it is above TOLERANCE; the folder is not put in place.
        ConfigError: `folder` holds anything that an export does not write.
    """
    check_target(folder)
    model = granite.build(config, "meta")
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    hf_config = type(model.config).from_dict(model.config.to_dict())
    hf_config.dtype = next(iter(weights.values())).dtype
    hf_config.architectures = [type(model).__name__]
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(hf_config, name, getattr(tokenizer, name))
    difference = math.nan

    def write(partial: Path) -> None:
        nonlocal difference
        try:
            model.save_pretrained(partial, state_dict=weights)
        except SafetensorError as error:  # how safetensors reports a full disk
            shutil.rmtree(partial, ignore_errors=True)
            raise RunFailed(f"The model could not be written to {folder}: {error}. Checkpoints are intact.") from error
        hf_config.save_pretrained(partial)
        GenerationConfig.from_model_config(hf_config).save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        (partial / "README.md").write_text(_model_card(config, facts), encoding="utf-8")
        (partial / _MARK).touch()
        difference = _largest_logit_difference(config, partial, probe, logits)
        if not difference <= TOLERANCE:
            raise RunFailed(
                f"The exported model's logits differ from the trainer's by {difference:.3g}, more than {TOLERANCE}. "
                f"It was left in {partial}; the checkpoint is not affected."
            )

    replace_folder(folder, write)
    return difference


def check_target(folder: Path) -> None:
    """Raises ConfigError unless `folder` is new, or an earlier export to replace."""
    if folder.is_symlink():
        raise ConfigError(f"{folder} is a link; give the plain path of the model folder.")
    if folder.exists() and not (folder / _MARK).is_file():
        raise ConfigError(f"{folder} exists and was not written by an export; it is not replaced. Choose another.")


@torch.no_grad()
def _largest_logit_difference(config: Config, folder: Path, probe: Tensor, logits: Tensor) -> float:
    device = logits.device
    kernels = granite.implementations(config, device)
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", device_map=device, **kernels).eval()
    ids = probe.to(device)
    positions = torch.arange(ids.shape[1], device=device).expand_as(ids)
    exported = loaded(input_ids=ids, position_ids=positions, use_cache=False).logits.float()
    return (logits - exported).abs().max().item()


def load(folder: str | Path) -> tuple[Any, Any]:
    """The tokenizer and the model in `folder`, by Transformers alone, in the precision that it was saved in.

    Raises:
        ConfigError: a file of it is missing or damaged.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        return tokenizer, AutoModelForCausalLM.from_pretrained(folder, dtype="auto", device_map="auto").eval()
    except (OSError, ValueError, SafetensorError) as error:
        said = " ".join(str(error).split()).rstrip(".")
        raise ConfigError(
            f"{folder} cannot be loaded: {said}. If a file of it is missing or damaged, export it again."
        ) from error


def generate(folder: str | Path, prompt: str, max_new_tokens: int, seed: int | None = None) -> str:
    """The prompt continued by the model in `folder`: greedily, or sampled when a seed is given."""
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


def _model_card(config: Config, facts: dict[str, Any]) -> str:
    counts = parameters_of(config)
    moe = config.model.model_type == "granitemoe"
    shape = (
        f"{config.model.num_hidden_layers} layers, hidden size {config.model.hidden_size}, "
        f"{config.model.num_attention_heads} heads"
    )
    if moe:
        shape += (
            f", {config.model.num_local_experts} experts of {config.model.intermediate_size}, "
            f"top-{config.model.num_experts_per_tok}"
        )
    schedule = ", ".join(f"{key} {value}" for key, value in config.schedule.items() if key != "name")
    rows = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [{"granitemoe" if moe else "granite"}, powertrain]
---

# {config.run.name}

A {"GraniteMoe" if moe else "dense Granite"} language model pretrained with powertrain: {shape};
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
| schedule | {config.schedule.get("name")}: {schedule} |
| batch | {config.batch.sequences} sequences of {config.data.sequence_length} tokens |
| muP | d_base {config.mup.base_hidden_size}, init std {config.model.initializer_range}, rule {config.mup.rule} |
| optimizer | AdamW {json.dumps(list(config.optimizer.betas))}, weight decay {config.optimizer.weight_decay} \
({config.optimizer.weight_decay_mode}) |
| precision | {config.precision} |

It is a base model: it continues text. It was not aligned, filtered or tested for any use.
"""
