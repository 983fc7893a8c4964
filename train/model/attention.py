"""Causal attention on a CPU by blocks of queries, registered with Transformers.

    out = softmax(scaling · q·kᵀ + mask) · v

A block of queries meets the keys up to its own end, so most of what lies above the diagonal is not computed. Scores
and probabilities are float32, whatever the model's precision. Nothing of size S × S is kept for the backward pass,
which computes a block's probabilities again.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

NAME = "blocked"
BLOCK = 128  # queries at a time


class _BlockedAttention(torch.autograd.Function):
    """For B rows, K key heads, G query heads to each, S tokens: query (B, K, G, S, D), key and value (B, K, S, D)."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
        out = torch.empty_like(query)
        flat_value = value.flatten(0, 1)
        for start, stop, block, probabilities in _blocks(query, key, mask, scaling):
            rows = torch.bmm(probabilities.to(value.dtype), flat_value[:, :stop])
            out[..., start:stop, :] = rows.view_as(block)
        ctx.save_for_backward(query, key, value, mask, out)
        ctx.scaling = scaling
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, mask, out = ctx.saved_tensors
        flat_key, flat_value = key.flatten(0, 1), value.flatten(0, 1)  # (B·K, S, D)
        query_grad = torch.empty_like(query)
        key_grad = torch.zeros_like(flat_key, dtype=torch.promote_types(key.dtype, torch.float32))
        value_grad = torch.zeros_like(key_grad)
        for start, stop, block, probabilities in _blocks(query, key, mask, ctx.scaling):
            block_grad = grad[..., start:stop, :]
            # Σ_k p_k·dp_k of a row, which the softmax subtracts, is the row's grad·out.
            row_sum = (block_grad.to(probabilities.dtype) * out[..., start:stop, :]).sum(-1)
            rows_grad = block_grad.flatten(2, 3).flatten(0, 1)  # (B·K, G·C, D)
            value_grad[:, :stop] += torch.bmm(probabilities.to(value.dtype).mT, rows_grad)
            scores_grad = torch.bmm(rows_grad, flat_value[:, :stop].mT).to(probabilities.dtype)
            scores_grad = scores_grad.sub_(row_sum.view(*scores_grad.shape[:2], 1)).mul_(probabilities)
            scores_grad = scores_grad.to(key.dtype)
            query_grad[..., start:stop, :] = torch.bmm(scores_grad, flat_key[:, :stop]).view_as(block)
            key_grad[:, :stop] += torch.bmm(scores_grad.mT, block.flatten(2, 3).flatten(0, 1))
        key_grad, value_grad = key_grad.to(key.dtype), value_grad.to(value.dtype)
        return (
            query_grad.mul_(ctx.scaling),
            key_grad.mul_(ctx.scaling).view_as(key),
            value_grad.view_as(value),
            None,
            None,
        )


def _blocks(
    query: Tensor, key: Tensor, mask: Tensor | None, scaling: float
) -> Iterator[tuple[int, int, Tensor, Tensor]]:
    """(start, stop, those queries, their probabilities (B·K, G·(stop − start), stop)), block by block."""
    batch, key_heads, groups, length, _ = query.shape
    precise = torch.promote_types(query.dtype, torch.float32)
    columns = key.flatten(0, 1).to(precise).mT  # (B·K, D, S)
    for start in range(0, length, BLOCK):
        stop = min(start + BLOCK, length)
        block = query[..., start:stop, :]
        scores = torch.bmm(block.flatten(2, 3).flatten(0, 1).to(precise) * scaling, columns[..., :stop])
        each = scores.view(batch, key_heads, groups, stop - start, stop)
        if mask is None:
            ahead = torch.ones(stop - start, stop - start, dtype=torch.bool, device=query.device).triu_(1)
            each[..., start:].masked_fill_(ahead, -torch.inf)
        else:
            each.masked_fill_(~mask[:, :, None, start:stop, :stop], -torch.inf)
        yield start, stop, block, torch.softmax(scores, dim=-1)


def blocked_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention of a whole window with itself.

    Args:
        query: (B, heads, S, D).
        key, value: (B, key heads, S, D).
        attention_mask: (B, 1, S, S), true where a query sees a key, none of them ahead of it; None is causal.

    Returns:
        (B, S, heads, D), and None for the weights.
    """
    grouped = query.unflatten(1, (key.shape[1], -1))
    out = _BlockedAttention.apply(grouped, key, value, attention_mask, scaling)
    return out.flatten(1, 2).transpose(1, 2), None


ALL_ATTENTION_FUNCTIONS.register(NAME, blocked_attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, sdpa_mask)
