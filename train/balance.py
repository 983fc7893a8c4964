"""Expert balance: the frequencies f that weigh the router's mean probabilities P, and the z loss.

    balance = Σ_layers E·Σ_e f_e·P_e        f = assignments / (top_k · tokens), no gradient
    z       = Σ_layers mean(logsumexp(router logits)²)

P is the mean router probability over the global batch. A balanced layer contributes 1. `scope` is where f
is counted:

- `lagged`: over the whole previous global batch (the first step uses 1/E). The only scope whose gradient does
  not depend on how a batch is split into ranks and micro-batches.
- `accumulated`: over all ranks and the micro-batches of this step so far (arXiv 2501.11873).
- `dp`: over all ranks, this micro-batch.
- `micro`: this rank's micro-batch.

`pool: all` averages f over the layers first, which is Transformers' form: with the scope `micro`,
its load_balancing_loss_func gives top_k / num_layers times this loss.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from powertrain.train.config import Config
from powertrain.train.loss import Outputs

Reduce = Callable[[Tensor], Tensor]  # sum over ranks


class Balance:
    """Holds the assignments of the previous and the current global batch; `previous` belongs in a checkpoint."""

    def __init__(self, config: Config, reduce: Reduce) -> None:
        model = config.model
        self.config = config.balance
        self.num_experts = model.num_local_experts if model.is_moe else 0
        self.reduce = reduce
        layers = model.num_hidden_layers if model.is_moe else 0
        self.previous = torch.zeros(layers, self.num_experts, dtype=torch.int64)  # zeros: no batch yet
        self._current = torch.zeros_like(self.previous)

    def losses(self, outputs: Outputs, batch_tokens: int) -> tuple[Tensor, Tensor]:
        """This micro-batch's share of (balance, z); the shares of a global batch add up to its losses.

        Collective in the scopes `accumulated` and `dp`.

        Args:
            batch_tokens: tokens in the global batch.
        """
        if not self.num_experts:
            zero = outputs.cross_entropy.new_zeros(())
            return zero, zero
        frequency = self._frequency(outputs.assignments)
        balance = self.num_experts * (frequency * outputs.probabilities).sum() / batch_tokens
        return balance, outputs.z.sum() / batch_tokens

    def _frequency(self, assignments: Tensor) -> Tensor:
        """f, (layers, experts), each row summing to 1."""
        scope = self.config.scope
        if scope == "accumulated" or scope == "dp":
            assignments = self.reduce(assignments)
        self._current = self._current.to(assignments.device) + assignments
        counts = {
            "lagged": self.previous.to(assignments.device),
            "accumulated": self._current,
            "dp": assignments,
            "micro": assignments,
        }[scope].double()
        counts = counts + (counts.sum() == 0)  # before the first batch: uniform. An `if` would make a GPU wait
        frequency = (counts / counts.sum(dim=-1, keepdim=True)).float()
        if self.config.pool == "all":
            frequency = frequency.mean(dim=0, keepdim=True)
        return frequency

    def end_step(self, skipped: bool) -> Tensor:
        """Assignments (layers, experts) of the global batch, which `lagged` uses next unless the step was skipped.

        Collective.
        """
        counts = self._current if self.config.scope in ("accumulated", "dp") else self.reduce(self._current)
        self._current = torch.zeros_like(counts)
        if not skipped:
            self.previous = counts
        return counts
