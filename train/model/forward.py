"""The families' forward pass as training runs it: Transformers' modules, weights and arithmetic, with less around them.

Transformers' own is made for every use of a model. At the sizes of a sweep its decorators, keywords, masks and tables
take as long as the products. This one has the same values, bit for bit; an export is compared with Transformers' own.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from transformers.masking_utils import create_causal_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.granite.modeling_granite import eager_attention_forward

from powertrain.train.model import blockwise


class _Layer(nn.Module):
    """The forward pass of a decoder layer of any family; its class in a model is this one and Transformers'."""

    def forward(
        self,
        hidden: Tensor,
        size: tuple[int, int] | None = None,
        rotary: Any = None,
        mask: Any = None,
        attend: Any = None,
        **kwargs: Any,
    ) -> Tensor:
        """(B·S, H) → (B·S, H).

        Args:
            size: (B, S).
            rotary: as of `hidden_states`.
            mask: of `attend`, which is one of Transformers' attention functions and also takes `kwargs`.
        """
        if size is None:  # by Transformers' own forward pass of the whole model
            return super().forward(hidden, **kwargs)
        layer: Any = self
        attention = layer.self_attn
        states = layer.input_layernorm(hidden)
        projections = attention.q_proj, attention.k_proj, attention.v_proj
        heads = (*size, -1, attention.head_dim)
        query, key, value = (project(states).view(heads).transpose(1, 2) for project in projections)
        cos, sin = rotary
        # rotate_half, but the sign is in `sin`
        query, key = (x * cos + x.roll(attention.head_dim // 2, -1) * sin for x in (query, key))
        dropout = attention.attention_dropout if layer.training else 0.0
        states, _ = attend(attention, query, key, value, mask, dropout=dropout, scaling=attention.scaling, **kwargs)
        hidden = hidden + attention.o_proj(states.reshape(len(hidden), -1)) * layer.residual_multiplier
        states = layer.post_attention_layernorm(hidden)
        return hidden + self._feed_forward(states, size) * layer.residual_multiplier

    def _feed_forward(self, states: Tensor, size: tuple[int, int]) -> Tensor:
        layer: Any = self
        if hasattr(layer, "mlp"):
            return layer.mlp(states)
        experts = layer.block_sparse_moe(states.view(*size, -1)).view_as(states)
        shared = getattr(layer, "shared_mlp", None)
        return experts if shared is None else experts + shared(states)


def adopt(model: Any) -> None:
    """Have the layers of a Transformers model of one of the families run `_Layer.forward`.

    A subclass, since Transformers' layers take care of activation checkpointing in theirs.
    """
    for layer in model.model.layers:
        if not isinstance(layer, _Layer):
            layer.__class__ = _ours(layer.__class__)


@functools.cache  # one class for all layers, or torch.compile would compile each anew, and none after the eighth
def _ours(kind: type[nn.Module]) -> type[nn.Module]:
    return type(kind.__name__, (_Layer, kind), {})


def hidden_states(model: Any, input_ids: Tensor, position_ids: Tensor, **kwargs: Any) -> Tensor:
    """(B·S, H) states after the last norm, for the output head. A document begins where `position_ids` is 0.

    Args:
        model: of the family, without its head; its layers by `adopt`.
        input_ids: (B, S); `position_ids` likewise.
        kwargs: further arguments of the attention function.
    """
    name = model.config._attn_implementation
    size = tuple(input_ids.shape)
    embedded = model.embed_tokens(input_ids)
    # Not on a GPU, which would have to wait; nor of an estimate's tensors, which have no values.
    known = position_ids.device.type == "cpu" and not isinstance(position_ids, FakeTensor)
    whole = known and not (position_ids[:, 1:] == 0).any()
    mask = None
    if name != blockwise.NAME and not (whole and name == "sdpa"):  # these know by themselves what a token sees
        mask = create_causal_mask(
            config=model.config, inputs_embeds=embedded, attention_mask=None, cache=None, position_ids=position_ids
        )
    hidden = (embedded * model.embedding_multiplier).flatten(0, 1)
    cos, sin = model.rotary_emb(hidden, position_ids[:1] if whole else position_ids)
    half = sin.shape[-1] // 2
    rotary = cos.unsqueeze(1), torch.cat((-sin[..., :half], sin[..., half:]), dim=-1).unsqueeze(1)
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(name, eager_attention_forward)
    for layer in model.layers:
        hidden = layer(hidden, size=size, rotary=rotary, mask=mask, attend=attend, position_ids=position_ids, **kwargs)
    states: Tensor = model.norm(hidden)
    return states
