"""Validation: loss of fixed sequences of every corpus, in nats a token and bits a byte, beside a unigram model."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from powertrain.data.loader import IGNORE_INDEX, sequence, sequences_in
from powertrain.data.prepare import Prepared
from powertrain.data.tokenizer import bytes_of_tokens
from powertrain.data.tokens import TokenFile
from powertrain.train import faults
from powertrain.train.config import Config
from powertrain.train.engine import Engine
from powertrain.train.state import State
from powertrain.train.step import to_device


class Validation:
    """The sequences that are evaluated, evenly spread over each validation file and always the same.

    Attributes:
        corpora: their tensors, each (N, S), by corpus.
        bytes: of text that a corpus's targets stand for; None where that is not known.
        problems: by corpus, why it is not evaluated or has no bits per byte.
    """

    def __init__(self, config: Config, prepared: Prepared, tokenizer: Any) -> None:
        self.config = config
        self.corpora: dict[str, dict[str, torch.Tensor]] = {}
        self.bytes: dict[str, int | None] = {}
        self.problems: dict[str, str] = {}
        length = config.data.sequence_length
        by_token = bytes_of_tokens(tokenizer.backend_tokenizer.to_str())
        for name in sorted(config.data.corpora):
            if (file := prepared.validation.get(name)) is None:
                self.problems[name] = "no validation split"
                continue
            total = sequences_in(file.num_tokens, length)
            if total < 1:
                self.problems[name] = (
                    f"its validation split has {file.num_tokens:,} tokens, and a sequence takes {length + 1:,} "
                    "(data.sequence_length and one): give it more, or a shorter sequence_length"
                )
                continue
            chosen = np.unique(np.linspace(0, total - 1, min(total, config.evaluation.sequences)).round().astype(int))
            rows = [sequence(file, int(index), length) for index in chosen]
            batch = [torch.from_numpy(np.stack(part)) for part in zip(*rows, strict=True)]
            self.corpora[name] = dict(zip(("input_ids", "labels", "position_ids"), batch, strict=True))
            # The bytes that the targets stand for: a loss in nats a token means nothing across tokenizers.
            labels = np.stack([row[1] for row in rows])
            targets = labels != IGNORE_INDEX
            counted = prepared.token_bytes.get(name)
            if counted is not None:
                places = chosen[:, None] * length + np.arange(1, length + 1)
                self.bytes[name] = int(counted[places][targets].sum())
            elif by_token is not None:
                # Ids beyond the tokenizer's, as a foreign token file may have them, stand for none.
                sizes = np.zeros(config.model.vocab_size, np.int64)
                sizes[: len(by_token)] = by_token[: len(sizes)]
                self.bytes[name] = int(sizes[labels[targets]].sum())
            else:
                self.bytes[name] = None
                self.problems[name] = (
                    "no bits per byte: its tokenizer does not keep all of a text, so that tokens do not say how many "
                    "bytes they stand for, and its "
                    + (
                        f"validation split was prepared before they were counted; delete {prepared.folders[name]} to "
                        "have it prepared anew"
                        if name in prepared.folders
                        else "token file does not say, either"
                    )
                )

    def evaluate(self, engine: Engine, state: State) -> list[dict[str, Any]]:
        """Lines for evals.jsonl: each corpus, then `overall`. Collective; touches nothing that is trained."""
        engine.module.eval()
        faults.at("evaluate", engine.rank, state.step)
        lines, all_nats, all_targets = [], 0.0, 0
        for name, batch in self.corpora.items():
            nats, targets = self._sums(engine, batch, self.config.batch.micro_sequences).sum(dim=0).tolist()
            lines.append(_line(state, name, nats, targets, self.bytes[name]))
            all_nats, all_targets = all_nats + nats, all_targets + targets
        if lines:
            lines.append(_line(state, "overall", all_nats, all_targets, self._all_bytes()))
        engine.module.train()
        return lines

    def per_sequence(self, engine: Engine) -> torch.Tensor:
        """(N, 2) float64: nats and targets of every sequence, corpus by corpus. Collective."""
        engine.module.eval()
        sums = [self._sums(engine, batch, 1) for batch in self.corpora.values()]
        engine.module.train()
        return torch.cat([torch.zeros(0, 2, dtype=torch.float64), *sums])

    def _all_bytes(self) -> int | None:
        known = [size for size in self.bytes.values() if size is not None]
        return sum(known) if len(known) == len(self.bytes) else None

    @torch.no_grad()
    def _sums(self, engine: Engine, batch: dict[str, torch.Tensor], micro: int) -> torch.Tensor:
        """(forward passes, 2) nats and targets of `micro` sequences each, of all ranks. Collective."""
        count = len(batch["labels"])
        sums = torch.zeros(-(-count // micro), 2, dtype=torch.float64)
        for round_starts in range(0, count, engine.world_size * micro):
            first = round_starts + engine.rank * micro
            begin = first if first < count else 0  # nothing left: sharded ranks run forward together nevertheless
            part = to_device({k: v[begin : begin + micro] for k, v in batch.items()}, engine.device)
            outputs = engine.module(**part)
            if first < count:
                sums[first // micro] = torch.stack([outputs.cross_entropy.double(), outputs.targets.double()]).cpu()
        return engine.reduce(sums)

    def unigram(self, train: dict[str, TokenFile]) -> dict[str, float | None]:
        """What token frequencies alone reach on the same targets: loss (nats) and bits a byte, add-one smoothed."""
        counts = np.ones(self.config.model.vocab_size)
        for name, file in train.items():
            if name in self.corpora:
                # 50M tokens are enough for frequencies, and cost a second.
                tokens = np.asarray(file.tokens[:50_000_000])
                counts += np.bincount(tokens, minlength=len(counts))[: len(counts)]
        log_probability = np.log(counts / counts.sum())
        labels = np.concatenate([b["labels"].numpy().ravel() for b in self.corpora.values()])
        labels = labels[labels != IGNORE_INDEX]
        nats = -log_probability[labels].sum()
        return {
            "loss": float(nats / len(labels)),
            "bits_per_byte": _bits_per_byte(float(nats), self._all_bytes()),
        }


def _bits_per_byte(nats: float, text_bytes: int | None) -> float | None:
    return None if text_bytes is None else nats / math.log(2) / max(1, text_bytes)


def _line(state: State, corpus: str, nats: float, targets: float, text_bytes: int | None) -> dict[str, Any]:
    return {
        "step": state.step,
        "tokens": state.tokens,
        "corpus": corpus,
        "loss": nats / max(1, targets),
        "bits_per_byte": _bits_per_byte(nats, text_bytes),
        "targets": int(targets),
    }
