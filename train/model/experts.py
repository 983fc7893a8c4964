"""Experts on a CPU: rows sorted by expert, contiguous products, one autograd function, registered with Transformers.

    y = Σ_k w_k · (silu(x·G_k) ∘ (x·U_k)) · D_k        over the top-k experts of a token

The products are all of the arithmetic; what surrounds them is gathers of rows, so nothing is scattered or added
where two rows could meet, and the result does not depend on the number of threads. The routing weight multiplies
the activations, not the outputs: they are the narrower ones. Of a pass only the inputs and the first product are
kept; the rest is elementwise, and computed again (as in SonicMoE, arXiv 2512.14080).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

NAME = "sorted"


class _SortedExperts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, chosen: Tensor, weights: Tensor, gate_up_proj: Tensor, down_proj: Tensor
    ) -> Tensor:
        tokens, top_k = chosen.shape
        order = chosen.flatten().argsort(stable=True)  # (T·K,) assignments, by expert and then by token
        counts = torch.bincount(chosen.flatten(), minlength=gate_up_proj.shape[0]).tolist()
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order), device=order.device)
        place = place.view(tokens, top_k)  # the row of a token's k-th assignment

        rows = hidden[order // top_k]  # (T·K, H)
        gate_up = _products(rows, gate_up_proj.mT, counts)  # (T·K, 2I)
        gate, up = gate_up.chunk(2, dim=-1)
        activations = (F.silu(gate) * up).mul_(weights.flatten()[order, None])  # (T·K, I)
        outputs = _products(activations, down_proj.mT, counts)  # (T·K, H)
        ctx.save_for_backward(hidden, weights, gate_up_proj, down_proj, order, place, gate_up)
        ctx.counts = counts
        return _sums_of_rows(outputs, place)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weights, gate_up_proj, down_proj, order, place, gate_up = ctx.saved_tensors
        counts, top_k = ctx.counts, place.shape[1]
        token = order // top_k
        row_weights = weights.flatten()[order, None]
        gate, up = gate_up.chunk(2, dim=-1)
        activated = F.silu(gate)
        unweighted = activated * up

        grads = grad[token]  # (T·K, H)
        down_grad = _outer_products(grads, unweighted * row_weights, counts)  # (E, H, I)
        activations_grad = _products(grads, down_proj, counts)  # (T·K, I), of the weighted ones
        weights_grad = (activations_grad * unweighted).sum(-1)[place]  # summed in float32, whatever the type
        activations_grad *= row_weights
        gate_up_grad = torch.empty_like(gate_up)
        gate_grad, up_grad = gate_up_grad.chunk(2, dim=-1)
        torch.mul(activations_grad, activated, out=up_grad)
        gate_grad.copy_(torch.ops.aten.silu_backward(activations_grad.mul_(up), gate))
        rows_grad = _products(gate_up_grad, gate_up_proj, counts)  # (T·K, H)
        gate_up_proj_grad = _outer_products(gate_up_grad, hidden[token], counts)  # (E, 2I, H)
        return _sums_of_rows(rows_grad, place), None, weights_grad, gate_up_proj_grad, down_grad


def _products(rows: Tensor, matrices: Tensor, counts: list[int]) -> Tensor:
    """(N, A) rows sorted by expert, each times its expert's (A, B) of `matrices` (E, A, B)."""
    result = rows.new_empty(rows.shape[0], matrices.shape[2])
    for part, out, matrix in zip(rows.split(counts), result.split(counts), matrices, strict=True):
        torch.mm(part, matrix, out=out)
    return result


def _outer_products(left: Tensor, right: Tensor, counts: list[int]) -> Tensor:
    """(E, A, B): for each expert the sum over its rows of outer products; 0 for one without rows."""
    result = left.new_empty(len(counts), left.shape[1], right.shape[1])
    for a, b, out in zip(left.split(counts), right.split(counts), result, strict=True):
        torch.mm(a.T, b, out=out)
    return result


def _sums_of_rows(rows: Tensor, place: Tensor) -> Tensor:
    """(T, ·): for each token the sum of `rows` at its places (T, K)."""
    return F.embedding_bag(place, rows, mode="sum")


def sorted_experts(experts: nn.Module, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """(T, H) outputs of Transformers' GraniteMoeExperts for (T, H) tokens and their (T, K) experts and weights."""
    return _SortedExperts.apply(hidden, top_k_index, top_k_weights, experts.gate_up_proj, experts.down_proj)


ALL_EXPERTS_FUNCTIONS.register(NAME, sorted_experts)
