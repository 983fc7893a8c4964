"""The coordinate check of muP: train a few steps at four widths; no change may grow or shrink with width.

For each tensor W, with W₀ its value at initialisation and x its module's input then, and for each output:

| kind | measured, as a root mean square | what it isolates |
|---|---|---|
| init | W₀ · √fan-in, or W₀ where the fan-in does not grow | the row's init std |
| update | (W − W₀)·x over x, after the steps | the row's learning rate, and the head's ÷ m_width |
| output | the output after the steps less the output at initialisation | all of it together |

A probe is the slope of log size against log width, which under muP is 0. It fails if it leaves its band for any
seed. An output depends on every row, so rows are named by init and update where one of these fails.

usage: powertrain check coordinates [--plot FILE.png] [KEY=VALUE …]
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from powertrain.launch.parser import verb_parser
from powertrain.train.compose import composed
from powertrain.train.config import MODELS
from powertrain.train.errors import ConfigError
from powertrain.train.imports import heavy_imports

if TYPE_CHECKING:
    from powertrain.launch.check.probes import Result

BANDS = {"init": 0.25, "update": 0.3, "output": 0.6}  # docs/coordinates.md has the measurement

# A model at the smallest width; the caller's overrides come later and win.
DEFAULTS = [
    "run.tokens=10_000_000_000_000",  # longer than any warmup or decay; only the schedule's peak is used
    "model.vocab_size=256",  # the tokens are bytes
    "model.hidden_size=64",
    "model.intermediate_size=32",
    "model.num_hidden_layers=2",
    "model.num_attention_heads=2",
    "model.num_key_value_heads=null",
    "model.num_local_experts=4",
    "model.num_experts_per_tok=2",
    "model.shared_intermediate_size=32",
    "mup.base_hidden_size=64",
    "data.sequence_length=64",
    "batch.sequences=8",
]


def main(arguments: list[str]) -> int:
    """`check coordinates [--plot FILE.png] [KEY=VALUE …]`: 0 within the bands, 1 outside them."""
    parser = verb_parser("check coordinates", __doc__)
    parser.add_argument("--plot", metavar="FILE.png", help="draw the sizes over the widths")
    options, overrides = parser.parse_known_args(arguments)
    plot = options.plot
    if plot and not Path(plot).parent.is_dir():
        raise ConfigError(f"--plot {plot}: there is no folder '{Path(plot).parent}'. Make it, or name another file.")
    configs = [composed([*DEFAULTS, f"model.model_type={family}", *overrides]) for family in MODELS]

    with heavy_imports():
        import torch

        from powertrain.launch.check.probes import at_fault, check

    results = {}
    # A dict: all are the same where the caller chose the family.
    for family, config in {config.model.model_type: config for config in configs}.items():
        torch.set_num_threads(config.threads or 1)  # the products are small: threads would wait for each other
        results[family] = check(config)
        print(_as_text(family, results[family]))
    if plot:
        draw(results, plot)
    faults = [f"{row} ({family})" for family, found in results.items() for row in at_fault(found)]
    if faults:
        print(f"FAIL: at fault in the muP table: {', '.join(faults)}.")
        return 1
    print("PASS: for every seed each change keeps its size as the model gets wider.")
    return 0


def _as_text(family: str, results: list[Result]) -> str:
    seeds = "".join(f"{f'seed {seed}':>8}" for seed in range(len(results[0].sizes)))
    lines = [
        f"{family}, hidden sizes {', '.join(map(str, results[0].widths))}",
        f"{'kind':8}{'probe':18}{'row':15}{seeds}{'mean':>8}   band",
    ]
    for result in results:
        slopes = "".join(f"{slope:+8.2f}" for slope in [*result.slopes, statistics.fmean(result.slopes)])
        verdict = "" if result.passed else "  FAIL"
        lines.append(f"{result.kind:8}{result.name:18}{result.row:15}{slopes}   ±{BANDS[result.kind]}{verdict}")
    return "\n".join([*lines, ""])


def draw(results: dict[str, list[Result]], path: str) -> None:
    """A PNG of sizes against width, mean over the seeds; a curve steeper than the grey area leaves its band."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 4 * len(results)), layout="constrained")
    grid = figure.subplots(len(results), len(BANDS), sharey=True, squeeze=False)
    for axes_row, (family, found) in zip(grid, results.items(), strict=True):
        widths = np.array(found[0].widths)
        for axes, (kind, band) in zip(axes_row, BANDS.items(), strict=True):
            edge = _centred(np.log(widths)[None] * band)
            axes.fill_between(widths, edge, 1 / edge, color="0.9")
            for result in found:
                if result.kind == kind:
                    sizes = _centred(np.log(result.sizes))
                    style, label = ("-", result.name) if result.passed else ("--", f"{result.name}: FAIL")
                    axes.plot(widths, sizes, style, marker=".", label=label)
            axes.set(xscale="log", yscale="log", title=f"{family}: {kind}", xlabel="hidden size")
            axes.set_xticks(widths, [str(width) for width in found[0].widths])
            axes.set_yticks([0.25, 0.5, 1, 2, 4], ["¼", "½", "1", "2", "4"])
            axes.minorticks_off()
            axes.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
        axes_row[0].set_ylabel("size over its mean")
    figure.savefig(path, format="png")


def _centred(logs: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """(seeds, widths) logarithms -> (widths,) mean sizes relative to their mean over widths."""
    means = logs.mean(axis=0)
    return np.asarray(np.exp(means - means.mean()))
