"""The only file that knows accelerate: one process or data parallel (DDP), on CPU or GPU.

Gradients are sums over the global batch: the loop divides by global counts, so neither the number of
micro-batches nor the number of ranks appears in any setting here.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import DistributedType, broadcast_object_list
from torch import Tensor, nn

from train import optim
from train.config import Config, ConfigError
from train.loss import LanguageModelLoss, Outputs
from train.model import mup

T = TypeVar("T")

# transformers reaches the optimizer's moments by these names; so does a checkpoint.
MOMENTS = ("exp_avg", "exp_avg_sq")


class Engine:
    """Puts a model on its device, and takes optimizer steps with it on all ranks alike."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.accelerator = Accelerator(
            mixed_precision="no",  # precision is ours: see optim.BFloat16Weights
            log_with=config.tracker.log_with or None,
            kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
        )
        kinds = (
            DistributedType.NO,
            DistributedType.MULTI_CPU,
            DistributedType.MULTI_GPU,
        )
        if self.accelerator.distributed_type not in kinds:
            raise ConfigError(
                f"accelerate was configured for {self.accelerator.distributed_type.value}; this version trains "
                "with one process or data parallel (NO, MULTI_CPU, MULTI_GPU). Choose another accelerate config."
            )
        expected = int(os.environ.get("WORLD_SIZE", 1))
        if self.accelerator.num_processes != expected:
            raise ConfigError(
                f"The launcher started {expected} processes but accelerate sees {self.accelerator.num_processes}: "
                "every rank would train a run of its own. For CPU ranks use "
                "`ACCELERATE_USE_CPU=true torchrun --nproc_per_node N train.py …`."
            )
        self.device = self.accelerator.device
        self.rank = self.accelerator.process_index
        self.world_size = self.accelerator.num_processes
        self.is_main = self.accelerator.is_main_process
        if self.device.type == "cpu":
            # accelerate launch leaves one thread to a single process, however many cores there are.
            local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
            cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
            torch.set_num_threads(config.threads or max(1, cores // local))

    def prepare(self, loss: LanguageModelLoss, rows: dict[str, mup.Row]) -> None:
        """Take the initialised float32 model; make its optimizer."""
        self.loss = loss.to(self.device)
        self.model = loss.model
        module: nn.Module = optim.BFloat16Weights(loss) if self.config.precision == "bf16" else loss
        self.module = self.accelerator.prepare_model(module)
        groups = optim.parameter_groups(self.model.named_parameters(), rows, self.config.optimizer)
        self.optimizer = optim.adamw(groups, self.config.optimizer)

    def forward(self, batch: dict[str, Tensor], last: bool) -> Outputs:
        """One micro-batch forward. Ranks exchange gradients only in the `last` one of a step."""
        with contextlib.nullcontext() if last else self.accelerator.no_sync(self.module):
            return self.module(**batch)

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add the gradient of this rank's share of the loss. After the `last` one it is the global sum."""
        with contextlib.nullcontext() if last else self.accelerator.no_sync(self.module):
            (loss * self.world_size).backward()  # DDP takes the mean over ranks; ours are shares of a sum

    def step(self, lr: float) -> tuple[float, bool]:
        """Clip, and step at the rate `lr` (each group by its multiplier), unless the gradient is not finite.

        Returns:
            The norm of the whole gradient before clipping, and whether the step was skipped; a skipped step
            leaves weights and moments as they were.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_multiplier"]
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.config.optimizer.max_grad_norm).item()
        skipped = not torch.isfinite(torch.tensor(norm)).item()
        if not skipped:
            self.optimizer.step()
        self.optimizer.zero_grad()
        return norm, skipped

    def learning_rates(self) -> dict[str, float]:
        """The rate of each group in the last step."""
        return {group["name"]: group["lr"] for group in self.optimizer.param_groups}

    def reduce(self, tensor: Tensor) -> Tensor:
        """Sum over ranks; a tensor on any device comes back on the same one."""
        if self.world_size == 1:
            return tensor
        summed: Tensor = self.accelerator.reduce(tensor.to(self.device), "sum")
        return summed.to(tensor.device)

    def first_rank_decides(self, decide: Callable[[], T]) -> T:
        """What `decide` returned on the first rank, on all of them; its ConfigError is raised on all, too."""
        decision: list[Any] = [None, None]
        if self.is_main:
            try:
                decision[0] = decide()
            except ConfigError as error:
                decision[1] = str(error)
        broadcast_object_list(decision)
        if decision[1] is not None:
            raise ConfigError(decision[1])
        return decision[0]

    def main_first(self) -> contextlib.AbstractContextManager[None]:
        """The first rank runs the block before the others do."""
        return self.accelerator.main_process_first()

    def barrier(self) -> None:
        """Wait for all ranks."""
        self.accelerator.wait_for_everyone()

    def close(self) -> None:
        """Leave the process group; without it a rank can abort on its way out."""
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()

    # ------------------------------------------------------------------ state by Hugging Face parameter name

    def full_parameters(self) -> dict[str, Tensor]:
        """The float32 master weights by name, tied ones once."""
        return {name: parameter.detach() for name, parameter in self.model.named_parameters()}

    def optimizer_state(self) -> tuple[int, dict[str, dict[str, Tensor]]]:
        """(steps taken, moment → parameter name → tensor). Before the first step there are no moments."""
        moments: dict[str, dict[str, Tensor]] = {moment: {} for moment in MOMENTS}
        taken = 0
        for name, parameter in self.model.named_parameters():
            if state := self.optimizer.state.get(parameter):
                taken = int(state["step"])
                for moment in MOMENTS:
                    moments[moment][name] = state[moment]
        return taken, moments

    @torch.no_grad()
    def load(self, parameters: dict[str, Tensor], taken: int, moments: dict[str, dict[str, Tensor]]) -> None:
        """Put back what `full_parameters` and `optimizer_state` gave.

        Raises:
            KeyError: a parameter is missing.
        """
        for name, parameter in self.model.named_parameters():
            parameter.copy_(parameters[name])
            if taken:
                state: dict[str, Any] = {moment: moments[moment][name].to(self.device, copy=True) for moment in MOMENTS}
                state["step"] = torch.tensor(float(taken), device=self.device)
                self.optimizer.state[parameter] = state
