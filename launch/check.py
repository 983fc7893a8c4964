"""See that a configuration does what it should.

usage: powertrain check mup|coordinates|batch [+experiment=NAME] [KEY=VALUE …]
       powertrain check run RUN [--steps N]

  mup          each tensor's role, standard deviation asked and measured, rate multiplier, weight decay
  coordinates  train a few steps at four widths; no part of the model may change more, or less, as it gets wider
  batch        one batch split in three ways must give the same gradients, the balance loss included
  run          files as in their manifests, and the last steps trained again give the same losses

Exit status: 0 as it should be, 1 not.

examples:
  powertrain check mup +experiment=powermoe_3b
  powertrain check coordinates mup.rule=fan_in --plot coordinates.png
  powertrain check batch
  powertrain check run runs/quickstart
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from powertrain.train.check import batch_doubts, doubts
from powertrain.train.cli import guard
from powertrain.train.compose import composed
from powertrain.train.config import Config
from powertrain.train.errors import ConfigError

if TYPE_CHECKING:
    import torch

# What a check needs of a run that is not described: any budget, any batch.
_UNDESCRIBED = ["run.tokens=2_000_000_000", "batch.sequences=8"]


def main(arguments: list[str] | None = None) -> None:
    """Run the check named by the first argument."""
    arguments = sys.argv[1:] if arguments is None else arguments
    sys.exit(guard(lambda: _check(arguments)))


def _check(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("--help", "-h"):
        print(__doc__)
        return 0 if arguments else 2
    name, *overrides = arguments
    if name == "coordinates":
        from powertrain.launch import coordinates

        return coordinates.main(overrides)
    if name == "run":
        from powertrain.launch import replay

        return replay.main(overrides)
    checks: dict[str, Callable[[Config], int]] = {"mup": check_mup, "batch": check_batch}
    if name not in checks:
        raise ConfigError(f"There is no check '{name}'; there are {', '.join([*checks, 'coordinates', 'run'])}.")
    return checks[name](composed(described(overrides)))


def described(overrides: list[str]) -> list[str]:
    """The overrides, with a budget and a batch when no experiment brings them."""
    return overrides if any("experiment=" in each for each in overrides) else [*_UNDESCRIBED, *overrides]


def check_mup(config: Config) -> int:
    """Print the table; 1 when a measured standard deviation is not the one asked for, or a multiplier is not set."""
    from rich.console import Console
    from rich.table import Table

    from powertrain.train import optim
    from powertrain.train.model import granite, mup

    rows = mup.table(config)
    model = granite.build(config, "meta")
    groups = optim.parameter_groups(model.named_parameters(), rows, config.optimizer)
    decays = {group["name"]: group["weight_decay"] for group in groups}
    table = Table(title=f"muP, rule '{config.mup.rule}', m_width {mup.width_multiplier(config):g}")
    for heading in ("tensor", "role", "shape", "std asked", "std measured", "rate ×", "weight decay", "forward"):
        table.add_column(heading, justify="right" if "std" in heading or "×" in heading else "left")
    wrong = []
    for name, meta in model.named_parameters():
        role = mup.role_of(name)
        row = rows[role]
        weight = mup.initial_value(name, meta.shape, rows, config.run.seed)
        asked, measured = row.std or 0.0, weight.std(correction=0).item()
        # A sample's standard deviation scatters by 1/√(2N) around the true one.
        if abs(measured - asked) > 5 * asked / (2 * weight.numel()) ** 0.5:
            wrong.append(f"{name} has a standard deviation of {measured:.4g} instead of {asked:.4g}")
        table.add_row(
            name,
            role,
            "×".join(map(str, meta.shape)),
            f"{asked:.4g}" if row.std else "ones",
            f"{measured:.4g}" if row.std else f"mean {weight.mean().item():g}",
            f"{row.rate_multiplier:.4g}",
            f"{decays[role]:g}",
            row.forward,
        )
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(table)
    for name, value in mup.multipliers(config).items():
        print(f"{name} = {value:.6g}")
        if getattr(model.config, name) != value:
            wrong.append(f"the model's {name} is {getattr(model.config, name)}")
    fan_in = config.model.intermediate_size / config.mup.base_hidden_size
    if config.mup.rule == "paper" and fan_in != mup.width_multiplier(config):
        print(
            f"\nNote: the down-projection's fan-in is {config.model.intermediate_size}, {fan_in:g} times "
            f"base_hidden_size, and m_width is {mup.width_multiplier(config):g}. If intermediate_size stays as the "
            "model gets wider, the paper's rule shrinks that block's output as m_width^-½; mup.rule=fan_in does not."
        )
    for doubt in (*doubts(config), *batch_doubts(config)):
        print(f"\nWarning: {doubt}")
    for complaint in wrong:
        print(f"FAIL: {complaint}")
    return 1 if wrong else 0


def check_batch(config: Config) -> int:
    """Gradients of one batch under three splits: equal for `lagged`, and different for `micro`, or exit status 1."""
    if not config.model.is_moe:
        raise ConfigError(
            f"check batch is about the balance of experts; model.model_type is '{config.model.model_type}', which has "
            "none."
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
            else:  # or the check could not fail
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
    import dataclasses

    import torch

    from powertrain.data.loader import IGNORE_INDEX
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
    # Each sequence has another number of targets, so a mean of means would show.
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
    """The largest difference of a tensor, relative to its norm; tensors that the loss does not reach are zero."""
    return max(((a - b).norm() / a.norm()).item() for a, b in zip(reference, other, strict=True) if a.norm() > 0)


if __name__ == "__main__":
    main()
