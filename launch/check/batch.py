"""`check batch`: the same batch in one, two or four parts must give the same gradients."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from powertrain.data.loader import IGNORE_INDEX
from powertrain.launch.check import described
from powertrain.launch.parser import verb_parser
from powertrain.train.compose import composed
from powertrain.train.config import Config
from powertrain.train.errors import ConfigError
from powertrain.train.imports import heavy_imports

if TYPE_CHECKING:
    import torch


def main(arguments: list[str]) -> int:
    """Gradients of one batch under three splits: equal for `lagged`, and different for `micro`, or exit status 1."""
    config = composed(described(verb_parser("check batch", __doc__).parse_known_args(arguments)[1]))
    if not config.model.is_moe:
        raise ConfigError(
            f"check batch is about the balance of experts; model.model_type '{config.model.model_type}' has none."
        )
    print(f"{'scope':<12} {'split':<6} {'assignments':<12} {'gradient':>10} {'balance gradient alone':>24}")
    passed = True
    for scope in ("lagged", "micro"):
        (assignments, whole, alone), *splits = [_gradients(config, scope, size) for size in (8, 4, 2)]
        for size, (other_assignments, other_whole, other_alone) in zip((4, 2), splits, strict=True):
            same = bool((assignments == other_assignments).all())
            differences = _relative(whole, other_whole), _relative(alone, other_alone)
            print(
                f"{scope:<12} {8 // size}×{size:<4} {'identical' if same else 'DIFFERENT':<12} "
                f"{differences[0]:>10.1e} {differences[1]:>24.1e}"
            )
            if scope == "lagged":
                passed &= same and max(differences) <= 1e-5
            else:  # otherwise the check could not fail
                passed &= differences[1] > 1e-3
    print(
        "PASS: `lagged` does not depend on how the batch is split, and `micro` does."
        if passed
        else "FAIL: `lagged` has to agree with 1×8 to 1e-5, assignments exactly, and `micro` to differ by over 1e-3."
    )
    return 0 if passed else 1


def _gradients(
    config: Config, scope: str, micro_sequences: int
) -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
    """(assignments, gradients of the whole loss, gradients of balance + z alone) of a fixed batch of 8 sequences."""
    with heavy_imports():
        import torch

        from powertrain.train.balance import Balance
        from powertrain.train.loss import LanguageModelLoss
        from powertrain.train.model import granite, mup
        from powertrain.train.step import loss_terms, total_loss

    model = granite.build(config)
    mup.initialize(model.named_parameters(), mup.table(config), config.run.seed)
    module = LanguageModelLoss(model)
    balance = Balance(
        dataclasses.replace(config, balance=dataclasses.replace(config.balance, scope=scope)), lambda tensor: tensor
    )
    generator = torch.Generator().manual_seed(config.run.seed)
    length = min(64, config.data.sequence_length)
    shape = (8, length)
    input_ids = torch.randint(config.model.vocab_size, shape, generator=generator)
    # Sequences differ in their numbers of targets, so a mean of means would show.
    labels = input_ids.roll(-1, 1).masked_fill(
        torch.arange(length) < torch.arange(8)[:, None] * length // 9, IGNORE_INDEX
    )
    positions = torch.arange(length).expand(shape)
    previous = torch.randint(1, 100, balance.previous.shape, generator=generator)

    gradients, assignments = [], previous
    for lm_weight in (1.0, 0.0):
        balance.previous = previous
        model.zero_grad()
        for first in range(0, 8, micro_sequences):
            rows = slice(first, first + micro_sequences)
            outputs = module(input_ids=input_ids[rows], labels=labels[rows], position_ids=positions[rows])
            lm, aux, z = loss_terms(outputs, balance, (labels != IGNORE_INDEX).sum(), 8 * length)
            total_loss((lm_weight * lm, aux, z), config.balance).backward()
        assignments = balance.end_step(skipped=False)
        gradients.append([parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None])
    return assignments, gradients[0], gradients[1]


def _relative(reference: list[torch.Tensor], other: list[torch.Tensor]) -> float:
    """The largest difference of a tensor, relative to its norm; tensors whose gradient is zero are skipped."""
    return max(((a - b).norm() / a.norm()).item() for a, b in zip(reference, other, strict=True) if a.norm() > 0)
