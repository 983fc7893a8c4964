"""Windows of a token file, and batches of them in the order of training."""

from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from powertrain.data import DataError
from powertrain.data.order import Order
from powertrain.data.tokens import TokenFile

if TYPE_CHECKING:
    import torch

IGNORE_INDEX = -100  # the label that torch's cross-entropy leaves out


def windows_in(num_tokens: int, sequence_length: int) -> int:
    """How many windows of sequence_length + 1 tokens with stride sequence_length fit, 0 or more."""
    return max(0, num_tokens - 1) // sequence_length


def num_windows(num_tokens: int, sequence_length: int, name: str = "The corpus") -> int:
    """As `windows_in`; none is a DataError."""
    count = windows_in(num_tokens, sequence_length)
    if count < 1:
        raise DataError(
            f"{name} has {num_tokens} tokens; one window takes sequence_length + 1 = {sequence_length + 1}. "
            "Give it more text, or train with a shorter sequence_length."
        )
    return count


def window(
    file: TokenFile, index: int, sequence_length: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """(input_ids, labels, position_ids) of a window, each (S,) int64 with S = sequence_length.

    labels[t] is the token after input_ids[t], or -100 where that belongs to another document; the last token of a
    document, its end-of-text, is a target. Positions restart at 0 at each document and at the window's start.
    Documents are taken from the index, not from an end-of-text id, so files of other tools work as they are.
    """
    begin = index * sequence_length
    tokens = file.tokens[begin : begin + sequence_length + 1].astype(np.int64)
    starts = file.starts_between(begin + 1, begin + sequence_length + 1) - begin  # 1 … S
    labels = tokens[1:].copy()
    labels[starts - 1] = IGNORE_INDEX
    positions = np.arange(sequence_length)
    first = np.zeros(sequence_length, dtype=np.int64)  # where the token's document begins in the window
    starts = starts[starts < sequence_length]
    first[starts] = starts
    return tokens[:-1], labels, positions - np.maximum.accumulate(first)


class Batches:
    """Batches of windows. `files`: corpus → token file, for every corpus of `order`."""

    def __init__(self, files: dict[str, TokenFile], order: Order, sequence_length: int) -> None:
        for name, count in order.windows.items():
            assert count == num_windows(files[name].num_tokens, sequence_length, name), f"windows of {name}"
        self.files, self.order, self.sequence_length = files, order, sequence_length
        self._reader = ThreadPoolExecutor(1, "batches")
        self._ahead: tuple[tuple[int, int], Future[dict[str, torch.Tensor]]] | None = None

    def batch(self, first_sample: int, count: int) -> "dict[str, torch.Tensor]":
        """Samples first_sample … first_sample + count - 1: input_ids, labels, position_ids, each (count, S) int64."""
        if self._ahead is not None and self._ahead[0] == (first_sample, count):
            return self._ahead[1].result()
        return self._read(first_sample, count)

    def prefetch(self, first_sample: int, count: int) -> None:
        """Read a batch in the background, which `batch` will be asked for: a disk may be slow where the step is not."""
        self._ahead = (first_sample, count), self._reader.submit(self._read, first_sample, count)

    def _read(self, first_sample: int, count: int) -> "dict[str, torch.Tensor]":
        import torch

        samples = map(self.order.sample, range(first_sample, first_sample + count))
        windows = [window(self.files[corpus], index, self.sequence_length) for corpus, index in samples]
        return {
            name: torch.from_numpy(np.stack(rows))
            for name, rows in zip(("input_ids", "labels", "position_ids"), zip(*windows, strict=True), strict=True)
        }
