"""Cross-entropy without whole logits, and the module that an engine wraps."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from powertrain.data.loader import IGNORE_INDEX
from powertrain.train.model.forward import adopt, hidden_states
from powertrain.train.model.granite import CausalLM, moe_blocks

_CHUNK_LOGITS = 1 << 25  # logits that exist at one time: 128 MiB in float32
_CACHED_LOGITS = 1 << 20  # those that a CPU goes over several times: 4 MiB stay in its cache. At least 128 rows


class _LinearCrossEntropy(torch.autograd.Function):
    """Gradients are made in the forward pass, chunk by chunk: the logits are never kept or made twice."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, logits_scaling: float, needs_gradient: bool
    ) -> Tensor:
        vocabulary = weight.shape[0]
        chunk = max(1, _CHUNK_LOGITS // vocabulary)
        piece = max(128, _CACHED_LOGITS // vocabulary) if hidden.device.type == "cpu" else chunk
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        hidden_grad = torch.zeros_like(hidden) if needs_gradient else None
        weight_grad = torch.zeros_like(weight, dtype=torch.float32) if needs_gradient else None
        for start in range(0, hidden.shape[0], chunk):
            rows = slice(start, start + chunk)
            logits = hidden.new_empty(len(labels[rows]), vocabulary)  # and, in their place, their gradient
            for x, target, out in zip(
                hidden[rows].split(piece), labels[rows].split(piece), logits.split(piece), strict=True
            ):
                torch.mm(x, weight.T, out=out)
                loss += _cross_entropy_(out, target, logits_scaling)
            if hidden_grad is not None and weight_grad is not None:
                hidden_grad[rows] = logits @ weight
                weight_grad += logits.T @ hidden[rows]
        if needs_gradient:
            ctx.save_for_backward(hidden_grad, weight_grad)
            ctx.weight_dtype = weight.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden_grad, weight_grad = ctx.saved_tensors
        hidden_grad = (hidden_grad.float() * grad).to(hidden_grad.dtype)  # grad in bf16 would be off by 0.4%
        return hidden_grad, (weight_grad * grad).to(ctx.weight_dtype), None, None, None


def _cross_entropy_(logits: Tensor, labels: Tensor, logits_scaling: float) -> Tensor:
    """Sum of the cross-entropies of (N, V) logits, which are overwritten with its gradient; all of it in float32."""
    kept = labels != IGNORE_INDEX
    target = torch.where(kept, labels, 0)[:, None]
    log_probabilities = torch.log_softmax(logits.float().div_(logits_scaling), dim=-1)
    loss = torch.where(kept, -log_probabilities.gather(1, target).squeeze(1), 0.0).sum()
    # d loss / d logits = (softmax − one-hot) / logits_scaling, zero where not kept
    gradient = log_probabilities.exp_()
    gradient.scatter_add_(1, target, torch.full_like(target, -1, dtype=gradient.dtype))
    torch.mul(gradient, (kept / logits_scaling)[:, None], out=logits)
    return loss


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, logits_scaling: float) -> Tensor:
    """Sum of the cross-entropies of `hidden @ weight.T / logits_scaling` against `labels`, in nats.

    Args:
        hidden: (N, H).
        weight: (V, H), the output head.
        labels: (N,) token ids; IGNORE_INDEX counts for nothing.
        logits_scaling: muP's m_width.

    Returns:
        A float32 scalar; divide it by the number of targets, once, over the whole batch.
    """
    # Inside a Function gradients are off, and its inputs' requires_grad does not show whether they were on outside.
    needs_gradient = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    return _LinearCrossEntropy.apply(hidden, weight, labels, logits_scaling, needs_gradient)


class Outputs(NamedTuple):
    """What one micro-batch contributes; everything is a sum, so that parts add up to the batch.

    Attributes:
        cross_entropy: sum over targets, nats.
        targets: number of targets.
        assignments: (layers, experts) tokens sent to each expert, no gradient; (0, 0) for a dense model.
        probabilities: (layers, experts) router probabilities summed over tokens.
        z: (layers,) squared log-sum-exp of router logits summed over tokens.
    """

    cross_entropy: Tensor
    targets: Tensor
    assignments: Tensor
    probabilities: Tensor
    z: Tensor


class LanguageModelLoss(nn.Module):
    """A causal language model whose forward pass ends in sums: cross-entropy, targets, router statistics.

    Everything that has a gradient goes through this one `forward`, so an engine's hooks see it all.
    """

    def __init__(self, model: CausalLM) -> None:
        super().__init__()
        self.model = model
        self._routed: list[tuple[Tensor, Tensor]] | None = None
        adopt(model)
        for block in moe_blocks(model):
            block.router.register_forward_hook(self._record)

    @torch.compiler.disable  # or every layer would be compiled anew, for its place in the list
    def _record(self, module: nn.Module, inputs: Any, output: tuple[Tensor, Tensor, Tensor]) -> None:
        # None outside `forward`: recomputation in the backward pass must not count a token twice.
        if self._routed is not None:
            self._routed.append((output[0], output[2]))

    def forward(self, input_ids: Tensor, labels: Tensor | None, position_ids: Tensor) -> Outputs | Tensor:
        """A micro-batch's sums. A token attends within its document, which begins where `position_ids` is 0.

        Args:
            input_ids: (B, S); `labels` and `position_ids` likewise.

        Returns:
            The sums; without `labels` the logits (B, S, V).
        """
        self._routed = []
        inputs = {"input_ids": input_ids, "position_ids": position_ids}
        if "flash" in str(self.model.config._attn_implementation):
            inputs = documents_in_a_row(input_ids, position_ids)
        hidden = hidden_states(self.model.model, **inputs)
        routed, self._routed = self._routed, None
        logits_scaling = float(self.model.config.logits_scaling or 1.0)
        if labels is None:
            logits: Tensor = hidden.reshape(*input_ids.shape, -1) @ self.model.lm_head.weight.T / logits_scaling
            return logits
        cross_entropy = linear_cross_entropy(
            hidden,
            self.model.lm_head.weight,
            labels.flatten(),
            logits_scaling,
        )
        return Outputs(cross_entropy, (labels != IGNORE_INDEX).sum(), *_router_sums(routed, hidden))


@torch.no_grad()
def logits_of(module: nn.Module, input_ids: Tensor) -> Tensor:
    """(B, S, V) float32 of whole sequences, by the LanguageModelLoss in `module` as an engine has wrapped it."""
    training = module.training
    module.eval()
    positions = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
    logits: Tensor = module(input_ids=input_ids, labels=None, position_ids=positions)
    module.train(training)
    return logits.float()


def documents_in_a_row(input_ids: Tensor, position_ids: Tensor) -> dict[str, Any]:
    """The batch (B, S) as one row (1, B·S) with its documents' boundaries, as FlashAttention's varlen kernels want it.

    From positions alone Transformers finds the boundaries of a single row only.
    """
    row = position_ids.reshape(1, -1)
    starts = (row[0] == 0).nonzero()[:, 0]  # every sequence begins with a document
    boundaries = torch.cat([starts, starts.new_tensor([row.shape[1]])]).int()
    longest = int(boundaries.diff().max())
    return {
        "input_ids": input_ids.reshape(1, -1),
        "position_ids": row,
        "cu_seq_lens_q": boundaries,
        "cu_seq_lens_k": boundaries,
        "max_length_q": longest,
        "max_length_k": longest,
    }


def _router_sums(routed: list[tuple[Tensor, Tensor]], like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if not routed:
        return like.new_zeros(0, 0), like.new_zeros(0, 0), like.new_zeros(0)
    assignments, probabilities, z = [], [], []
    for logits, chosen in routed:  # (tokens, E), (tokens, K)
        logits = logits.float()
        ones = torch.ones_like(chosen).flatten()  # not bincount, which makes a GPU wait
        assignments.append(ones.new_zeros(logits.shape[1]).scatter_add_(0, chosen.flatten(), ones))
        probabilities.append(torch.softmax(logits, dim=-1).sum(0))
        z.append(torch.logsumexp(logits, dim=-1).square().sum())
    return torch.stack(assignments), torch.stack(probabilities), torch.stack(z)
