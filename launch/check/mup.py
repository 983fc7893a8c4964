"""`check mup`: each tensor's role, and whether its initialisation and learning rate are those of the muP table."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.table import Table

from powertrain.launch.check import described
from powertrain.launch.parser import verb_parser
from powertrain.train.check import batch_doubts, doubts
from powertrain.train.compose import composed
from powertrain.train.imports import heavy_imports


def main(arguments: list[str]) -> int:
    """Print the table; 1 if a measured standard deviation is not the expected one, or a multiplier is not set."""
    config = composed(described(verb_parser("check mup", __doc__).parse_known_args(arguments)[1]))
    with heavy_imports():
        from powertrain.train import optim
        from powertrain.train.model import granite, mup

    rows = mup.table(config)
    model = granite.build(config, "meta")
    groups = optim.parameter_groups(model.named_parameters(), rows, config.optimizer)
    decays = {group["name"]: group["weight_decay"] for group in groups}
    table = Table(title=f"muP, rule '{config.mup.rule}', m_width {mup.width_multiplier(config):g}")
    for heading in ("tensor", "role", "shape", "expected std", "measured std", "lr ×", "weight decay", "forward"):
        table.add_column(heading, justify="right" if "std" in heading or "×" in heading else "left")
    wrong = []
    for name, meta in model.named_parameters():
        role = mup.role_of(name)
        row = rows[role]
        weight = mup.initial_value(name, meta.shape, rows, config.run.seed)
        expected, measured = row.std or 0.0, weight.std(correction=0).item()
        # A sample's standard deviation scatters by 1/√(2N) around the true one.
        if abs(measured - expected) > 5 * expected / (2 * weight.numel()) ** 0.5:
            wrong.append(f"{name} has a standard deviation of {measured:.4g} instead of {expected:.4g}")
        table.add_row(
            name,
            role,
            "×".join(map(str, meta.shape)),
            f"{expected:.4g}" if row.std else "ones",
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
