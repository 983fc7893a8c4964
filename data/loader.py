"""The sequences of a token file, and batches of them in the order of training.

Sequence i of a file, `sequence(file, i, S)`, has the S = sequence_length tokens from i·S on and one more as the last
target: consecutive sequences share one token.
"""

from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from powertrain.data import DataError
from powertrain.data.order import Order
from powertrain.data.tokens import TokenFile

if TYPE_CHECKING:
    import torch

IGNORE_INDEX = -100  # the label that torch's cross-entropy ignores


def sequences_in(num_tokens: int, sequence_length: int) -> int:
    """How many sequences so many tokens make: windows of sequence_length + 1 tokens with stride sequence_length."""
    return max(0, num_tokens - 1) // sequence_length


def num_sequences(num_tokens: int, sequence_length: int, name: str = "The corpus") -> int:
    """`sequences_in`, at least 1.

    Raises:
        DataError: there are too few tokens for one sequence.
    """
    count = sequences_in(num_tokens, sequence_length)
    if count < 1:
        raise DataError(
            f"{name} has {num_tokens} tokens; one sequence takes sequence_length + 1 = {sequence_length + 1}. "
            "Give it more text, or train with a shorter sequence_length."
        )
    return count


def sequence(
    file: TokenFile, index: int, sequence_length: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """(input_ids, labels, position_ids) of a sequence, each (S,) int64 with S = sequence_length.

    labels[t] is the token after input_ids[t], or -100 where that belongs to another document; the last token of a
    document, its end-of-text, is a target. Positions restart at 0 at each document and at the start of the sequence.
    Documents come from the index, not from an end-of-text id, so files of other tools work as they are.
    """
    begin = index * sequence_length
    tokens = file.tokens[begin : begin + sequence_length + 1].astype(np.int64)
    starts = file.starts_between(begin + 1, begin + sequence_length + 1) - begin  # 1 … S
    labels = tokens[1:].copy()
    labels[starts - 1] = IGNORE_INDEX
    positions = np.arange(sequence_length)
    first = np.zeros(sequence_length, dtype=np.int64)  # where the token's document begins in the sequence
    starts = starts[starts < sequence_length]
    first[starts] = starts
    return tokens[:-1], labels, positions - np.maximum.accumulate(first)


class Batches:
    """Batches of sequences. `files`: corpus → token file, for every corpus of `order`."""

    def __init__(self, files: dict[str, TokenFile], order: Order, sequence_length: int) -> None:
        for name, count in order.sequences.items():
            assert count == num_sequences(files[name].num_tokens, sequence_length, name), f"sequences of {name}"
        self.files, self.order, self.sequence_length = files, order, sequence_length
        self._reader = ThreadPoolExecutor(1, "batches")
        self._ahead: tuple[tuple[int, int], Future[dict[str, torch.Tensor]]] | None = None

    def batch(self, first: int, count: int) -> "dict[str, torch.Tensor]":
        """Sequences number first … first + count - 1 of training: input_ids, labels and position_ids,
        each (count, S) int64."""
        if self._ahead is not None and self._ahead[0] == (first, count):
            return self._ahead[1].result()
        return self._read(first, count)

    def prefetch(self, first: int, count: int) -> None:
        """Read a batch in the background, before `batch` is asked for it: a disk may be slower than a step."""
        self._ahead = (first, count), self._reader.submit(self._read, first, count)

    def _read(self, first: int, count: int) -> "dict[str, torch.Tensor]":
        import torch

        places = map(self.order.sequence, range(first, first + count))
        sequences = [sequence(self.files[corpus], index, self.sequence_length) for corpus, index in places]
        return {
            name: torch.from_numpy(np.stack(rows))
            for name, rows in zip(("input_ids", "labels", "position_ids"), zip(*sequences, strict=True), strict=True)
        }
