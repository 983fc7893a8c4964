"""The probes of the coordinate check: a few training steps at several widths, and the size of every change.

`coordinates.py` says what each kind of probe measures.
"""

from __future__ import annotations

import argparse
import inspect
import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from powertrain.data.loader import IGNORE_INDEX
from powertrain.launch.check.coordinates import BANDS
from powertrain.train.balance import Balance
from powertrain.train.config import Config
from powertrain.train.loss import LanguageModelLoss
from powertrain.train.model import granite, mup
from powertrain.train.optim import adamw, parameter_groups
from powertrain.train.step import loss_terms, total_loss

WIDTHS = (1, 2, 4, 8)  # × model.hidden_size
SEEDS = (0, 1, 2)
STEPS = 4

_OUTPUT_ROWS = {
    "embeddings": "embedding",
    "attention logits": "attention",
    "attention output": "attention_out",
    "router logits": "router",
    "MLP output": "down",
    "shared expert": "shared_down",
    "logits": "head",
}
_OUTPUTS = {
    "o_proj": "attention output",
    "router": "router logits",
    "experts": "MLP output",
    "shared_mlp": "shared expert",
    "mlp": "MLP output",
}

Rows = Callable[[Config], dict[str, mup.Row]]
Calls = dict[str, tuple[Any, Any]]  # module -> (arguments, output) of its forward pass


@dataclass(frozen=True)
class Result:
    """One probe.

    Attributes:
        kind: init, update or output.
        name: the tensor or the output.
        row: the row of the muP table that it probes.
        widths: the hidden sizes.
        sizes: by seed, then by width.
    """

    kind: str
    name: str
    row: str
    widths: list[int]
    sizes: list[list[float]]

    @property
    def slopes(self) -> list[float]:
        """By seed: the slope of log size against log width; not a number where a size is 0."""
        x = [math.log(width) for width in self.widths]
        logs = [[math.log(size) if size else -math.inf for size in sizes] for sizes in self.sizes]
        return [statistics.linear_regression(x, y).slope for y in logs]

    @property
    def passed(self) -> bool:
        return all(abs(slope) <= BANDS[self.kind] for slope in self.slopes)


def check(config: Config, rows_of: Rows = mup.table) -> list[Result]:
    """The probes of this model family.

    Args:
        config: with the smallest width's model; heads and intermediate size grow in proportion to its width.
        rows_of: gives the table for the configuration of one width.
    """
    configs = [_widened(config, factor) for factor in WIDTHS]
    sizes = {seed: [_measure(wide, rows_of(wide), seed) for wide in configs] for seed in SEEDS}
    widths = [wide.model.hidden_size for wide in configs]
    return [
        Result(kind, name, row, widths, [[size[kind, name, row] for size in sizes[seed]] for seed in SEEDS])
        for kind, name, row in sorted(sizes[SEEDS[0]][0])
    ]


def at_fault(results: list[Result]) -> list[str]:
    """The rows of the table that a failed probe names, none when all passed."""
    failed = [result for result in results if not result.passed]
    isolated = [result for result in failed if result.kind != "output"]
    return sorted({result.row for result in isolated or failed})


def _widened(config: Config, factor: int) -> Config:
    model = config.model
    kv_heads = model.num_key_value_heads
    return replace(
        config,
        model=replace(
            model,
            hidden_size=model.hidden_size * factor,
            intermediate_size=model.intermediate_size * factor,
            shared_intermediate_size=model.shared_intermediate_size * factor,
            num_attention_heads=model.num_attention_heads * factor,
            num_key_value_heads=None if kv_heads is None else kv_heads * factor,
        ),
    )


def _measure(config: Config, rows: dict[str, mup.Row], seed: int) -> dict[tuple[str, str, str], float]:
    """(kind, name, row) -> size, over all layers."""
    model = granite.build(config)
    mup.initialize(model.named_parameters(), rows, seed)
    initial = {name: weight.clone() for name, weight in model.state_dict().items()}
    batches = _batches(config)
    calls = _forward(model, batches[0])
    _train(config, model, rows, batches)

    by_tensor: dict[tuple[str, str, str], list[float]] = defaultdict(list)
    for name, weight in model.state_dict().items():
        row = mup.role_of(name)
        short = "norm" if row == "norm" else name.removesuffix(".weight").rpartition(".")[2]
        fan_in = 1 if row in ("embedding", "head", "norm") else weight.shape[-1]
        by_tensor["init", short, row].append(_rms([initial[name]]) * math.sqrt(fan_in))
        by_tensor["update", short, row].append(_update(name, weight - initial[name], initial, calls, model.config))
    sizes = {key: math.sqrt(statistics.fmean(size**2 for size in found)) for key, found in by_tensor.items()}

    before, after = _outputs(model, calls), _outputs(model, _forward(model, batches[0]))
    for name in before:
        change = [new - old for new, old in zip(after[name], before[name], strict=True)]
        sizes["output", name, _OUTPUT_ROWS[name]] = _rms(change)
    return sizes


def _batches(config: Config) -> Tensor:
    """(STEPS, B, S) bytes of a text that every Python has."""
    text = torch.tensor(list(inspect.getsource(argparse).encode())) % config.model.vocab_size
    shape = STEPS, config.batch.sequences, config.data.sequence_length
    return text[torch.arange(math.prod(shape)) % len(text)].view(shape)


def _train(config: Config, model: granite.CausalLM, rows: dict[str, mup.Row], batches: Tensor) -> None:
    """STEPS steps at the schedule's peak."""
    lr = config.make_schedule().peak
    balance = Balance(config, lambda counts: counts)
    optimizer = adamw(parameter_groups(model.named_parameters(), rows, config.optimizer), config.optimizer)
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_multiplier"]
    loss_of = LanguageModelLoss(model)
    for tokens in batches:  # (B, S)
        labels = nn.functional.pad(tokens[:, 1:], (0, 1), value=IGNORE_INDEX)
        outputs = loss_of(tokens, labels, torch.arange(tokens.shape[1]).expand_as(tokens))
        optimizer.zero_grad()
        total_loss(loss_terms(outputs, balance, outputs.targets, tokens.numel()), config.balance).backward()
        optimizer.step()
        balance.end_step(skipped=False)


@torch.no_grad()
def _forward(model: granite.CausalLM, tokens: Tensor) -> Calls:
    calls: Calls = {}

    def record(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, arguments: Any, output: Any) -> None:
            calls[name] = arguments, output

        return hook

    hooks = [module.register_forward_hook(record(name)) for name, module in model.named_modules()]
    model(input_ids=tokens)
    for hook in hooks:
        hook.remove()
    return calls


def _update(name: str, change: Tensor, initial: dict[str, Tensor], calls: Calls, hf_config: Any) -> float:
    """What `change` of this tensor adds to its module's output at initialisation, relative to the input."""
    row, module = mup.role_of(name), name.rpartition(".")[0]
    arguments = calls[module][0]
    x = arguments[0]
    if row == "norm":
        return _rms([change])
    if row == "embedding":
        return _rms([change[x]])
    if not module.endswith(".experts"):
        size = _rms([x @ change.T]) / _rms([x])
        return size / hf_config.logits_scaling if row == "head" else size
    chosen = arguments[1]  # (tokens, K)
    inputs = [x[(chosen == expert).any(dim=-1)] for expert in range(len(change))]
    if row == "down":
        gates_ups = zip(inputs, initial[f"{module}.gate_up_proj"], strict=True)
        pairs = [(x @ weight.T).chunk(2, dim=-1) for x, weight in gates_ups]
        inputs = [nn.functional.silu(gate) * up for gate, up in pairs]
    return _rms(x @ weight.T for x, weight in zip(inputs, change, strict=True)) / _rms(inputs)


def _outputs(model: granite.CausalLM, calls: Calls) -> dict[str, list[Tensor]]:
    """The probed outputs, one tensor a layer."""
    head_size = model.config.hidden_size // model.config.num_attention_heads
    outputs = defaultdict(list)
    outputs["embeddings"].append(calls["model.layers.0"][0][0])  # × embedding_multiplier
    outputs["logits"].append(calls[""][1].logits)
    for name, (_, output) in calls.items():
        parent, _, kind = name.rpartition(".")
        if kind == "q_proj":
            # Before the rotation, which is the logit of a query and a key at the same place.
            query = output.unflatten(-1, (-1, head_size)).transpose(1, 2)  # (B, heads, S, head size)
            key = calls[f"{parent}.k_proj"][1].unflatten(-1, (-1, head_size)).transpose(1, 2)
            key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
            outputs["attention logits"].append(query @ key.mT * model.config.attention_multiplier)
        elif kind in _OUTPUTS:
            outputs[_OUTPUTS[kind]].append(output[0] if isinstance(output, tuple) else output)
    return outputs


def _rms(tensors: Iterable[Tensor]) -> float:
    """Of all elements together."""
    squares, count = 0.0, 0
    for tensor in tensors:
        squares += tensor.double().square().sum().item()
        count += tensor.numel()
    return math.sqrt(squares / count)
