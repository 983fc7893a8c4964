"""One optimizer step, requests to stop, and the loop that takes steps until the budget is used or someone says stop."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from powertrain.data.loader import IGNORE_INDEX, Batches
from powertrain.schedulers import power_of
from powertrain.train import faults, metrics
from powertrain.train.balance import Balance
from powertrain.train.config import BalanceConfig, Config, ConfigError, Diverged
from powertrain.train.engine import Engine
from powertrain.train.loss import Outputs
from powertrain.train.state import State

MAX_SKIPPED_IN_A_ROW = 10


Terms = tuple[Tensor, Tensor, Tensor]


def loss_terms(outputs: Outputs, balance: Balance, targets: Tensor, batch_tokens: int) -> Terms:
    """A micro-batch's share of (cross-entropy, balance, z); shares add up to the terms of the global batch.

    Args:
        targets: number of targets in the global batch.
        batch_tokens: number of tokens in it, masked targets included.
    """
    return outputs.cross_entropy / targets, *balance.losses(outputs, batch_tokens)


def total_loss(terms: Terms, config: BalanceConfig) -> Tensor:
    """What is minimised: cross-entropy + c · balance + c_z · z. The last two are 0 for a dense model."""
    lm_loss, balance_loss, z_loss = terms
    return lm_loss + config.router_aux_loss_coef * balance_loss + config.router_z_loss_coef * z_loss


def train_step(
    config: Config,
    engine: Engine,
    batches: Batches,
    balance: Balance,
    state: State,
) -> dict[str, Any]:
    """Take one step and advance `state`; what happened, as a line of metrics.jsonl. Collective."""
    start = time.perf_counter()
    step = state.step + 1
    faults.at("step", engine.rank, step)
    length, micro = config.data.sequence_length, config.batch.micro_sequences
    sequences = config.batch_at(state.tokens - config.run.tokens_seen)
    beta = config.beta(sequences)
    schedule = config.make_schedule()
    power = power_of(schedule)
    lr = schedule(tokens=state.tokens, batch=beta)

    # ---- this rank's share of samples [k, k + sequences): one contiguous run of them
    share = sequences // engine.world_size
    samples = to_device(batches.batch(state.samples + engine.rank * share, share), engine.device)
    data_seconds = time.perf_counter() - start
    after = state.tokens + sequences * length
    # Not on a CPU, whose threads wait for each other when a reader takes a core from one.
    if engine.device.type != "cpu" and after < config.end_tokens:
        upcoming = config.batch_at(after - config.run.tokens_seen) // engine.world_size
        batches.prefetch(state.samples + sequences + engine.rank * upcoming, upcoming)
    batch_tokens = sequences * length
    targets = engine.reduce((samples["labels"] != IGNORE_INDEX).sum()).clamp(min=1)

    # ---- forward and backward; each micro-batch adds its part of the global mean
    sums = torch.zeros(3, dtype=torch.float64, device=engine.device)
    for first in range(0, share, micro):
        last = first + micro >= share
        outputs = engine.forward({name: part[first : first + micro] for name, part in samples.items()}, last)
        terms = loss_terms(outputs, balance, targets, batch_tokens)
        engine.backward(faults.spoiled(total_loss(terms, config.balance), engine.rank, step))
        sums += torch.stack(terms).detach().double()

    grad_norm, skipped = engine.step(lr)
    assignments = balance.end_step(skipped)
    lm_loss, balance_loss, z_loss = terms = tuple(engine.reduce(sums).cpu())

    record = {
        "step": step,
        "tokens": state.tokens,  # n, before this step: what the schedule was asked with
        "samples": state.samples,  # the step trains on samples [samples, samples + batch sequences)
        "loss": total_loss(terms, config.balance).item(),
        "lm_loss": lm_loss.item(),
        "balance_loss": balance_loss.item(),
        "z_loss": z_loss.item(),
        "lr": lr,
        "lr_per_group": engine.learning_rates(),
        "batch": beta,
        "gamma": lr / beta,
        "at_cap": power is not None and power.at_cap(state.tokens, beta),
        "phase": schedule.phase(state.tokens),
        "grad_norm": grad_norm,
        "skipped": skipped,
    }
    if power is not None and power.batch_exponent > 0:  # or no batch reaches the cap by being larger
        record["critical_batch"] = power.critical_batch(state.tokens)
    if balance.num_experts:
        record["expert_load"] = metrics.expert_load(assignments)
        record["expert_load"]["collapsed"] = metrics.collapsed_layers(assignments, config.model.num_experts_per_tok)
    state.advance(sequences, length, skipped)
    seconds = time.perf_counter() - start
    record["tokens_per_second"] = batch_tokens / seconds
    record["data_seconds"] = data_seconds  # of them the first rank waited for its batch
    for name, value in record.items():
        if isinstance(value, float) and not math.isfinite(value):
            record[name] = None  # `skipped` says what happened
    return record


class Stop:
    """Collects requests to stop: a signal of SIGNALS to any rank, or a file `stop` in the run folder."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
    early = 0  # one that came before

    def __init__(self, folder: Path, engine: Engine, check_ours: Callable[[], None]) -> None:
        self.file = folder / "stop"
        self.engine = engine
        self.check_ours = check_ours
        self._signal = self.early
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Stop:
        for number in self.SIGNALS:
            # nohup has the closing of a terminal ignored.
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: object) -> None:
        self._signal = number

    def reason(self) -> str | None:
        """Why to stop, the same on all ranks, or None. Collective.

        Raises:
            ConfigError: on all ranks, when the run's folder is another one now.
        """
        wanted = torch.tensor([self._signal, int(self.engine.is_main and self.file.exists()), 0])
        try:
            self.check_ours()
        except ConfigError:
            wanted[2] = 1
        seen = self.engine.reduce(wanted)
        if seen[2]:
            self.engine.first_rank_decides(self.check_ours)
        if seen[1]:
            return "the file 'stop' in the run folder"
        if seen[0]:
            return "a signal" if not self._signal else signal.Signals(self._signal).name
        return None


def train_loop(
    config: Config,
    engine: Engine,
    batches: Batches,
    balance: Balance,
    state: State,
    stop: Stop,
    on_step: Callable[[dict[str, Any]], None],
    evaluate: Callable[[], Any],
    save: Callable[[], Any],
) -> str | None:
    """Steps until the budget is used; evaluates and saves when due.

    Returns:
        None at the end of the budget, else the reason for stopping before it.

    Raises:
        Diverged: MAX_SKIPPED_IN_A_ROW steps without a finite gradient.
    """
    while state.tokens < config.end_tokens:
        on_step(train_step(config, engine, batches, balance, state))
        if state.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise Diverged(
                f"{state.skipped_in_a_row} steps in a row, up to step {state.step}, had a gradient that is not finite; "
                "the weights are as they were before the first of them. Lower the rate, or look at the data there."
            )
        if (reason := stop.reason()) is not None:
            return reason
        if state.tokens >= config.end_tokens:
            break
        if config.evaluation.every and state.step % config.evaluation.every == 0:
            evaluate()
        if config.checkpoint.every and state.step % config.checkpoint.every == 0:
            save()
    return None


def to_device(batch: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """The same batch on `device`."""
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
