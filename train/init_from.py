"""Starting from somebody's Hugging Face GraniteMoe or Granite model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from train.config import Config, ConfigError

_SAME = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "rms_norm_eps",
    "tie_word_embeddings",
    "embedding_multiplier",
    "residual_multiplier",
    "attention_multiplier",
    "logits_scaling",
)


def adopt(config: Config) -> None:
    """Make `config.model` describe the model in `run.init_from`, and take its tokenizer when none is named.

    muP's m_width stays hidden_size / mup.base_hidden_size, which the folder does not tell: it is the rate's.

    Raises:
        ConfigError: it cannot be read, is of another family, or has a part that is not trained here.
    """
    folder = config.run.init_from
    assert folder is not None
    try:
        theirs = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ConfigError(f"run.init_from={folder} cannot be read: {error}") from error
    if theirs.model_type not in ("granitemoe", "granite"):
        raise ConfigError(
            f"run.init_from={folder} holds a '{theirs.model_type}' model; only 'granitemoe' and 'granite' are trained."
        )
    head_dim = getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads
    rope = theirs.rope_parameters
    for what, found, supported in (
        ("attention_bias", theirs.attention_bias, False),
        ("mlp_bias", getattr(theirs, "mlp_bias", False), False),
        ("hidden_act", theirs.hidden_act, "silu"),
        ("rope_type", rope["rope_type"], "default"),
        ("head_dim", head_dim, theirs.hidden_size // theirs.num_attention_heads),
    ):
        if found != supported:
            raise ConfigError(f"run.init_from={folder} has {what} {found}; only {supported} can be trained here.")
    for name in _SAME:
        setattr(config.model, name, getattr(theirs, name))
    config.model.rope_theta = float(rope["rope_theta"])
    config.model.num_local_experts = getattr(theirs, "num_local_experts", 0)
    config.model.num_experts_per_tok = getattr(theirs, "num_experts_per_tok", 0)
    if config.data.tokenizer.path is None and (Path(folder) / "tokenizer_config.json").is_file():
        config.data.tokenizer.path = folder


def reader(folder: str, shapes: Mapping[str, torch.Size]) -> Callable[[str, int, int], torch.Tensor]:
    """Reads the elements [start, stop) of a flattened parameter in `folder`, in float32.

    Raises:
        ConfigError: a tensor is missing or of another shape.
    """
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    theirs, report = loaded
    if report["missing_keys"]:
        raise ConfigError(f"run.init_from={folder} lacks the tensors {sorted(report['missing_keys'])}.")
    weights = dict(theirs.named_parameters())
    for name, shape in shapes.items():
        if weights[name].shape != shape:
            found = f"{tuple(weights[name].shape)}, not {tuple(shape)}"
            raise ConfigError(f"run.init_from={folder}: {name} has the shape {found}.")
    return lambda name, start, stop: weights[name].detach().view(-1)[start:stop]
