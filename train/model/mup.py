"""Maximal update parametrisation: one table, role → (init std, learning rate, weight decay, forward multiplier).

Table 1 of arXiv 2408.13359, with m_width = hidden_size / base_hidden_size:

| role | tensors | init std | learning rate | forward |
|---|---|---|---|---|
| embedding | embed_tokens, and the output head tied to it | init_std | η | × embedding_multiplier |
| head | lm_head, when it is not tied | init_std | η | logits ÷ m_width |
| attention | q_proj, k_proj, v_proj | init_std / √m | η / m | q·k ÷ head size |
| attention_out | o_proj | init_std / √m | η / m | × residual_multiplier |
| router | router | init_std / √m | η / m | |
| gate_up | gate and up of experts, shared expert or MLP | init_std / √m | η / m | |
| down | down_proj of experts or MLP | init_std / √m | η / m | × residual_multiplier |
| shared_down | output_linear of the shared expert | init_std / √m | η / m | × residual_multiplier |
| norm | RMSNorm | one | η, no weight decay | |

m is m_width in the `paper` rule. In `fan_in` it is the tensor's own fan-in / base_hidden_size, which differs
for `down` and `shared_down` alone: experts of fixed width keep their fan-in, and `paper` then shrinks their output as
m_width^-½. A shared expert has a width of its own, hence a row of its own.
"""

from __future__ import annotations

import hashlib
import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from powertrain.train.config import Config

# Decided by name, never by shape: a sharded engine may have flattened or emptied the tensor.
_PATTERNS = {
    "embedding": r"model\.embed_tokens\.weight",
    "head": r"lm_head\.weight",
    "attention": r"model\.layers\.\d+\.self_attn\.[qkv]_proj\.weight",
    "attention_out": r"model\.layers\.\d+\.self_attn\.o_proj\.weight",
    "router": r"model\.layers\.\d+\.block_sparse_moe\.router\.weight",
    "gate_up": (
        r"model\.layers\.\d+\."
        r"(block_sparse_moe\.experts\.gate_up_proj|shared_mlp\.input_linear\.weight|mlp\.(gate|up)_proj\.weight)"
    ),
    "down": r"model\.layers\.\d+\.(block_sparse_moe\.experts\.down_proj|mlp\.down_proj\.weight)",
    "shared_down": r"model\.layers\.\d+\.shared_mlp\.output_linear\.weight",
    "norm": r"model\.(layers\.\d+\.(input|post_attention)_layernorm|norm)\.weight",
}


@dataclass(frozen=True)
class Row:
    """How the tensors of one role are initialised and trained.

    Attributes:
        std: standard deviation of the normal initialisation; None means ones.
        rate_multiplier: factor on the scheduled learning rate.
        weight_decay: whether weight decay applies.
        forward: what the forward pass multiplies, in words with the number; empty when nothing.
    """

    std: float | None
    rate_multiplier: float
    weight_decay: bool
    forward: str = ""


def role_of(name: str) -> str:
    """The role of the parameter with this Hugging Face name.

    Raises:
        ValueError: no role, which would mean a tensor without a rule.
    """
    for role, pattern in _PATTERNS.items():
        if re.fullmatch(pattern, name):
            return role
    raise ValueError(f"The parameter '{name}' has no role in the muP table; it would be trained by no rule.")


def width_multiplier(config: Config) -> float:
    """m_width = d_model / d_base."""
    return config.model.hidden_size / config.mup.base_hidden_size


def multipliers(config: Config) -> dict[str, float]:
    """The forward multipliers under the names that Transformers' Granite configurations give them."""
    model = config.model
    residual, attention, logits = model.residual_multiplier, model.attention_multiplier, model.logits_scaling
    return {
        "embedding_multiplier": model.embedding_multiplier,
        # The paper's 0.22 at 40 layers and 0.28 at 24 follow 1.4 / √layers.
        "residual_multiplier": 1.4 / math.sqrt(model.num_hidden_layers) if residual is None else residual,
        # 1 / head size, not its root
        "attention_multiplier": model.num_attention_heads / model.hidden_size if attention is None else attention,
        "logits_scaling": width_multiplier(config) if logits is None else logits,
    }


def first_logits_std(config: Config) -> float:
    """Standard deviation of a token's logits before the first step: the head's times the root of the hidden size, since
    the last norm leaves a hidden state of mean square 1. By it the first loss is about ln V + std² / 2, and more with
    tied embeddings, where the logit of the token itself stands out."""
    return config.model.initializer_range * math.sqrt(config.model.hidden_size) / multipliers(config)["logits_scaling"]


def parametrisation(config: Config) -> dict[str, float | str | bool]:
    """What a law of the best learning rate depends on: runs that agree on it are comparable, whatever their size.

    The residual multiplier times the square root of the layers, and the others over what the table gives, so that
    models of other depth, head count or width that follow the same rules have the same values.
    """
    model, optimizer, forward = config.model, config.optimizer, multipliers(config)
    head_size = model.hidden_size // model.num_attention_heads
    return {
        "base_hidden_size": config.mup.base_hidden_size,
        "rule": config.mup.rule,
        "initializer_range": model.initializer_range,
        "embedding_multiplier": model.embedding_multiplier,
        "residual_multiplier × √num_hidden_layers": round(
            forward["residual_multiplier"] * math.sqrt(model.num_hidden_layers), 1
        ),
        "attention_multiplier × head size": round(forward["attention_multiplier"] * head_size, 6),
        "logits_scaling / m_width": round(forward["logits_scaling"] / width_multiplier(config), 6),
        "head size": head_size,
        "tie_word_embeddings": model.tie_word_embeddings,
        "betas": ", ".join(f"{beta:g}" for beta in optimizer.betas),
        "eps": optimizer.eps,
        "weight_decay": optimizer.weight_decay,
        "weight_decay_mode": optimizer.weight_decay_mode,
        "max_grad_norm": optimizer.max_grad_norm,
    }


def parametrisation_mismatches(config: Config) -> list[str]:
    """The differences of this run's parametrisation from the one that its schedule's law was fitted to."""
    own = parametrisation(config)
    return [
        f"{name} is {own[name]}, the law's {value}"
        for name, value in ((config.schedule or {}).get("belongs_to") or {}).items()
        if name in own and own[name] != value
    ]


def table(config: Config) -> dict[str, Row]:
    """The muP table of this configuration, by role."""
    std, m_width = config.model.initializer_range, width_multiplier(config)
    forward = multipliers(config)
    residual = f"block output × {forward['residual_multiplier']:.4g}"

    def internal(m: float, note: str = "") -> Row:
        return Row(std / math.sqrt(m), 1 / m, True, note)

    def down(fan_in: int) -> Row:
        return internal(fan_in / config.mup.base_hidden_size if config.mup.rule == "fan_in" else m_width, residual)

    shared = config.model.shared_size
    return {
        "embedding": Row(std, 1.0, True, f"× {forward['embedding_multiplier']:.4g}"),
        "head": Row(std, 1.0, True, f"logits ÷ {forward['logits_scaling']:.4g}"),
        "attention": internal(m_width, f"q·k × {forward['attention_multiplier']:.4g}"),
        "attention_out": internal(m_width, residual),
        "router": internal(m_width),
        "gate_up": internal(m_width),
        "down": down(config.model.intermediate_size),
        **({"shared_down": down(shared)} if shared else {}),
        "norm": Row(None, 1.0, False),
    }


def initial_value(name: str, shape: torch.Size, rows: dict[str, Row], seed: int) -> torch.Tensor:
    """The float32 initial value of the parameter `name`, of this shape, on the CPU.

    Each tensor draws from its own generator, keyed by seed and name, so the weights are the same bits whatever
    the device, the order of the parameters or how an engine splits them.

    Raises:
        ValueError: the muP table has no role for the name.
    """
    std = rows[role_of(name)].std
    if std is None:
        return torch.ones(shape)
    key = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(key, "little") >> 1)
    return torch.randn(shape, generator=generator).mul_(std)


def initial_values(
    shapes: Mapping[str, torch.Size], rows: dict[str, Row], seed: int
) -> Callable[[str, int, int], torch.Tensor]:
    """A function that returns the elements [start, stop) of the flattened `initial_value` of a parameter."""
    return lambda name, start, stop: initial_value(name, shapes[name], rows, seed).view(-1)[start:stop]


@torch.no_grad()
def initialize(named_parameters: Iterable[tuple[str, torch.Tensor]], rows: dict[str, Row], seed: int) -> None:
    """Fill every parameter in place with its `initial_value`."""
    for name, parameter in named_parameters:
        parameter.copy_(initial_value(name, parameter.shape, rows, seed))
