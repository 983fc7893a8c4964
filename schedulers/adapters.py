"""The schedules as PyTorch LRSchedulers, for transformers.Trainer or a loop of your own.

    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0)  # 1.0: see below
    scheduler = PowerLR(optimizer, batch_tokens=64 * 4096, warmup_tokens=100_000_000)
    trainer = Trainer(model, args, optimizers=(optimizer, scheduler), ...)

THE OPTIMIZER'S lr IS A MULTIPLIER. A group's learning rate is the schedule's times the lr that the group was created
with: 1.0 for plain training, 1 / m_width for the internal matrices under muP. torch's default for AdamW, 1e-3, would
divide every learning rate by a thousand, so the adapters warn when the largest lr is below 0.01.
"""

import warnings
from typing import Any, ClassVar

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from powertrain.schedulers import Schedule, build


def _whole(name: str, value: float, least: int) -> int:
    # Always a plain int: torch.load(weights_only=True) refuses a state with NumPy's integers.
    if value != int(value) or value < least:
        raise ValueError(f"{name} must be a whole number of tokens, {least} or more; it is {value!r}.")
    return int(value)


class _TokenLR(LRScheduler):
    """Sets the learning rate from an integer count of tokens, so that the batch may change during training.

    With a constant batch, step k (from 0) gets `schedule(tokens=tokens_seen + k * batch_tokens,
    batch=batch_tokens / 4096)`. Call `step()` once after every `optimizer.step()`. Do not pass it to
    `Accelerator.prepare`, as Trainer does not: with several processes it would count a step once for each.

    The state has the token count, the batch and the multipliers, but not the schedule's fields: a resumed run gets the
    learning rates of an uninterrupted one, and one that is resumed with a decay added decays.

    Args:
        optimizer: its groups' lr are multipliers of the schedule's learning rate; use lr=1.0.
        batch_tokens: tokens of one optimizer step, over all ranks and accumulated micro-batches.
        tokens_seen: tokens already trained when step 0 begins.
        last_epoch: index of the last step done, -1 for none; `load_state_dict` sets it on resume.
        fields: the fields of the schedule; `decay` may be a Decay, a mapping of its fields, or None.

    Attributes:
        tokens: tokens before the next step.

    Raises:
        ValueError: an unknown field, a value out of its range, or a decay in which no step begins.
    """

    _name: ClassVar[str]

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        batch_tokens: int,
        tokens_seen: int = 0,
        last_epoch: int = -1,
        **fields: Any,
    ) -> None:
        self.schedule: Schedule = build(self._name, **fields)
        self.batch_tokens = _whole("batch_tokens", batch_tokens, least=1)
        # LRScheduler's constructor calls step() once, which brings the count to that of the next step.
        self.tokens = _whole("tokens_seen", tokens_seen, least=0) + last_epoch * self.batch_tokens
        super().__init__(optimizer, last_epoch)
        self._check_decay()
        largest = max(float(multiplier) for multiplier in self.base_lrs)
        if largest < 0.01:
            warnings.warn(
                f"The optimizer's largest lr is {largest:g}, and {type(self).__name__} multiplies the "
                "schedule's learning rate by it. If it is meant as one, create the optimizer with lr=1.0.",
                stacklevel=2,
            )

    def set_batch_tokens(self, batch_tokens: int) -> None:
        """Set the tokens of the next step and of those after it.

        Call it between `step()` and the next `optimizer.step()`; the learning rate of that step changes at once.

        Raises:
            ValueError: `batch_tokens` is not a whole number above 0, or no step of it begins in a decay to come.
        """
        before, self.batch_tokens = self.batch_tokens, _whole("batch_tokens", batch_tokens, least=1)
        try:
            self._check_decay()
        except ValueError:
            self.batch_tokens = before
            raise
        self._write_rates()

    def step(self, epoch: int | None = None) -> None:
        """Count the step just done and set the learning rate of the next one.

        Raises:
            ValueError: `epoch` was given.
        """
        if epoch is not None:
            raise ValueError(f"{type(self).__name__}.step takes no epoch: it counts the tokens trained.")
        self.tokens += self.batch_tokens
        super().step()

    def get_lr(self) -> list[Any]:
        """The next step's learning rate of every parameter group."""
        rate = self.schedule(tokens=self.tokens, batch=self.batch_tokens / 4096)
        return [rate * float(multiplier) for multiplier in self.base_lrs]

    def state_dict(self) -> dict[str, Any]:
        """The token count, the batch and the multipliers, as plain numbers."""
        return {
            "tokens": self.tokens,
            "batch_tokens": self.batch_tokens,
            "last_epoch": self.last_epoch,
            "_step_count": self._step_count,
            "base_lrs": [float(multiplier) for multiplier in self.base_lrs],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume from `state_dict`; the batch is the saved one, until `set_batch_tokens` changes it."""
        super().load_state_dict(state_dict)
        self._write_rates()

    def _check_decay(self) -> None:
        start, end = self.schedule.fall or (0, 0)
        # A step's learning rate is that at the tokens before it; at the decay's start it is still the trunk's.
        first = self.tokens + ((start - self.tokens) // self.batch_tokens + 1) * self.batch_tokens
        if end > start and self.tokens <= start and first >= end:
            raise ValueError(
                f"{type(self).__name__}: the decay from {start:,} tokens on takes {end - start:,}, and no step of "
                f"{self.batch_tokens:,} begins in it, so it has no effect. Make it longer than a step, or remove it."
            )

    def _write_rates(self) -> None:
        self._last_lr = self.get_lr()
        for group, rate in zip(self.optimizer.param_groups, self._last_lr, strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate


class PowerLR(_TokenLR):
    """`Power` for an optimizer: PowerLR(optimizer, batch_tokens=..., warmup_tokens=..., decay=...)."""

    _name = "power"


class WSDLR(_TokenLR):
    """`WSD` for an optimizer: WSDLR(optimizer, batch_tokens=..., lr=..., warmup_tokens=..., decay=...)."""

    _name = "wsd"


class CosineLR(_TokenLR):
    """`Cosine` for an optimizer, with its lr, warmup_tokens, total_tokens and floor."""

    _name = "cosine"


class ConstantLR(_TokenLR):
    """`Constant` for an optimizer, with its lr and warmup_tokens."""

    _name = "constant"
