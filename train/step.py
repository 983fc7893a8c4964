"""One optimizer step: its batch, its learning rate, what is minimised, and its line of metrics."""

from __future__ import annotations

import math
import time
from typing import Any, TypeVar

import torch
from torch import Tensor

from powertrain.data.loader import IGNORE_INDEX, Batches
from powertrain.schedulers import Schedule
from powertrain.train import faults, metrics
from powertrain.train.average import Average
from powertrain.train.balance import Balance
from powertrain.train.config import BalanceConfig, Config
from powertrain.train.engine import Engine
from powertrain.train.loss import Outputs
from powertrain.train.state import State

Term = TypeVar("Term", Tensor, float)
Terms = tuple[Term, Term, Term]


def loss_terms(outputs: Outputs, balance: Balance, targets: Tensor, batch_tokens: int) -> Terms[Tensor]:
    """A micro-batch's share of (cross-entropy, balance, z); shares add up to the terms of the global batch.

    Args:
        targets: number of targets in the global batch.
        batch_tokens: number of tokens in it, masked targets included.
    """
    return outputs.cross_entropy / targets, *balance.losses(outputs, batch_tokens)


def total_loss(terms: Terms[Term], config: BalanceConfig) -> Term:
    """What is minimised: cross-entropy + c · balance + c_z · z. The last two are 0 for a dense model."""
    lm_loss, balance_loss, z_loss = terms
    return lm_loss + config.router_aux_loss_coef * balance_loss + config.router_z_loss_coef * z_loss


def train_step(
    config: Config,
    engine: Engine,
    schedule: Schedule,
    batches: Batches,
    balance: Balance,
    state: State,
    average: Average | None = None,
) -> dict[str, Any]:
    """Take one optimizer step, advance `state`, and update the running average if there is one. Collective.

    Returns:
        The step's line of metrics.jsonl.
    """
    start = time.perf_counter()
    step = state.step + 1
    faults.at("step", engine.rank, step)
    length, micro = config.data.sequence_length, config.batch.micro_sequences
    sequences = config.sequences_at(state.tokens)
    beta = config.beta(sequences)
    lr = schedule(tokens=state.tokens, batch=beta)

    # ---- this rank's share of the step's sequences: a contiguous one
    share = sequences // engine.world_size
    batch = to_device(batches.batch(state.samples + engine.rank * share, share), engine.device)
    data_seconds = time.perf_counter() - start
    after = state.tokens + sequences * length
    # Not on a CPU, whose threads wait for each other when a reader takes a core from one.
    if engine.device.type != "cpu" and after < config.end_tokens:
        upcoming = config.sequences_at(after) // engine.world_size
        batches.prefetch(state.samples + sequences + engine.rank * upcoming, upcoming)
    batch_tokens = sequences * length
    targets = engine.reduce((batch["labels"] != IGNORE_INDEX).sum()).clamp(min=1)

    # ---- forward and backward; each micro-batch adds its part of the global mean
    sums = torch.zeros(3, dtype=torch.float64, device=engine.device)
    for first in range(0, share, micro):
        last = first + micro >= share
        outputs = engine.forward({name: part[first : first + micro] for name, part in batch.items()}, last)
        terms = loss_terms(outputs, balance, targets, batch_tokens)
        engine.backward(faults.spoiled(total_loss(terms, config.balance), engine.rank, step))
        sums += torch.stack(terms).detach().double()

    grad_norm, skipped = engine.step(lr)
    assignments = balance.end_step(skipped).cpu()
    lm_loss, balance_loss, z_loss = engine.reduce(sums).cpu().tolist()

    record = {
        "step": step,
        "tokens": state.tokens,  # n, before this step: the schedule's argument
        "samples": state.samples,  # the step trains on sequences [samples, samples + its batch)
        "loss": total_loss((lm_loss, balance_loss, z_loss), config.balance),
        "lm_loss": lm_loss,
        "balance_loss": balance_loss,
        "z_loss": z_loss,
        "lr": lr,
        "lr_per_group": {group: lr * multiplier for group, multiplier in engine.lr_multipliers.items()},
        "batch": beta,
        "gamma": lr / beta,
        "at_cap": schedule.at_cap(state.tokens, beta),
        "phase": schedule.phase(state.tokens),
        "grad_norm": grad_norm,
        "skipped": skipped,
    }
    power = schedule.power
    if power is not None and power.batch_exponent > 0:  # else no batch reaches the cap by being larger
        record["critical_batch"] = power.critical_batch(state.tokens)
    if balance.num_experts:
        record["expert_load"] = metrics.expert_load(assignments)
        record["expert_load"]["collapsed"] = metrics.collapsed_layers(assignments, config.model.num_experts_per_tok)
    state.advance(sequences, length, skipped)
    if average is not None:
        average.update(batch_tokens, config.trained(state.tokens))
    seconds = time.perf_counter() - start
    record["tokens_per_second"] = batch_tokens / seconds
    record["data_seconds"] = data_seconds  # of which the first rank waited for its batch
    for name, value in record.items():
        if isinstance(value, float) and not math.isfinite(value):
            record[name] = None  # `skipped` says what happened
    return record


def to_device(batch: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """The same batch on `device`."""
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
