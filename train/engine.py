"""The only module that runs accelerate and DeepSpeed: one process, data parallel (DDP), or ZeRO 1, 2, 3.

Gradients are sums over the global batch: `step.train_step` divides by global counts, so neither the number of
micro-batches nor the number of ranks appears in any setting here.

Whatever the engine, the float32 masters and the moments of AdamW lie on each rank as fragments: a range of a
parameter's elements. `fragments` and `load` use nothing else, so a checkpoint fits every engine.
"""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import math
import os
import platform
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.utils import DistributedType, broadcast_object_list, gather_object
from torch import Tensor, nn
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from powertrain.data import DataError
from powertrain.train import optim
from powertrain.train.config import Config
from powertrain.train.errors import ConfigError, RunFailed
from powertrain.train.hardware import available_cores
from powertrain.train.loss import LanguageModelLoss, Outputs, logits_of
from powertrain.train.model import granite, mup

T = TypeVar("T")
Read = Callable[[str, int, int], Tensor]  # (parameter, start, stop) → its elements [start, stop), flat

# glibc's options in malloc.h: the free memory that is returned to the system, how much is asked for at a time, and how
# many blocks may lie outside the heap.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4

# AdamW's own names; so are those in a checkpoint.
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Fragment:
    """Elements [start, stop) of a flattened parameter: the part that this rank keeps.

    Attributes:
        master: (stop − start,) their float32 values, a view.
        flat: the tensor that the optimizer keys its state by, in which they begin at `offset`.
    """

    start: int
    stop: int
    master: Tensor
    flat: Tensor
    offset: int


class Engine:
    """Puts a model on its devices, and takes optimizer steps with it on all ranks alike.

    Attributes:
        kind: plain, ddp, zero1, zero2 or zero3.
        sharded: whether each rank keeps fragments of its own, or all keep everything.
        lr_multipliers: group of parameters → what muP multiplies its learning rate by.
        first_rank_error: what `first_rank_decides` raised, which the first rank prints for all.

    Raises:
        ConfigError: launcher, accelerate's configuration, kernels or trackers do not fit the settings.
        RunFailed: the ranks did not come together.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        on_cpu = not torch.cuda.is_available()
        if on_cpu:
            os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read when DeepSpeed is imported
        handlers: list[Any] = [DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)]
        ranks = _launched()
        if ranks > 1 or os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
            backend, timeout = ("gloo" if on_cpu else None), datetime.timedelta(seconds=config.engine.timeout)
            handlers.append(InitProcessGroupKwargs(backend=backend, timeout=timeout))
        if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true" and os.environ.get("LOCAL_RANK", "0") == "0":
            warn_of_unfinished_builds()
        with _joining(ranks, config.engine.timeout):
            self.accelerator = Accelerator(
                mixed_precision="no",  # precision is ours: see optim.BFloat16Weights
                log_with=config.tracker.log_with or None,
                project_dir=str(config.run_folder),
                kwargs_handlers=handlers,
            )
        if unknown := set(config.tracker.log_with) - {str(tracker) for tracker in self.accelerator.log_with}:
            raise ConfigError(
                f"tracker.log_with names {', '.join(sorted(unknown))}, which is not installed: "
                f"pip install {' '.join(sorted(unknown))}. Or choose tracker=jsonl."
            )
        self.first_rank_error: Exception | None = None
        self.device = self.accelerator.device
        self.rank = self.accelerator.process_index
        self.world_size = self.accelerator.num_processes
        self.is_main = self.accelerator.is_main_process
        self.kind = self._kind()
        self.sharded = self.kind.startswith("zero")
        self._check_launch()
        granite.check_kernels(config, self.device)
        if self.sharded:
            self._configure_deepspeed()
        if self.device.type == "cpu":
            _keep_freed_memory()
        if self.device.type == "cpu" or self._offloads():
            # accelerate launch leaves one thread to a process, however many cores there are.
            local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
            torch.set_num_threads(config.threads or max(1, available_cores() // local))

    def _offloads(self) -> bool:
        if not self.sharded:
            return False
        zero = self.accelerator.deepspeed_plugin.deepspeed_config["zero_optimization"]
        return bool(zero.get("offload_optimizer", {}).get("device", "none") != "none")

    def _kind(self) -> str:
        found = self.accelerator.distributed_type
        if found == DistributedType.DEEPSPEED:
            return f"zero{self.accelerator.deepspeed_plugin.zero_stage}"
        kinds = {DistributedType.NO: "plain", DistributedType.MULTI_CPU: "ddp", DistributedType.MULTI_GPU: "ddp"}
        if found not in kinds:
            raise ConfigError(
                f"accelerate was configured for {found.value}; a run trains with one process, data parallel or "
                "DeepSpeed ZeRO. The files in launch/accelerate/ are configurations that fit."
            )
        return kinds[found]

    def _check_launch(self) -> None:
        """Check that what was launched is what runs."""
        expected = _launched()
        if self.world_size != expected or (expected > 1 and self.kind == "plain"):
            raise ConfigError(
                f"The launcher started {expected} processes but accelerate, on {self.device.type}, did not join them: "
                "every rank would train a run of its own. Where there are no GPUs, data parallel takes "
                "`ACCELERATE_USE_CPU=true` before the command; the files launch/accelerate/zero*.yaml do not."
            )
        if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true" and not self.sharded:
            raise ConfigError(
                "The accelerate file asks for DeepSpeed, but ACCELERATE_USE_CPU is set in the environment, which makes "
                f"it {self.kind}. Unset it: on CPUs only launch/accelerate/ddp.yaml needs it."
            )
        if self.kind == "zero0":
            raise ConfigError(
                "DeepSpeed was configured with ZeRO stage 0, which shards nothing and steps on gradients that are not "
                "finite. Use launch/accelerate/ddp.yaml, or stage 1, 2 or 3."
            )
        wanted = self.config.engine.expect
        if wanted is not None and wanted != self.kind:
            raise ConfigError(
                f"engine.expect is {wanted}, but {self.kind} was started, on {self.world_size} rank(s). Launch with "
                f"`accelerate launch --config_file $(powertrain path {wanted}) $(which powertrain) train …`, or change "
                "the setting."
            )

    def _configure_deepspeed(self) -> None:
        """Override the accelerate file where the run decides: precision, clipping, and that we accumulate."""
        self.accelerator.deepspeed_plugin.deepspeed_config.update(
            train_batch_size=self.world_size,
            train_micro_batch_size_per_gpu=1,
            gradient_accumulation_steps=1,  # ours: see `forward`
            gradient_clipping=self.config.optimizer.max_grad_norm,
            # ZeRO 1 would keep the gradients in bf16 until the step besides.
            bf16={"enabled": self.config.precision == "bf16", "immediate_grad_update": True},
            fp16={"enabled": False},
            data_types={"grad_accum_dtype": "fp32"},
            communication_data_type="fp32",
            # ZeRO 2 would divide in bf16, which rounds if the number of ranks is no power of two. ZeRO 3 knows no sum.
            gradient_allreduce_op="mean" if self.kind == "zero3" else "sum",
            zero_force_ds_cpu_optimizer=False,  # torch's AdamW, which has a fast CPU kernel, wherever the state is
            steps_per_print=None,
        )
        # Transformers would shard every model that is built or loaded from now on; `building` says which one is.
        unset_hf_deepspeed_config()

    def building(self) -> contextlib.AbstractContextManager[Any]:
        """The context to build the model in. ZeRO-3 shards every tensor as soon as it is made."""
        if self.kind != "zero3":
            return contextlib.nullcontext()
        import deepspeed

        # PyTorch lists its constructors at the first use of a device context, and zero.Init replaces them: were that
        # the first, no later device context would know them.
        with torch.device("meta"):
            torch.empty(0)
        return deepspeed.zero.Init(config_dict_or_path=self.accelerator.deepspeed_plugin.deepspeed_config)

    def prepare(self, loss: LanguageModelLoss, rows: dict[str, mup.Row]) -> None:
        """Take the float32 model, whose weights `load` brings; make its optimizer. Collective."""
        self.loss = loss.to(self.device)
        self.model = loss.model
        if self.config.engine.torch_compile:
            for layer in self.model.model.layers:
                layer.compile()
        self._parameters = list(self.model.parameters())
        self.shapes = {
            name: torch.Size(getattr(parameter, "ds_shape", parameter.shape))
            for name, parameter in self.model.named_parameters()
        }
        casting = self.config.precision == "bf16" and not self.sharded
        self._take_module(optim.for_training(loss, self.config.engine.activation_checkpointing, casting), rows)
        # Computed on the CPU, as Transformers does when it loads a model; ZeRO in bf16 has rounded them besides.
        rotary = self.model.model.rotary_emb
        for name, frequencies in type(rotary)(self.model.config).named_buffers():
            setattr(rotary, name, frequencies.to(self.device))

    def _take_module(self, module: nn.Module, rows: dict[str, mup.Row]) -> None:
        groups = optim.parameter_groups(self.model.named_parameters(), rows, self.config.optimizer)
        self.lr_multipliers: dict[str, float] = {group["name"]: group["lr_multiplier"] for group in groups}
        # ZeRO's partitions, and with them the order of its sums, go by the groups.
        self.optimizer = optim.adamw(groups if self.sharded else optim.merged(groups), self.config.optimizer)
        if not self.sharded:
            self.module = self.accelerator.prepare_model(module)
            return
        if self.kind == "zero3":
            self._tell_zero3_of_the_model()
        self.module, _ = self.accelerator.prepare(module, self.optimizer)
        unset_hf_deepspeed_config()  # accelerate has set it again
        self.zero = self.module.optimizer

    def _tell_zero3_of_the_model(self) -> None:
        import deepspeed

        # Ranks that use different experts would deadlock.
        if blocks := {type(block) for block in granite.moe_blocks(self.model)}:
            deepspeed.utils.set_z3_leaf_modules(self.loss, list(blocks))
        # The loss multiplies with the head's weight itself, without going through the head.
        deepspeed.zero.register_external_parameter(self.loss, self.model.lm_head.weight)

    def forward(self, batch: dict[str, Tensor], last: bool) -> Outputs:
        """One micro-batch forward. The gradients of a step are complete after the `last` one."""
        if self.sharded:
            self.module.set_gradient_accumulation_boundary(last)
            return self.module(**batch)
        with contextlib.nullcontext() if last else self.accelerator.no_sync(self.module):
            return self.module(**batch)

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of this rank's share of the loss. After the last one it is the global sum."""
        if self.kind in ("ddp", "zero3"):
            loss = loss * self.world_size  # they take the mean over ranks; ours are shares of a sum
        if self.sharded:
            self.module.backward(loss)
        else:
            loss.backward()

    def step(self, lr: float) -> tuple[float, bool]:
        """Clip, and step at the learning rate `lr` (each group by its multiplier), unless the gradient is not finite.

        Returns:
            The norm of the whole gradient before clipping, and whether the step was skipped; a skipped step
            leaves weights and moments as they were.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_multiplier"]
        if self.sharded:
            self.module.step()
            return float(self.module.get_global_grad_norm()), not self.module.was_step_applied()
        norm = nn.utils.clip_grad_norm_(self._parameters, self.config.optimizer.max_grad_norm).item()
        skipped = not math.isfinite(norm)
        if not skipped:
            self.optimizer.step()
        # DDP's gradients are views of its buckets; set to None, the next ones would be allocated beside them.
        self.optimizer.zero_grad(set_to_none=self.kind != "ddp")
        return norm, skipped

    def logits(self, input_ids: Tensor) -> Tensor:
        """(B, S, V) float32, by the forward pass that trains. Collective: call it equally often on every rank."""
        # Compiled layers round differently from those of an exported model, which these are compared with.
        with torch.compiler.set_stance("force_eager"):
            return logits_of(self.module, input_ids.to(self.device))

    def reduce(self, tensor: Tensor) -> Tensor:
        """Sum over ranks; the result is on the tensor's device. Collective."""
        if self.world_size == 1:
            return tensor
        summed: Tensor = self.accelerator.reduce(tensor.to(self.device), "sum")
        return summed.to(tensor.device)

    def gather(self, value: T) -> list[T]:
        """The values of all ranks, on all of them. Collective."""
        return list(gather_object([value])) if self.world_size > 1 else [value]

    def first_rank_decides(self, decide: Callable[[], T]) -> T:
        """What `decide` returns on the first rank, on all of them. Collective.

        Raises:
            ConfigError, data.DataError, OSError: on all ranks, what it raised on the first.
        """
        decision: list[Any] = [None, None]
        if self.is_main:
            try:
                decision[0] = decide()
            except (ConfigError, DataError, OSError) as error:
                decision[1] = error
        if self.world_size > 1:
            broadcast_object_list(decision)
        if decision[1] is not None:
            self.first_rank_error = decision[1]
            raise decision[1]
        return decision[0]

    def check_shared(self, path: Path) -> None:
        """Check that all ranks see the file that the first one has made. Collective.

        Raises:
            ConfigError: some do not.
        """
        if blind := int(self.reduce(torch.tensor(int(not path.exists())))):
            raise ConfigError(
                f"{blind} of {self.world_size} ranks do not see {path.parent}: run.folder has to lie on a file system "
                "that all machines share."
            )

    def hardware(self) -> dict[str, Any]:
        """For run.json, what decides the last bits of a sum: kernels, device, ranks and threads."""
        on_gpu = self.device.type == "cuda"
        return {
            "kernels": granite.kernels(self.config, self.device),
            "device": torch.cuda.get_device_name(self.device) if on_gpu else platform.processor() or self.device.type,
            "ranks": self.world_size,
            "threads": torch.get_num_threads(),
            "cores": os.cpu_count(),
            "machine": platform.machine(),
        }

    def lost_a_rank(self, error: RuntimeError) -> bool:
        """Whether an error comes from a collective that another rank has left by dying."""
        return self.world_size > 1 and re.search(r"\bpeer\b|remote process exited|Broken pipe", str(error)) is not None

    # ------------------------------------------------------------------ state by Hugging Face parameter name

    def fragments(self) -> dict[str, Fragment]:
        """What this rank keeps of each parameter, tied ones once."""
        found = {}
        for name, parameter in self.model.named_parameters():
            fragment = self._fragment(parameter)
            if fragment is not None and fragment.stop > fragment.start:
                found[name] = fragment
        return found

    def _fragment(self, parameter: Any) -> Fragment | None:
        if self.kind == "zero3":
            group, offset, numel = self.zero.grad_position[self.zero.get_param_id(parameter)]
            start = self.rank * int(numel)
            stop = min(start + int(numel), parameter.ds_numel)  # the last ranks hold padding
            flat, offset = self.zero.fp32_partitioned_groups_flat[group], int(offset)
        elif self.sharded:
            mapping = parameter._hp_mapping
            if mapping is None:
                return None
            (flat,) = self.optimizer.param_groups[mapping.param_group_index]["params"]  # DeepSpeed has put it there
            start, offset = mapping.lp_fragment_address.start, mapping.hp_fragment_address.start
            stop = start + mapping.lp_fragment_address.numel
        else:
            start, stop, flat, offset = 0, parameter.numel(), parameter, 0
        return Fragment(start, stop, flat.detach().view(-1)[offset : offset + max(0, stop - start)], flat, offset)

    def moment(self, fragment: Fragment, name: str) -> Tensor:
        """(stop − start,) one of MOMENTS.

        Raises:
            KeyError: before the first step there are none.
        """
        state: Tensor = self.optimizer.state[fragment.flat][name]
        return state.view(-1)[fragment.offset : fragment.offset + len(fragment.master)]

    def steps_taken(self) -> int:
        """Steps that AdamW has taken, without skipped ones; its bias correction counts them."""
        return next((int(state["step"]) for state in self.optimizer.state.values()), 0)

    @torch.no_grad()
    def load(self, weights: Read, taken: int = 0, moments: dict[str, Read] | None = None) -> None:
        """Load masters and moments; only what this rank keeps is read. Collective.

        Args:
            taken: steps that AdamW has taken.
            moments: by the names of MOMENTS; None for a model that begins.

        Raises:
            ConfigError: `weights` or a moment does not have something (by `checkpoint.Stored.read`).
        """
        fragments = self.fragments()
        for name, fragment in fragments.items():
            fragment.master.copy_(weights(name, fragment.start, fragment.stop))
        if moments:
            for flat in {id(f.flat): f.flat for f in fragments.values()}.values():
                state: dict[str, Tensor] = {moment: torch.zeros_like(flat) for moment in MOMENTS}
                state["step"] = torch.tensor(float(taken), device=flat.device)
                self.optimizer.state[flat] = state
            for name, fragment in fragments.items():
                for moment, read in moments.items():
                    self.moment(fragment, moment).copy_(read(name, fragment.start, fragment.stop))
        self.masters_changed()

    def masters_changed(self) -> None:
        """Have the forward pass use masters that were written to. Collective."""
        # DeepSpeed 0.19 has no public call for masters that have changed: these are what its own loading of a
        # checkpoint calls, so that what the forward pass gathers is cast from them anew.
        if self.kind == "zero3":
            self.zero._partition_all_parameters()
            for group in range(len(self.zero.fp16_groups)):
                self.zero._reassign_or_swap_out_partitioned_parameters(group)
            if persistent := self.zero.persistent_parameters:
                persistent[0].all_gather(persistent)
        elif self.sharded:
            self.zero.update_lp_params()

    def full_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """(name, float32 master) of every parameter, one at a time, on its device. Collective: iterate to the end."""
        for name, parameter in self.model.named_parameters():
            if self.sharded:
                from deepspeed.utils import safe_get_full_fp32_param

                yield name, safe_get_full_fp32_param(parameter).view(self.shapes[name])
            else:
                yield name, parameter.detach()


def _launched() -> int:
    """How many processes a launcher has started to train together.

    Raises:
        ConfigError: the environment has a WORLD_SIZE above 1, and not the addresses to connect with.
    """
    size = os.environ.get("WORLD_SIZE") or "1"
    needed = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in needed if not os.environ.get(name)]
    if size == "1" or (size.isdecimal() and not missing):
        return int(size)
    raise ConfigError(
        f"WORLD_SIZE is '{size}' in the environment{f', and {chr(44).join(missing)} not set' * bool(missing)}: it is a "
        "launcher's to set, with all that processes need to find each other. Unset it for a single process, or start "
        "several with `accelerate launch --num_processes N $(which powertrain) train …`."
    )


def warn_of_unfinished_builds() -> None:
    """Warn of locks on DeepSpeed's extensions, which PyTorch compiles at their first use.

    A build that is killed leaves its lock, and whoever needs the extension then waits for ever, without a word.
    """
    from torch.utils import cpp_extension

    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root())
    for lock in sorted([*root.glob("*/lock"), *root.glob("*/*/lock")]):
        try:
            age = time.time() - lock.stat().st_mtime
        except FileNotFoundError:  # a build has just ended
            continue
        if age > 60:  # not one that another rank has just made
            print(
                f"Warning: {lock} is {age / 60:,.0f} minutes old. If no other process is compiling that extension of "
                "DeepSpeed, one that was has been killed, and this run would wait for ever: delete the file.",
                flush=True,
            )


@contextlib.contextmanager
def _joining(ranks: int, timeout: float) -> Iterator[None]:
    """Around what joins the ranks: they wait for each other for `timeout` seconds, and in later collectives for a day.

    That long the first one may prepare a large corpus; train.watchdog ends a run in which a rank hangs.

    Raises:
        RunFailed: they did not come together.
    """
    try:
        yield
        if torch.distributed.is_initialized():
            torch.distributed.barrier()  # NCCL connects only when something is sent
            torch.distributed.distributed_c10d._set_pg_timeout(datetime.timedelta(days=1))
    except (RuntimeError, ValueError) as error:
        if ranks == 1:
            raise
        raise RunFailed(
            f"The {ranks} ranks did not come together within {timeout:g} s (engine.timeout): "
            f"{str(error).partition(chr(10))[0].rstrip('.')}. One that could not start says why in its own lines. If "
            "all did, they do not reach each other: where a host's name means 127.0.0.1 to itself, or there are "
            "several networks, name the interface in GLOO_SOCKET_IFNAME (CPUs) or NCCL_SOCKET_IFNAME (GPUs)."
        ) from error


def _keep_freed_memory() -> None:
    """Have glibc, where that is the C library, reuse freed memory.

    By default it returns large blocks to the system, and every step then waits for their pages to be zeroed again.
    """
    with contextlib.suppress(AttributeError, OSError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(_M_TOP_PAD, 2**28)
