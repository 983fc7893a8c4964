"""Megatron-LM's indexed token files: PREFIX.bin holds the tokens, PREFIX.idx where documents begin.

The index, little-endian throughout: the magic, the version (uint64), the code of the token dtype (uint8), the
number of sequences n (uint64), the number of document indices d (uint64), n lengths in tokens (int32), n positions
in bytes (int64), and d sequence numbers (int64) where a document starts, the last one being n. A sequence here is
Megatron's, a part of a document; elsewhere a sequence is what one row of a batch holds.
"""

import hashlib
import os
import struct
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from powertrain.data import DataError

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<QBQQ")  # follows the magic: version, dtype code, sequences, document indices
DTYPES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 6: "float64", 7: "float32", 8: "uint16"}

BLOCK = 1 << 20  # bytes
SAMPLED_BLOCKS = 256
SCAN = 1 << 22  # elements that `check` reads at once


def dtype_for(vocab_size: int) -> np.dtype[Any]:
    """The dtype that Megatron uses for a vocabulary: uint16 below 65,500 tokens, else int32."""
    return np.dtype(np.uint16 if vocab_size < 65500 else np.int32)


class TokenWriter:
    """Writes PREFIX.bin and PREFIX.idx; a context manager.

    Both are written under temporary names and renamed when the block ends without an error, so that a file that exists
    is complete. Existing files are replaced.
    """

    def __init__(self, prefix: str | Path, dtype: npt.DTypeLike) -> None:
        self.prefix = str(prefix)
        self.dtype = np.dtype(dtype).newbyteorder("<")
        self._lengths = array("i")  # 4 bytes a document

    def __enter__(self) -> "TokenWriter":
        self._bin = open(f"{self.prefix}.bin.partial", "wb")
        return self

    def add(self, tokens: npt.ArrayLike) -> None:
        """Append one document of any number of tokens, or none.

        Raises:
            DataError: an id does not fit the dtype.
        """
        ids = np.asarray(tokens, dtype=np.int64)
        if ids.size and not np.iinfo(self.dtype).min <= ids.min() <= ids.max() <= np.iinfo(self.dtype).max:
            raise DataError(
                f"{self.prefix}.bin, document {len(self._lengths)}: token ids from {ids.min()} to {ids.max()} do not "
                f"fit {self.dtype.name}. Write the file with dtype_for(vocab_size)."
            )
        self._bin.write(ids.astype(self.dtype).tobytes())
        self._lengths.append(ids.size)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        partial = {suffix: Path(f"{self.prefix}.{suffix}.partial") for suffix in ("bin", "idx")}
        try:
            if kind is None:
                _sync_and_close(self._bin)
                write_index(partial["idx"], self.dtype, np.array(self._lengths, dtype="<i4"))
                # A new .bin must never lie beside an old .idx; without an index a token file does not open.
                Path(f"{self.prefix}.idx").unlink(missing_ok=True)
                for suffix, path in partial.items():
                    path.replace(f"{self.prefix}.{suffix}")
        finally:
            self._bin.close()
            for path in partial.values():
                path.unlink(missing_ok=True)


def write_index(path: str | Path, dtype: np.dtype[Any], lengths: npt.NDArray[np.int32]) -> None:
    """Write the index of a file of contiguous documents, one sequence each: `lengths` (documents,) in tokens."""
    code = {name: code for code, name in DTYPES.items()}[dtype.name]
    ends = np.cumsum(lengths, dtype="<i8") * dtype.itemsize
    with open(path, "wb") as file:
        file.write(MAGIC + HEADER.pack(VERSION, code, len(lengths), len(lengths) + 1))
        file.write(lengths.astype("<i4").tobytes())
        file.write(np.concatenate([np.zeros(1, "<i8"), ends])[: len(lengths)].tobytes())
        file.write(np.arange(len(lengths) + 1, dtype="<i8").tobytes())
        _sync_and_close(file)


def _sync_and_close(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())
    file.close()


class TokenFile:
    """A token file, memory-mapped read-only: opening costs the same for any size. Can be pickled.

    `tokens`: every token in file order, a flat array (num_tokens,) of the file's dtype. `check` tests what takes a scan
    of the whole file.

    Raises:
        DataError: a file is missing, truncated, or of another version or kind, or the two files disagree.
    """

    def __init__(self, prefix: str | Path) -> None:
        self.prefix = str(prefix)
        index_path, tokens_path = f"{self.prefix}.idx", f"{self.prefix}.bin"
        for path in (index_path, tokens_path):
            if not os.path.isfile(path):
                raise DataError(
                    f"{path} does not exist. A token file is a pair PREFIX.bin and PREFIX.idx; give PREFIX."
                )

        start = len(MAGIC) + HEADER.size
        with open(index_path, "rb") as file:
            head = file.read(start)
        if len(head) < start or not head.startswith(MAGIC):
            raise DataError(
                f"{index_path} is not an index of a Megatron token file: it does not start with {MAGIC!r}. "
                "Prepare the corpus again."
            )
        version, code, sequences, indices = HEADER.unpack(head[len(MAGIC) :])
        if version != VERSION:
            raise DataError(
                f"{index_path} has version {version}; only version {VERSION} can be read. Prepare the corpus again."
            )
        if np.dtype(DTYPES.get(code, "float32")).kind not in "iu":
            raise DataError(
                f"{index_path}: dtype code {code} ({DTYPES.get(code, 'unknown')}) is not an integer type; tokens are "
                "integers. Prepare the corpus again."
            )
        self._dtype = np.dtype(DTYPES[code]).newbyteorder("<")

        expected, size = start + 12 * sequences + 8 * indices, os.path.getsize(index_path)
        if size == expected + sequences and sequences:
            raise DataError(
                f"{index_path} holds a mode for each sequence: its corpus is multimodal. Only text can be trained on."
            )
        if size != expected:
            raise DataError(
                f"{index_path} has {size} bytes; its {sequences} sequences and {indices} document indices take "
                f"{expected}. The file is damaged: copy it or prepare the corpus again."
            )
        index = _map(index_path)
        self._lengths = index[start : start + 4 * sequences].view("<i4")
        self._pointers = index[start + 4 * sequences : start + 12 * sequences].view("<i8")  # bytes
        self._documents = index[start + 12 * sequences :].view("<i8")  # sequence numbers
        if indices == 0 or self._documents[0] != 0 or self._documents[-1] != sequences:
            raise DataError(
                f"{index_path}: the document indices must run from 0 to the number of sequences, {sequences}. "
                "Prepare the corpus again."
            )

        held = os.path.getsize(tokens_path)
        needed = int(self._pointers[-1]) + int(self._lengths[-1]) * self._dtype.itemsize if sequences else 0
        if held != needed:
            raise DataError(
                f"{tokens_path} has {held} bytes; its index describes {needed}. One of the two files is truncated or "
                "belongs to another corpus: copy both or prepare the corpus again."
            )
        self.tokens: npt.NDArray[Any] = _map(tokens_path).view(self._dtype)

    def __reduce__(self) -> tuple[type["TokenFile"], tuple[str]]:
        return TokenFile, (self.prefix,)

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    @property
    def num_documents(self) -> int:
        return len(self._documents) - 1

    @property
    def document_starts(self) -> npt.NDArray[np.int64]:
        """Offset in tokens of each document, (num_documents,); computed at each call, 8 bytes a document."""
        return self._starts(0, self.num_documents)

    def starts_between(self, begin: int, end: int) -> npt.NDArray[np.int64]:
        """The offsets in tokens, ascending, of the documents that start in [begin, end); reads only these."""
        numbers = range(self.num_documents)
        # Not np.searchsorted: it would copy the mapped arrays, which are unaligned.
        first = bisect_left(numbers, begin, key=self._start)
        return self._starts(first, bisect_left(numbers, end, lo=first, key=self._start))

    def _start(self, document: int) -> int:
        sequence = self._documents[document]
        if sequence == len(self._pointers):  # documents without any sequence, at the end of the file
            return self.num_tokens
        return int(self._pointers[sequence]) // self._dtype.itemsize

    def _starts(self, first: int, last: int) -> npt.NDArray[np.int64]:
        sequences = self._documents[first:last]
        starts = np.full(len(sequences), self.num_tokens, dtype=np.int64)
        inside = sequences < len(self._pointers)
        starts[inside] = self._pointers[sequences[inside]] // self._dtype.itemsize
        return starts

    def fingerprint(self, progress: Callable[[int, int], None] = lambda done, total: None) -> str:
        """SHA-256 (hex) of the sizes and all bytes of both files; `progress(bytes done, total bytes)`."""
        return self._digest(False, progress)

    def sampled_fingerprint(self) -> str:
        """The fingerprint of earlier versions, which checkpoints and prepared corpora still have: of a file above
        256 MiB it covers only 256 evenly spaced blocks of 1 MiB."""
        return self._digest(True, lambda done, total: None)

    def _digest(self, sampled: bool, progress: Callable[[int, int], None]) -> str:
        digest, done, count = hashlib.sha256(), 0, 0
        sizes = {path: os.path.getsize(path) for path in (f"{self.prefix}.idx", f"{self.prefix}.bin")}
        for path, size in sizes.items():
            digest.update(struct.pack("<Q", size))
            offsets: Iterable[int] = range(0, size, BLOCK)
            if sampled and size > SAMPLED_BLOCKS * BLOCK:
                offsets = (i * (size - BLOCK) // (SAMPLED_BLOCKS - 1) for i in range(SAMPLED_BLOCKS))
            with open(path, "rb") as file:
                for offset in offsets:
                    file.seek(offset)
                    digest.update(block := file.read(BLOCK))
                    done, count = done + len(block), count + 1
                    if count % 64 == 0:
                        progress(done, sum(sizes.values()))
        return digest.hexdigest()

    def check(self, vocab_size: int) -> None:
        """Check both files to their ends, piece by piece; takes about as long as reading them from disk.

        Raises:
            DataError: a token id outside range(vocab_size), sequences with gaps, or documents out of order.
        """
        for begin in range(0, len(self._pointers), SCAN):
            pointers = self._pointers[begin : begin + SCAN + 1]
            lengths = self._lengths[begin : begin + SCAN]
            ends = pointers[: len(lengths)] + lengths.astype(np.int64) * self._dtype.itemsize
            wrong = (lengths < 0) | (ends != np.append(pointers[1:], ends[-1:])[: len(ends)])
            wrong[0] |= begin == 0 and pointers[0] != 0
            if wrong.any():
                raise DataError(
                    f"{self.prefix}.idx: sequence {begin + int(wrong.argmax())} is not followed directly by the next. "
                    "Only files whose sequences are contiguous can be trained on: prepare the corpus again, or merge "
                    "the file with Megatron's own tools."
                )
        for begin in range(0, self.num_documents, SCAN):
            if (np.diff(self._documents[begin : begin + SCAN + 1]) < 0).any():
                raise DataError(f"{self.prefix}.idx: documents are not in order. Prepare the corpus again.")
        for begin in range(0, self.num_tokens, SCAN):
            tokens = self.tokens[begin : begin + SCAN]
            if tokens.min() < 0 or tokens.max() >= vocab_size:
                at = begin + int(((tokens < 0) | (tokens >= vocab_size)).argmax())
                document = bisect_right(range(self.num_documents), at, key=self._start) - 1
                raise DataError(
                    f"{self.prefix}.bin, document {document}: token id {self.tokens[at]} is outside the vocabulary of "
                    f"{vocab_size}. Train with the tokenizer that the corpus was prepared with, or with a vocabulary "
                    "at least as large."
                )


def _map(path: str) -> npt.NDArray[np.uint8]:
    """The file's bytes; a plain array, because indexing a np.memmap is several times slower."""
    return np.asarray(np.memmap(path, np.uint8, mode="r")) if os.path.getsize(path) else np.empty(0, np.uint8)
