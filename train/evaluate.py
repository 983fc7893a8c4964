"""Validation: loss of fixed windows of every corpus, in nats a token and bits a byte, beside a unigram model."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from data.loader import IGNORE_INDEX, window
from data.tokens import TokenFile
from train import faults
from train.config import Config
from train.engine import Engine
from train.loop import to_device
from train.state import State


class Validation:
    """The windows that are evaluated, evenly spread over each validation file and always the same."""

    def __init__(self, config: Config, files: dict[str, TokenFile], tokenizer: Any) -> None:
        self.config = config
        self.corpora: dict[str, dict[str, torch.Tensor]] = {}
        self.bytes: dict[str, int] = {}
        length = config.data.sequence_length
        for name, file in sorted(files.items()):
            total = (file.num_tokens - 1) // length
            if total < 1:
                continue  # less text than one window: nothing to measure on
            chosen = np.unique(np.linspace(0, total - 1, min(total, config.evaluation.sequences)).round().astype(int))
            windows = [window(file, int(index), length) for index in chosen]
            batch = [torch.from_numpy(np.stack(part)) for part in zip(*windows, strict=True)]
            self.corpora[name] = dict(zip(("input_ids", "labels", "position_ids"), batch, strict=True))
            # The bytes that the targets stand for: a loss in nats a token means nothing across tokenizers.
            labels = [w[1][w[1] != IGNORE_INDEX] for w in windows]
            self.bytes[name] = sum(
                len(text.encode()) for text in tokenizer.batch_decode(labels, skip_special_tokens=True)
            )

    def evaluate(self, engine: Engine, state: State) -> list[dict[str, Any]]:
        """Lines for evals.jsonl: each corpus, then `overall`. Collective; touches nothing that is trained."""
        engine.module.eval()
        faults.at("evaluate", engine.rank, state.step)
        lines, sums = [], np.zeros(3)
        for name, batch in self.corpora.items():
            nats, targets = self._sum(engine, batch)
            lines.append(_line(state, name, nats, targets, self.bytes[name]))
            sums += (nats, targets, self.bytes[name])
        if lines:
            lines.append(_line(state, "overall", *sums))
        engine.module.train()
        return lines

    @torch.no_grad()
    def _sum(self, engine: Engine, batch: dict[str, torch.Tensor]) -> tuple[float, int]:
        sums = torch.zeros(2, dtype=torch.float64)
        micro = self.config.batch.micro_sequences
        count = len(batch["labels"])
        for round_starts in range(0, count, engine.world_size * micro):
            first = round_starts + engine.rank * micro
            begin = first if first < count else 0  # nothing left: sharded ranks run forward together all the same
            part = to_device({k: v[begin : begin + micro] for k, v in batch.items()}, engine.device)
            outputs = engine.module(**part)
            if first < count:
                sums += torch.stack([outputs.cross_entropy.double(), outputs.targets.double()]).cpu()
        nats, targets = engine.reduce(sums).tolist()
        return nats, int(targets)

    def unigram(self, train: dict[str, TokenFile]) -> dict[str, float]:
        """What token frequencies alone reach on the same targets: loss (nats) and bits a byte, add-one smoothed."""
        counts = np.ones(self.config.model.vocab_size)
        for name, file in train.items():
            if name in self.corpora:
                # 50M tokens are enough for frequencies, and cost a second.
                sample = np.asarray(file.tokens[:50_000_000])
                counts += np.bincount(sample, minlength=len(counts))[: len(counts)]
        log_probability = np.log(counts / counts.sum())
        labels = np.concatenate([b["labels"].numpy().ravel() for b in self.corpora.values()])
        labels = labels[labels != IGNORE_INDEX]
        nats = -log_probability[labels].sum()
        return {
            "loss": float(nats / len(labels)),
            "bits_per_byte": float(nats / math.log(2) / max(1, sum(self.bytes.values()))),
        }


def _line(state: State, corpus: str, nats: float, targets: float, text_bytes: float) -> dict[str, Any]:
    return {
        "step": state.step,
        "tokens": state.tokens,
        "corpus": corpus,
        "loss": nats / max(1, targets),
        "bits_per_byte": nats / math.log(2) / max(1, text_bytes),
        "targets": int(targets),
    }
