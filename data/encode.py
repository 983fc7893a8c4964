"""Blocks of a corpus to tokens, in this process or in several."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from array import array
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from typing import Any

import numpy as np
import numpy.typing as npt

from powertrain.data.sources import Block, Corpus, Document, Place, blocks, files, read, split_documents
from powertrain.data.tokenizer import PIECE, as_text, bytes_by_offsets, bytes_of_tokens, pieces

AHEAD = 1 << 26  # bytes of blocks queued for the worker processes at most
BATCH = 1 << 22  # characters encoded in one call: the tokenizer needs about a hundred bytes of memory for each


def _batches(stream: Iterator[Document], limit: int) -> Iterator[list[tuple[str, Document, bool]]]:
    """Lists of at least `limit` characters in pieces, each with its document and whether it is the document's last."""
    batch: list[tuple[str, Document, bool]] = []
    held = left = 0
    for document in stream:
        left = len(document.text)
        for piece in pieces(document.text):
            left -= len(piece)
            batch.append((piece, document, left == 0))
            held += len(piece)
            if held >= limit:
                yield batch
                batch, held = [], 0
    if batch:
        yield batch


@dataclass
class Encoded:
    """A block's documents. tokens: of all of them (tokens,). For each document (documents,): lengths in tokens, sizes
    in bytes, validation, and, to deduplicate, hashes and identifiers. lowest: the smallest hash, for the error that
    proposes a fraction. skipped: (kind, identifier). token_bytes: bytes of text of each token (tokens,), 0 in training
    documents; None where `bytes_of_tokens` tells them."""

    tokens: npt.NDArray[Any]
    lengths: npt.NDArray[np.int32]
    sizes: npt.NDArray[np.int64]
    validation: npt.NDArray[np.bool_]
    lowest: float
    skipped: list[tuple[str, str]]
    token_bytes: npt.NDArray[np.int32] | None
    hashes: list[bytes] = field(default_factory=list)
    identifiers: list[str] = field(default_factory=list)


class Encoder:
    """Blocks to tokens, at most `batch` characters in one call of the tokenizer."""

    def __init__(self, tokenizer_json: str, eos: int, dtype: np.dtype[Any], batch: int) -> None:
        self._tokenizer, self._eos, self._dtype, self._batch = as_text(tokenizer_json), eos, dtype, batch
        self._by_offsets = bytes_of_tokens(tokenizer_json) is None

    def __call__(self, corpus: Corpus, block: Block, validation: bool) -> Encoded:
        skipped: list[tuple[str, str]] = []
        stream = read(corpus, block, lambda kind, identifier: skipped.append((kind, identifier)))
        ids, ends, encoded = array("i"), array("q", [0]), []
        token_bytes, rest = array("i"), 0  # rest: bytes of the document after its last token so far
        for batch in _batches(split_documents(corpus, stream, validation), self._batch):
            encodings = self._tokenizer.encode_batch_fast([piece for piece, *_ in batch], add_special_tokens=False)
            held = [piece for piece, document, _ in batch if self._by_offsets and document.split == "validation"]
            with_offsets = iter(self._tokenizer.encode_batch(held, add_special_tokens=False))
            for (piece, document, last), encoding in zip(batch, encodings, strict=True):
                ids.extend(encoding.ids)
                if self._by_offsets:
                    counts = [0] * len(encoding.ids)
                    if document.split == "validation":
                        counts, rest = bytes_by_offsets(piece, next(with_offsets).offsets, rest)
                    token_bytes.extend(counts)
                if last:
                    ids.append(self._eos)
                    ends.append(len(ids))
                    token_bytes.append(rest)
                    rest = 0
                    # Without the text, so that memory holds one batch and not the block.
                    encoded.append((document.size, document.split, document.hash, document.digest, document.identifier))
        sizes, splits, values, digests, identifiers = zip(*encoded, strict=True) if encoded else ((),) * 5
        return Encoded(
            np.frombuffer(ids, np.int32).astype(self._dtype) if ids else np.empty(0, self._dtype),
            np.diff(np.frombuffer(ends, np.int64)).astype("<i4"),
            np.array(sizes, np.int64),
            np.array(splits) == "validation" if encoded else np.empty(0, bool),
            min(values, default=1.0),
            skipped,
            np.array(token_bytes, "<i4") if self._by_offsets else None,
            *((list(digests), list(identifiers)) if corpus.deduplicate else ()),
        )


def encode_blocks(
    corpus: Corpus, start: tuple[int, Place], tokenizer: tuple[str, int, np.dtype[Any]], workers: int
) -> Generator[tuple[Encoded, tuple[int, Place], int | None], None, None]:
    """Encoded blocks from `start` on, in order, each with its end and the bytes of files read so far. `workers`
    processes encode them; with 0, this one does."""

    def work() -> Iterator[tuple[tuple[Corpus, Block, bool], tuple[int, Place], int | None]]:
        before = 0
        for number, part in enumerate(corpus.parts()):
            if number >= start[0]:
                for block in blocks(part, start[1] if number == start[0] else Place()):
                    done = None if block.done is None else before + block.done
                    yield (part, block, number > 0), (number, block.end), done
            before += sum(map(os.path.getsize, files(part)))

    if not workers:
        encode = Encoder(*tokenizer, BATCH)
        for arguments, place, done in work():
            yield encode(*arguments), place, done
        return
    ahead: deque[tuple[Future[Encoded], tuple[int, Place], int | None, int]] = deque()
    # Spawned: a fork copies the locks that other threads hold, but not the threads.
    pool = ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), initializer=_start_worker, initargs=(*tokenizer, PIECE)
    )
    try:
        for arguments, place, done in work():
            content = arguments[1].content
            size = len(content) if isinstance(content, bytes) else 0
            ahead.append((pool.submit(_encode_here, *arguments), place, done, size))
            del arguments, content
            while len(ahead) > 2 * workers or (len(ahead) > 1 and sum(each[-1] for each in ahead) > AHEAD):
                future, place, done, _ = ahead.popleft()
                yield future.result(), place, done
        for future, place, done, _ in ahead:
            yield future.result(), place, done
    except BrokenProcessPool as error:
        raise ChildProcessError(
            f"One of the {workers} processes that tokenise was killed, most likely out of memory. Lower data.workers, "
            "which needs less; the same command resumes."
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


_encoder: Encoder  # of a worker process; `_start_worker` sets it


def _start_worker(*arguments: Any) -> None:
    global _encoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which stops the workers
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # each core has a worker process already
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _encoder = Encoder(*arguments)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def _encode_here(corpus: Corpus, block: Block, validation: bool) -> Encoded:
    return _encoder(corpus, block, validation)
