"""The peak memory of a training step, counted without taking the step.

The step's own code runs on tensors that have shapes and no contents (PyTorch's FakeTensorMode), and every storage is
counted while it lives. So what autograd keeps, what the chunked loss or activation checkpointing saves, and when a
gradient appears are not formulas, which a change of the code would make wrong. DeepSpeed's and DDP's own memory is.
"""

from __future__ import annotations

import contextlib
import copy
import weakref
from collections import Counter
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from rich.console import Console
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface
from transformers.integrations import moe

from powertrain.launch.estimate.cluster import Cluster
from powertrain.launch.estimate.tables import table_of
from powertrain.train import loss as train_loss
from powertrain.train import metrics, optim
from powertrain.train.balance import Balance
from powertrain.train.config import Config
from powertrain.train.loss import LanguageModelLoss
from powertrain.train.model import blockwise, experts, granite
from powertrain.train.step import loss_terms, total_loss

# DeepSpeed's defaults, which a run keeps, in elements: reduce_bucket_size, and of stage 3 max_live_parameters,
# prefetch_bucket_size and param_persistence_threshold.
BUCKET, LIVE, PREFETCHED, PERSISTENT = 500_000_000, 1_000_000_000, 50_000_000, 100_000

PARTS = ("masters", "moments", "average", "gradients", "copies", "activations", "loss", "backward", "buffers")


# Of a GPU's memory, for CUDA's context, NCCL's buffers, and blocks that the allocator cannot use.
USABLE = 0.9


class Peaks(NamedTuple):
    """Peak bytes by part, without the moments.

    Attributes:
        whole: with masters, and with whole gradients that are kept until the step.
        rest: without either.
    """

    whole: Counter[str]
    rest: Counter[str]


class Tally(TorchDispatchMode):
    """Bytes of the storages that live at once, by the part in which they were allocated or to which they were moved.

    Attributes:
        part: to which new storages belong.
        peak: the peak bytes so far, by part.
    """

    def __init__(self) -> None:
        super().__init__()
        self.part = "data"
        self.now: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()
        self.rest: Counter[str] = Counter()
        self._part_of: dict[int, str] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, out)):
            if isinstance(leaf, Tensor):
                self._see(leaf, self.part)
        return out

    def _see(self, tensor: Tensor, part: str) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._part_of or tensor.device.type == "meta":
            return
        self._part_of[key] = part
        self.now[part] += size
        weakref.finalize(storage, self._gone, key, size)
        self._compare()

    def peaks(self) -> Peaks:
        """The peaks since the last call."""
        peaks = Peaks(self.peak, _without(self.rest, "masters", "gradients"))
        self.peak, self.rest = self.now.copy(), self.now.copy()
        return peaks

    def _compare(self) -> None:
        if self.now.total() > self.peak.total():
            self.peak = self.now.copy()
        if self._rest(self.now) > self._rest(self.rest):
            self.rest = self.now.copy()

    @staticmethod
    def _rest(parts: Counter[str]) -> int:
        return parts.total() - parts["masters"] - parts["gradients"]

    def _gone(self, key: int, size: int) -> None:
        self.now[self._part_of.pop(key)] -= size

    def move(self, tensor: Tensor, part: str) -> None:
        """From now on the tensor belongs to `part`."""
        self._see(tensor, part)
        storage = tensor.untyped_storage()
        self.now[self._part_of[storage._cdata]] -= storage.nbytes()
        self.now[part] += storage.nbytes()
        self._part_of[storage._cdata] = part

    def follow(self, module: nn.Module, loss: LanguageModelLoss) -> None:
        """Name the parts of a step of `module`, which wraps `loss`."""

        def begins(part: str) -> Any:
            def hook(*_: Any) -> None:
                self.part = part

            return hook

        module.register_forward_pre_hook(begins("copies"))
        loss.register_forward_pre_hook(begins("activations"))
        loss.model.model.norm.register_forward_hook(begins("loss"))
        module.register_forward_hook(begins("backward"))
        for parameter in loss.parameters():
            parameter.register_post_accumulate_grad_hook(self._accumulated)

    def _accumulated(self, parameter: Tensor) -> None:
        if parameter.grad is not None:  # ZeRO 1 in bf16 has added it to a sum of its own
            self.move(parameter.grad, "gradients")


class Passes:
    """The peaks of a micro-batch's passes on each of `ranks` ranks, counted at the first use."""

    def __init__(self, config: Config, ranks: int, gpu: bool) -> None:
        self._arguments = config, gpu, config.batch.sequences > ranks * config.batch.micro_sequences
        self._counted: dict[bool, tuple[Peaks, Peaks]] = {}

    def of(self, sharded: bool) -> tuple[Peaks, Peaks]:
        """Those of `counted`."""
        if sharded not in self._counted:
            self._counted[sharded] = counted(*self._arguments, sharded)
        return self._counted[sharded]


def needed(config: Config, engine: str, ranks: int, passes: Passes, bucket: int = BUCKET) -> Counter[str]:
    """Peak bytes of a step on each GPU, by PARTS.

    Args:
        engine: plain, ddp, zero1, zero2, zero3 or zero3_offload.
        ranks: over which the batch and ZeRO's parts are split.
        passes: of the same configuration on as many ranks.
        bucket: DeepSpeed's reduce_bucket_size; others are for tests.
    """
    bf16 = config.precision == "bf16"
    accumulating = config.batch.sequences > ranks * config.batch.micro_sequences
    shapes = [parameter.shape for parameter in granite.build(config, "meta").parameters()]
    count = sum(shape.numel() for shape in shapes)
    part = -(-count // ranks)  # of what ZeRO shards
    forward, backward = passes.of(engine.startswith("zero"))
    reduced = min(count, bucket)  # elements that DeepSpeed reduces at a time
    later = 1 - reduced / count  # share of a backward pass that is left at the first reduction
    averaged = 4 * (config.average.window is not None)  # bytes of a parameter; those that are offloaded are the CPU's

    if engine == "plain":
        return _most(forward.whole, backward.whole) + Counter(moments=8 * count, average=averaged * count)
    if engine == "ddp":  # whose buckets are the gradients, and stay
        return _most(forward.rest, backward.rest) + Counter(
            masters=4 * count, moments=8 * count, average=averaged * count, gradients=4 * count
        )
    buffers = Counter(buffers=4 * bucket)
    if engine == "zero1" and bf16:
        state = Counter(copies=2 * count, masters=4 * part, moments=8 * part, average=averaged * part)
        state += Counter(gradients=4 * count)
        largest = Counter(backward=4 * max(shape.numel() for shape in shapes))  # on its way to the sum
        return state + _most(forward.rest, backward.rest + largest, Counter(buffers=4 * count))
    if engine in ("zero1", "zero2"):
        state = Counter(masters=4 * part, moments=8 * part, average=averaged * part)
        state += Counter(copies=2 * count) if bf16 else Counter(masters=4 * count)
        buffers = Counter(buffers=(2 if bf16 else 4) * bucket)
        if engine == "zero1":
            first, second = (_without(peaks.whole, "masters") for peaks in (forward, backward))
            reducing = Counter(gradients=4 * part * (later > 0) + 4 * count)
        else:
            first, second = forward.rest, backward.rest
            # The loss is through with its own before a bucket is full.
            left = _times(_without(backward.rest, "loss"), later)
            reducing = Counter(buffers=(6 if bf16 else 4) * reduced) + left
            # In bf16 each micro-batch's are added to the sum as they come.
            reducing += Counter(gradients=4 * part * (not accumulating if bf16 else later > 0))
            state += Counter(gradients=4 * part * accumulating)
        if accumulating:  # they are allocated with the first gradient
            first += buffers
        return state + _most(first, second + buffers, reducing + buffers)
    working = 2 if bf16 else 4  # bytes of a weight that is computed with
    state = Counter(copies=working * part)
    if engine == "zero3":
        state += Counter(masters=4 * part, moments=8 * part, average=averaged * part, gradients=4 * part)
    small = sum(shape.numel() for shape in shapes if shape.numel() <= PERSISTENT)
    gathered = Counter(copies=working * min(count, LIVE))
    fetching = gathered + Counter(buffers=working * min(count, PREFETCHED))
    passing = gathered + _most(forward.rest, backward.rest)
    reducing = _times(passing, later) + Counter(buffers=8 * reduced)
    return state + buffers + Counter(copies=working * small) + _most(passing, fetching, reducing)


def _without(parts: Counter[str], *names: str) -> Counter[str]:
    return Counter({name: size for name, size in parts.items() if name not in names})


def _times(parts: Counter[str], factor: float) -> Counter[str]:
    return Counter({name: int(size * factor) for name, size in parts.items()})


def _most(*candidates: Counter[str]) -> Counter[str]:
    return max(candidates, key=Counter.total)


def counted(config: Config, gpu: bool, accumulating: bool, sharded: bool = False) -> tuple[Peaks, Peaks]:
    """Peaks of one micro-batch's forward pass, and of its backward pass.

    Args:
        gpu: count the kernels that a run takes on a GPU, or those of a CPU; see `kernels`.
        accumulating: gradients of an earlier micro-batch exist.
        sharded: as ZeRO runs it, on working weights without masters.
    """
    config = copy.deepcopy(config)
    attention, expert_kernel = kernels(config, gpu)
    unmasked = attention.startswith(("flash", "flex")) or attention == blockwise.NAME
    config.model.attn_implementation = _UNMASKED if unmasked else attention
    config.model.experts_implementation = expert_kernel
    tally = Tally()
    with FakeTensorMode(), _shapes_alone(gpu):
        model = granite.build(config)
        bf16 = config.precision == "bf16"
        if bf16 and sharded:
            for module in model.modules():
                for name, parameter in list(module.named_parameters(recurse=False)):
                    setattr(module, name, nn.Parameter(parameter.bfloat16()))
            model.tie_weights()
        loss = LanguageModelLoss(model)
        wrapped = optim.for_training(loss, config.engine.activation_checkpointing, bf16 and not sharded)
        balance = Balance(config, lambda tensor: tensor)
        tokens = torch.zeros(config.batch.micro_sequences, config.data.sequence_length, dtype=torch.int64)
        for parameter in loss.parameters():
            tally.move(parameter, "masters")
            if accumulating:
                parameter.grad = torch.zeros_like(parameter)
                tally.move(parameter.grad, "gradients")
        tally.follow(wrapped, loss)
        with tally:
            outputs = wrapped(input_ids=tokens, labels=tokens, position_ids=tokens)
            loss_of_all = total_loss(loss_terms(outputs, balance, outputs.targets, tokens.numel()), config.balance)
            forward = tally.peaks()
            loss_of_all.backward()
    return forward, tally.peaks()


def kernels(config: Config, gpu: bool) -> tuple[str, str]:
    """Attention and experts as they are counted. `auto` on a GPU in bf16 is counted as FlashAttention, which needs
    its package there; experts that read values of tensors are counted as grouped_mm."""
    chosen = granite.implementations(config, "cuda" if gpu else "cpu")
    attention = chosen["attn_implementation"]
    if config.model.attn_implementation == "auto" and gpu and config.precision == "bf16":
        attention = "flash_attention"
    expert_kernel = chosen.get("experts_implementation", config.model.experts_implementation)
    return attention, "grouped_mm" if expert_kernel in ("eager", "sonicmoe") else expert_kernel


_UNMASKED = "unmasked"


def _unmasked(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **_: Any) -> tuple[Tensor, None]:
    """What Flash-, FlexAttention and ours keep: inputs, output, log-sum-exps. No mask, and no keys repeated by head."""
    out = functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    return out.transpose(1, 2), None


AttentionInterface.register(_UNMASKED, _unmasked)


def _shapes_alone(gpu: bool) -> contextlib.ExitStack:
    """Patches where the code reads values or the device: experts get equal shares, and the loss a GPU's chunks."""

    def equal_shares(chosen: Tensor, num_experts: int) -> tuple[Tensor, list[int], list[int]]:
        counts = [-(-chosen.numel() // num_experts)] * num_experts
        return torch.zeros_like(chosen), counts, [experts._padded(count) for count in counts]

    stack = contextlib.ExitStack()
    stack.enter_context(patch.object(experts, "_sorted_by_expert", equal_shares))
    stack.enter_context(patch.object(moe, "_can_use_grouped_mm", lambda *_: False))  # its stand-in has every dtype
    if gpu:
        stack.enter_context(patch.object(train_loss, "_CACHED_LOGITS", train_loss._CHUNK_LOGITS))
    return stack


# ----------------------------------------------------------------------------------------------- what is printed


def memory_section(console: Console, config: Config, cluster: Cluster) -> str | None:
    """Print the memory of each engine, and what fits; return the engine to use, or None."""
    ways = cluster.engines(config)
    limit, micro = USABLE * (cluster.memory or 0), config.batch.micro_sequences
    share = config.batch.sequences // cluster.gpus
    # As configured first, then what else divides a rank's share, as long as anything fits.
    sizes = [micro, *(size for size in (2**n for n in range(16)) if size != micro and share % size == 0)]
    by_size: dict[int, dict[str, Counter[str]]] = {}
    for size in sizes:
        smaller = [found for other, found in by_size.items() if other < size]
        engines = [e for e in ways if all(found[e].total() <= limit for found in smaller if e in found)]
        if size != micro and not (engines := [e for e in engines if all(e in found for found in smaller)]):
            break
        changed = copy.deepcopy(config)
        changed.batch.micro_sequences = size
        passes = Passes(changed, cluster.gpus, cluster.on_gpu)
        by_size[size] = {e: needed(changed, e, cluster.gpus, passes) for e in engines}
    fits = {
        e: [size for size in sorted(by_size) if e in by_size[size] and by_size[size][e].total() <= limit] for e in ways
    }

    unit, name = (
        (1e9, "GB") if limit >= 20e9 and max(each.total() for each in by_size[micro].values()) > 1e9 else (1e6, "MB")
    )

    def sized(size: float) -> str:
        return f"{size / unit:,.1f}"

    console.rule(
        f"memory of one {'GPU' if cluster.on_gpu else 'rank'} in {name}, batch.micro_sequences={micro}", align="left"
    )
    shown = [part for part in PARTS if part != "average" or config.average.window is not None]
    table = table_of("", *shown, "sum", "")
    for engine, parts in by_size[micro].items():
        mark = "" if parts.total() <= limit else "✗"
        table.add_row(engine, *(sized(parts[part]) for part in shown), sized(parts.total()), mark)
    console.print(table)
    attention, experts = kernels(config, cluster.on_gpu)
    console.print(
        f"Peak of a step on {cluster.gpus} of them. ✗: over {USABLE:.0%} of {sized(cluster.memory or 0)} {name}. "
        f"Counted with {attention}{f', {experts}, equal shares for all experts' if config.model.is_moe else ''}"
        f"{', activation checkpointing' if config.engine.activation_checkpointing else ''}. copies: working weights; "
        "backward: gradients in transit; buffers: DeepSpeed's."
    )
    if "zero3_offload" in by_size[micro]:
        each = 16 + 4 * (config.average.window is not None)
        host = each * metrics.parameters_of(config)["total"] / cluster.gpus * min(cluster.gpus, cluster.gpus_per_node)
        console.print(f"zero3_offload keeps {sized(host)} {name} more in the memory of each machine.")
    if len(by_size) > 1:
        table = table_of("sum, by batch.micro_sequences", *map(str, sorted(by_size)))
        for engine in ways:
            sums = [by_size[size][engine].total() if engine in by_size[size] else None for size in sorted(by_size)]
            table.add_row(engine, *("✗" if each is None else f"{sized(each)}{' ✗' * (each > limit)}" for each in sums))
        console.print(table)
    able = [engine for engine in ways if fits[engine]]
    chosen = next((engine for engine in able if micro in fits[engine]), None)
    if chosen is None:
        if able:
            console.print(f"With {able[0]} batch.micro_sequences={fits[able[0]][-1]} would fit.")
        return None
    console.print(f"{chosen} is the simplest that fits, with up to {fits[chosen][-1]} sequences:")
    console.print(command_of(cluster, chosen, fits[chosen][-1]), soft_wrap=True, markup=False)
    return chosen


def command_of(cluster: Cluster, engine: str, micro: int) -> str:
    """The command to paste; the run's own settings go where `…` is."""
    if engine == "plain":
        return f"  accelerate launch $(which powertrain) train … batch.micro_sequences={micro}"
    if cluster.gpus <= cluster.gpus_per_node:
        environment = "ACCELERATE_USE_CPU=true " if not cluster.on_gpu and engine == "ddp" else ""
        file = f"--config_file $(powertrain path {engine}) --num_processes {cluster.gpus}"
        return f"  {environment}accelerate launch {file} $(which powertrain) train … batch.micro_sequences={micro}"
    nodes = -(-cluster.gpus // cluster.gpus_per_node)
    file = "" if engine == "zero3" else f"ACCELERATE_CONFIG=$(powertrain path {engine}) "
    return f"  {file}sbatch --nodes={nodes} $(powertrain path train.sbatch) … batch.micro_sequences={micro}"
