"""The forward pass that trains has the values and gradients of Transformers' own, bit for bit."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from powertrain.train.config import Config
from powertrain.train.loss import LanguageModelLoss
from powertrain.train.model import granite
from powertrain.train.model.forward import adopt, hidden_states

FAMILIES = {
    "granite": ("model.model_type=granite", "model.num_key_value_heads=1"),
    "granitemoe": ("model.model_type=granitemoe",),
    "granitemoeshared": ("model.model_type=granitemoeshared", "model.shared_intermediate_size=40"),
}
MULTIPLIERS = ("model.residual_multiplier=0.3", "model.attention_multiplier=0.2", "model.embedding_multiplier=7")
# Two rows of 16 tokens: one document each, or several. Without a boundary there is no mask, and one table of rotations.
POSITIONS = {"whole": [[16], [16]], "packed": [[6, 1, 5, 4], [16]]}


def gradients(model: Any, hidden: Tensor) -> dict[str, Tensor]:
    direction = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1))
    (hidden * direction).sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("lengths", POSITIONS.values(), ids=POSITIONS)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_as_transformers(
    small_config: Callable[..., Config],
    small_loss: Callable[..., LanguageModelLoss],
    family: tuple[str, ...],
    attention: str,
    lengths: list[list[int]],
    dtype: torch.dtype,
) -> None:
    config = small_config(*family, *MULTIPLIERS, f"model.attn_implementation={attention}")
    ours, theirs = small_loss(config).model.to(dtype), granite.build(config).to(dtype)
    theirs.load_state_dict(ours.state_dict())
    ids = torch.randint(97, (2, 16), generator=torch.Generator().manual_seed(0))
    positions = torch.stack([torch.cat([torch.arange(length) for length in row]) for row in lengths])
    expected = theirs.model(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state.flatten(0, 1)
    found = hidden_states(ours.model, ids, positions)
    assert torch.equal(found, expected)
    # A model whose layers are ours remains one for Transformers, to generate from, say.
    own = ours.model(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state
    assert torch.equal(own.flatten(0, 1), expected)
    of_theirs, of_ours = gradients(theirs, expected), gradients(ours, found)
    assert of_ours.keys() == of_theirs.keys() and len(of_ours) > 20
    for name, gradient in of_theirs.items():
        assert torch.equal(of_ours[name], gradient), name


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_activation_checkpointing_computes_each_layer_again(
    small_config: Callable[..., Config], small_loss: Callable[..., LanguageModelLoss], family: tuple[str, ...]
) -> None:
    config = small_config(*family)
    ids = torch.randint(97, (2, 16), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(16).expand_as(ids)
    found, calls = [], [0, 0]
    for checkpointing in (0, 1):
        model = small_loss(config).model
        adopt(model)  # a second time, which changes nothing

        def count(*_: Any, kept: int = checkpointing) -> None:
            calls[kept] += 1

        for layer in model.model.layers:
            layer.self_attn.o_proj.register_forward_hook(count)
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        found.append(gradients(model, hidden_states(model.model, ids, positions)))
    assert calls[1] == 2 * calls[0] == 2 * config.model.num_hidden_layers
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_layers_share_what_is_compiled(
    small_config: Callable[..., Config], small_loss: Callable[..., LanguageModelLoss], family: tuple[str, ...]
) -> None:
    """PyTorch stops after eight compilations of a function and runs further layers without."""
    config = small_config(*family, "model.num_hidden_layers=2", "model.attn_implementation=sdpa")
    graphs: list[int] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs[-1] += 1
        return graph.forward

    for layers in (1, 2):
        torch.compiler.reset()
        graphs.append(0)
        model = small_loss(config).model
        del model.model.layers[layers:]
        for layer in model.model.layers:
            layer.compile(backend=backend)
        ids = torch.randint(97, (2, 16), generator=torch.Generator().manual_seed(0))
        hidden_states(model.model, ids, torch.arange(16).expand_as(ids))
    assert graphs[0] == graphs[1] > 0
