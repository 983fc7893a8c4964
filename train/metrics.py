"""Counts that do not need a run: parameters, floating-point operations, and the share of a device's peak."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from powertrain.train.config import Config
from powertrain.train.hardware import GPUS
from powertrain.train.model import granite


def count_parameters(shapes: Mapping[str, torch.Size], config: Config) -> dict[str, int]:
    """Parameters: `total`, `embedding` (with an untied head), and `active` ones a token uses, without embedding.

    The paper's active counts leave the embedding out (377M and 800M).
    """
    total = embedding = active = 0.0
    share = 1.0
    if config.model.is_moe:
        share = config.model.num_experts_per_tok / config.model.num_local_experts
    for name, shape in shapes.items():
        total += shape.numel()
        if "embed_tokens" in name or "lm_head" in name:
            embedding += shape.numel()
        else:
            active += shape.numel() * (share if ".experts." in name else 1.0)
    return {"total": int(total), "embedding": int(embedding), "active": int(active)}


def parameters_of(config: Config) -> dict[str, int]:
    """`count_parameters` of a configuration, without allocating anything."""
    model = granite.build(config, "meta")
    return count_parameters({name: parameter.shape for name, parameter in model.named_parameters()}, config)


def flops_per_token(config: Config, counts: dict[str, int]) -> float:
    """Forward and backward FLOPs of one token of training.

    6 for each active parameter (with the output head's product, without the embedding look-up), and causal
    attention: a layer has 2 products of 2·hidden·S/2 in the forward pass, three times that with the backward.
    """
    model = config.model
    head = model.vocab_size * model.hidden_size
    attention = 6 * model.num_hidden_layers * model.hidden_size * config.data.sequence_length
    return 6.0 * (counts["active"] + head) + attention


def peak_flops(device: torch.device) -> float | None:
    """The device's dense bf16 peak, or None where it is not known (a CPU's has to be measured)."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, (peak, _) in GPUS.items() if part in name), None)


def expert_load(assignments: torch.Tensor) -> dict[str, Any]:
    """Summary of (layers, experts) assignments, each of the worst layer.

    `max_over_mean` is 1 when balanced and experts / top_k at most, `entropy` is relative to uniform (1 when balanced),
    `layer_entropy` is that of each layer, `idle` counts experts of all layers without a token.
    """
    load = assignments.double()
    share = load / load.sum(dim=-1, keepdim=True)
    uniform = math.log(load.shape[-1])
    entropy = [each / uniform if uniform else 1.0 for each in torch.special.entr(share).sum(dim=-1).tolist()]
    return {
        "max_over_mean": (share.amax(dim=-1) * load.shape[-1]).max().item(),
        "entropy": min(entropy),
        "layer_entropy": [round(value, 4) for value in entropy],  # of many layers and steps: files stay small
        "idle": int((load == 0).sum()),
    }


def collapsed_layers(assignments: torch.Tensor, top_k: int) -> int:
    """How many rows of (layers, experts) assignments have collapsed: half of the experts or more get no token, or so
    many tokens go to one expert that those without it are fewer than a tenth of a balanced layer's."""
    load, experts = assignments.double(), assignments.shape[-1]
    without = 1 - top_k * load.amax(dim=-1) / load.sum(dim=-1)  # share of tokens not sent to the busiest expert
    half_idle = (load == 0).sum(dim=-1) * 2 >= experts
    return int(((without < 0.1 * (1 - top_k / experts)) | half_idle).sum())
