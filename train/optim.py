"""Parameter groups from the muP table, AdamW, and bf16 working weights over float32 masters."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from powertrain.train.config import Config, ModelConfig, MupConfig, OptimizerConfig
from powertrain.train.loss import LanguageModelLoss
from powertrain.train.model.granite import CausalLM, described
from powertrain.train.model.mup import Row, role_of, table


def parameter_groups(
    named_parameters: Iterable[tuple[str, nn.Parameter]], rows: dict[str, Row], config: OptimizerConfig
) -> list[dict[str, Any]]:
    """One group a role, in the table's order, with `name`, `lr_multiplier` and `weight_decay`.

    AdamW shrinks a weight by learning rate × weight_decay a step. `coupled` leaves it at that, so muP's learning-rate
    multiplier weakens the decay too; `independent` divides the multiplier out: every role shrinks by η·weight_decay.

    Raises:
        ValueError: a parameter that the muP table has no role for.
    """
    members: dict[str, list[nn.Parameter]] = {role: [] for role in rows}
    for name, parameter in named_parameters:
        members[role_of(name)].append(parameter)
    groups = []
    for role, row in rows.items():
        if members[role]:
            decay = config.weight_decay if row.weight_decay else 0.0
            if config.weight_decay_mode == "independent":
                decay /= row.rate_multiplier
            groups.append(
                {
                    "params": members[role],
                    "name": role,
                    "lr_multiplier": row.rate_multiplier,
                    "weight_decay": decay,
                }
            )
    return groups


def merged(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same with one group for all that have the same multiplier and decay: AdamW makes a call for each group."""
    alike: dict[tuple[float, float], dict[str, Any]] = {}
    for group in groups:
        own = {key: group[key] for key in ("lr_multiplier", "weight_decay")}
        alike.setdefault((*own.values(),), {**own, "params": []})["params"] += group["params"]
    return list(alike.values())


def mup_groups(
    model: CausalLM, mup: MupConfig | None = None, optimizer: OptimizerConfig | None = None
) -> list[dict[str, Any]]:
    """muP's groups of a Transformers model of one of the families, for an optimizer and a loop of your own.

    They are those that a run trains with (see `parameter_groups`), and `lr` in each is its learning-rate multiplier, as
    a scheduler of `powertrain.schedulers.adapters` expects; a loop without one multiplies its learning rate by
    `lr_multiplier`. Sizes and σ come from `model.config`; `powertrain.train.model.mup.initialize` initialises weights.

    Args:
        mup: base width and rule; default: those of a run.
        optimizer: weight decay and its mode; default: those of a run.

    Raises:
        ValueError: a parameter that the muP table has no role for.
    """
    rows = table(Config(model=ModelConfig(**described(model.config)), mup=mup or MupConfig()))
    groups = parameter_groups(model.named_parameters(), rows, optimizer or OptimizerConfig())
    return [{**group, "lr": group["lr_multiplier"]} for group in groups]


def adamw(groups: list[dict[str, Any]], config: OptimizerConfig) -> torch.optim.AdamW:
    """torch's AdamW; `Engine.step` sets each group's learning rate."""
    return torch.optim.AdamW(groups, lr=0.0, betas=config.betas, eps=config.eps, fused=True)


def for_training(loss: LanguageModelLoss, activation_checkpointing: bool, casting: bool) -> nn.Module:
    """What a step runs: the loss, with activation checkpointing and on bf16 copies of the weights if asked for."""
    if activation_checkpointing:
        loss.model.activation_checkpointing_enable({"use_reentrant": False})
        for layer in loss.model.model.layers if casting else ():
            layer._gradient_checkpointing_func = checkpoint_on_copies
    return BFloat16Weights(loss) if casting else loss


def checkpoint_on_copies(function: partial[Tensor], *arguments: Any) -> Any:
    """Activation checkpointing of a layer that BFloat16Weights runs: the recomputation uses the same copies.

    Args:
        function: a partial of the layer's forward pass, with the layer and keywords, as Transformers passes it.
    """
    layer: Any = function.args[0]
    copies: dict[str, Tensor] = dict(layer.named_parameters())

    def run(*arguments: Any) -> Any:
        layer.gradient_checkpointing = False  # or the call would recurse
        try:
            return functional_call(layer, copies, arguments, function.keywords)
        finally:
            layer.gradient_checkpointing = True

    return checkpoint(run, *arguments, use_reentrant=False)


class BFloat16Weights(nn.Module):
    """Runs a module on bf16 copies of its float32 parameters, where no engine keeps bf16 weights.

    The copies are made in each forward pass, so the parameters are the masters, and their gradients arrive
    and accumulate in float32 under any wrapper.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, **inputs: Any) -> Any:
        weights = {name: parameter.bfloat16() for name, parameter in self.module.named_parameters()}
        return functional_call(self.module, weights, kwargs=inputs)
