"""Experts on a CPU: rows sorted by expert, contiguous products, one autograd function, registered with Transformers.

    y = Σ_k w_k · (silu(x·G_k) ∘ (x·U_k)) · D_k        over the top-k experts of a token

One expert after the other, in scratch memory that stays in the cache: at these sizes memory, not arithmetic, sets
the pace. An expert's rows are padded to one of few sizes with rows of weight 0, because oneDNN compiles a bf16
product for every new shape, which takes longer than the product. Around the products rows are gathered, never
scattered with addition, so the result does not depend on the number of threads. The routing weight multiplies the
activations, not the outputs: they are narrower. For the backward pass only the first product is kept; the rest is
elementwise, and recomputed (as in SonicMoE, arXiv 2512.14080).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

NAME = "sorted"
ROWS = 32

aten = torch.ops.aten


class _SortedExperts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, chosen: Tensor, weights: Tensor, gate_up_proj: Tensor, down_proj: Tensor
    ) -> Tensor:
        width = down_proj.shape[2]  # I
        place, counts, sizes = _sorted_by_expert(chosen, len(gate_up_proj))
        token = place.new_zeros(sum(sizes))  # of each row
        token[place] = torch.arange(len(hidden), device=hidden.device)[:, None]
        row_weights = weights.new_zeros(len(token))
        row_weights[place] = weights
        row_weights.unsqueeze_(1)

        gate_up = hidden.new_empty(len(token), 2 * width)
        outputs = hidden.new_empty(len(token), hidden.shape[1])
        scratch = _scratch(hidden, sizes, hidden.shape[1], width)
        for expert, of, (x, a) in _each(sizes, *scratch):
            torch.index_select(hidden, 0, token[of], out=x)
            x[counts[expert] :] = 0  # a padding row's activations may overflow, and 0 times that is not 0
            gate, up = torch.mm(x, gate_up_proj[expert].T, out=gate_up[of]).chunk(2, dim=-1)
            aten.silu.out(gate, out=a).mul_(up).mul_(row_weights[of])
            torch.mm(a, down_proj[expert].T, out=outputs[of])
        ctx.save_for_backward(hidden, gate_up_proj, down_proj, place, token, row_weights, gate_up)
        ctx.sizes = sizes
        return _sums_of_rows(outputs, place)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, gate_up_proj, down_proj, place, token, row_weights, gate_up = ctx.saved_tensors
        size, width = down_proj.shape[1:]  # H, I
        rows_grad = hidden.new_empty(len(token), size)
        # Summed in float32 (or better), whatever the type.
        weights_grad = row_weights.new_empty(len(token), dtype=torch.promote_types(row_weights.dtype, torch.float32))
        gate_up_proj_grad, down_proj_grad = torch.zeros_like(gate_up_proj), torch.zeros_like(down_proj)
        scratch = _scratch(hidden, ctx.sizes, size, size, width, width, width, 2 * width)
        for expert, of, (x, y_grad, a, b, a_grad, gate_up_grad) in _each(ctx.sizes, *scratch):
            gate, up = gate_up[of].chunk(2, dim=-1)
            gate_grad, up_grad = gate_up_grad.chunk(2, dim=-1)
            torch.index_select(hidden, 0, token[of], out=x)
            torch.index_select(grad, 0, token[of], out=y_grad)
            torch.mm(y_grad, down_proj[expert], out=a_grad)  # of the weighted activations
            aten.silu.out(gate, out=a)
            torch.mul(a, up, out=b)  # the unweighted activations
            torch.sum(a_grad * b, -1, dtype=weights_grad.dtype, out=weights_grad[of])
            torch.mm(y_grad.T, b.mul_(row_weights[of]), out=down_proj_grad[expert])
            torch.mul(a_grad.mul_(row_weights[of]), a, out=up_grad)
            aten.silu_backward.grad_input(a_grad.mul_(up), gate, grad_input=gate_grad)
            torch.mm(gate_up_grad.T, x, out=gate_up_proj_grad[expert])
            torch.mm(gate_up_grad, gate_up_proj[expert], out=rows_grad[of])
        hidden_grad, weights_grad = _sums_of_rows(rows_grad, place), weights_grad[place].to(row_weights.dtype)
        return hidden_grad, None, weights_grad, gate_up_proj_grad, down_proj_grad


def _sorted_by_expert(chosen: Tensor, num_experts: int) -> tuple[Tensor, list[int], list[int]]:
    """The row of each assignment, (T, K), the number of each expert's assignments, and of its rows with padding.

    Rows are in the order of experts, then of tokens, then padding.
    """
    flat = chosen.flatten()
    counts = torch.bincount(flat, minlength=num_experts).tolist()
    sizes = [_padded(count) for count in counts]
    padding = torch.tensor([size - count for size, count in zip(sizes, counts, strict=True)], device=flat.device)
    ahead = padding.cumsum(0) - padding  # rows of padding ahead of each expert
    order = flat.argsort(stable=True)
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=order.device) + ahead[flat[order]]
    return place.view_as(chosen), counts, sizes


def _padded(count: int) -> int:
    """`count`, up to the next multiple of ROWS and of a sixteenth of its power of two: few sizes, little padding."""
    step = max(ROWS, 1 << max(0, count.bit_length() - 5))
    return -(-count // step) * step


def _scratch(like: Tensor, sizes: list[int], *widths: int) -> list[Tensor]:
    """Buffers for the rows of any one expert, one of each width."""
    return [like.new_empty(max(sizes), width) for width in widths]


def _each(sizes: list[int], *scratch: Tensor) -> Iterator[tuple[int, slice, list[Tensor]]]:
    """(expert, its rows, scratch for them), for those that have any."""
    start = 0
    for expert, size in enumerate(sizes):
        if size:
            yield expert, slice(start, start + size), [buffer[:size] for buffer in scratch]
        start += size


def _sums_of_rows(rows: Tensor, place: Tensor) -> Tensor:
    """(T, ·): for each token the sum of `rows` at its places (T, K)."""
    return F.embedding_bag(place, rows, mode="sum")


@torch.compiler.disable  # the sizes of its products are those of the batch
def sorted_experts(experts: nn.Module, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """(T, H) outputs of the experts of a Transformers model for (T, H) tokens and their (T, K) experts and weights."""
    return _SortedExperts.apply(hidden, top_k_index, top_k_weights, experts.gate_up_proj, experts.down_proj)


ALL_EXPERTS_FUNCTIONS.register(NAME, sorted_experts)
