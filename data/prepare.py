"""Tokenise corpora once, into a cache shared by all runs with the same text and tokenizer.

CACHE/NAME-HASH/ holds train.bin and .idx, validation.bin and .idx, tokenizer/ and corpus.json, which describes them.
HASH covers what the content depends on: the corpus's description, its files' sizes and times, and the tokenizer. A
folder gets its name when it is complete. Until then it is .NAME-HASH.0: append-only files, and a state that records how
many of their bytes are valid. The next process that prepares the same corpus resumes from that state.
"""

import errno
import fcntl
import glob
import hashlib
import itertools
import json
import multiprocessing
import os
import pickle
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from array import array
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field
from math import ceil
from multiprocessing.connection import wait
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from powertrain.data import DataError, bpe, expand
from powertrain.data.files import lock, replace_text, sync
from powertrain.data.sources import COMPRESSED, LONGEST, Block, Corpus, Place, Skipped, blocks, documents, files, read
from powertrain.data.tokenizer import load_tokenizer, save_tokenizer, wrap_tokenizer
from powertrain.data.tokens import TokenFile, dtype_for, write_index

FORMAT = 1  # goes into HASH: raise it when the same inputs give other files
END_OF_TEXT = "<|endoftext|>"
SAMPLE_BYTES = 64 << 20  # of text that a tokenizer is trained on
AHEAD = 1 << 26  # bytes of blocks queued for the worker processes at most
PIECE = 1 << 18  # characters of one encoded string at most
BATCH = 1 << 22  # characters encoded in one call: the tokenizer needs about a hundred bytes of memory for each
ALONE = 64 << 20  # bytes of files: for fewer, starting worker processes takes longer than it saves
SAVE_SECONDS = 10.0  # of work that a kill may lose
STATE = "state.json"
TOKEN_BYTES = "validation.bytes"
HASH = np.dtype("S16")  # of a text: the probability of a collision among 1e12 documents is 1e-15
LISTED = 100_000  # lines of skipped.jsonl at most
MANY_SKIPPED = 0.01  # share of a corpus's skipped records above which it warns

Progress = Callable[[str, int, int | None], None]


@dataclass
class TokenizerSpec:
    """`path`: a Hugging Face tokenizer, name or folder. None trains a byte-level BPE of `vocab_size` on the training
    documents of all corpora. Adding a corpus then changes the tokenizer: where corpora may be added later, train the
    tokenizer once and give its folder as `path`."""

    path: str | None = None  # a Hugging Face tokenizer, name or folder; default: one is trained
    vocab_size: int = 4096  # of the trained tokenizer


@dataclass(frozen=True)
class Prepared:
    """What `prepare` made or found, by corpus name.

    folders: of the tokenised corpora; each has a corpus.json. tokenizer_folder: loads with AutoTokenizer; None when
    every corpus is a token file and no tokenizer was named. validation: of the corpora with a validation split.
    fingerprints: of the training files, `TokenFile.fingerprint`. token_bytes: the bytes of text of each token of a
    validation file, (tokens,), for tokenizers where `bytes_of_tokens` returns None.
    """

    folders: dict[str, Path]
    tokenizer_folder: Path | None
    train: dict[str, TokenFile]
    validation: dict[str, TokenFile]
    fingerprints: dict[str, str] = field(default_factory=dict)
    token_bytes: dict[str, npt.NDArray[np.int32]] = field(default_factory=dict)


def prepare(
    corpora: Mapping[str, Corpus],
    tokenizer: TokenizerSpec,
    cache_dir: str | Path,
    progress: Progress | None = None,
    workers: int = 1,
) -> Prepared:
    """Tokenise every corpus that is not in the cache yet; each document is followed by the end-of-text token.

    The same inputs give the same bytes, with any number of `workers` and however often the preparation was killed: the
    next call resumes, and at most ten seconds of work are lost. The split of a document follows a hash of its text, so
    equal documents are always on the same side. `progress(description, bytes done, total bytes or None)` is called now
    and then, with bytes of the files, or of the text for a dataset without files. What it raises stops the preparation,
    which can be resumed. Several processes may prepare the same corpus at once; the first to finish wins.

    With two or more `workers`, a corpus of 64 MB or more is tokenised by that many processes. They are spawned, so a
    script that calls this needs `if __name__ == "__main__"`. Otherwise this process tokenises, and the tokenizer uses
    threads unless TOKENIZERS_PARALLELISM is false.

    Raises:
        DataError: a name cannot be a file name, a corpus has no text, one side of a split has no document, a tokenizer
            cannot be loaded or has no end-of-text token, or prepared files have changed.
        ChildProcessError: a process that tokenises, or trains the tokenizer, was killed.
        OSError: the disk is full; what is done is kept.
    """
    _check_names(corpora)
    cache = Path(expand(cache_dir))
    cache.mkdir(parents=True, exist_ok=True)
    report = progress or (lambda description, done, total: None)
    text = {name: corpora[name] for name in sorted(corpora) if corpora[name].source != "tokens"}
    sources = {name: _describe(corpus) for name, corpus in text.items()}

    if tokenizer.path is not None:
        tokenizer_folder: Path | None = _fetch_tokenizer(tokenizer.path, cache)
    elif text:
        tokenizer_folder = _train_tokenizer(text, sources, tokenizer.vocab_size, cache, report)
    else:
        tokenizer_folder = None

    prepared = Prepared({}, tokenizer_folder, {}, {})
    for name, corpus in corpora.items():
        if corpus.source == "tokens":
            prepared.train[name] = TokenFile(expand(str(corpus.path)))
            prepared.fingerprints[name] = fingerprint(prepared.train[name], cache, report)
            if corpus.validation_path:
                prepared.validation[name] = TokenFile(expand(corpus.validation_path))
            continue
        assert tokenizer_folder is not None
        identity = _identity(tokenizer_folder)
        folder = _corpus_folder(cache, name, sources[name], identity)
        if not _complete(folder, "corpus.json"):
            _write_corpus(name, corpus, folder, tokenizer_folder, identity, report, workers)
        prepared.folders[name] = folder
        _open_corpus(name, folder, prepared, cache, report)
    return prepared


def find(corpora: Mapping[str, Corpus], tokenizer: TokenizerSpec, cache_dir: str | Path) -> Prepared:
    """What `prepare` would find in the cache; prepares nothing. Validation files are not looked up.

    Raises:
        DataError: a name cannot be a file name, or a path matches no file.
    """
    _check_names(corpora)
    cache = Path(expand(cache_dir))
    text = {name: corpora[name] for name in sorted(corpora) if corpora[name].source != "tokens"}
    sources = {name: _describe(corpus) for name, corpus in text.items()}
    folder = None
    if tokenizer.path is not None and os.path.isdir(expand(tokenizer.path)):
        folder = _named_tokenizer(tokenizer.path, cache)[1]
    elif tokenizer.path is None and text:
        folder = _trained_folder(sources, tokenizer.vocab_size, cache)
    if folder is not None and not (folder / "tokenizer.json").exists():
        folder = None
    folders, train = {}, {}
    for name, corpus in corpora.items():
        if corpus.source == "tokens":
            train[name] = TokenFile(expand(str(corpus.path)))
        elif folder is not None:
            own = _corpus_folder(cache, name, sources[name], _identity(folder))
            if (own / "corpus.json").exists():
                folders[name] = own
                train[name] = TokenFile(own / "train")
    return Prepared(folders, folder, train, {})


# ---------------------------------------------------------------------------------------------------- one corpus


def _write_corpus(
    name: str, corpus: Corpus, folder: Path, tokenizer_folder: Path, identity: str, report: Progress, workers: int
) -> None:
    tokenizer = load_tokenizer(tokenizer_folder)
    tokenizer_json, eos = tokenizer.backend_tokenizer.to_str(), tokenizer.eos_token_id
    dtype = dtype_for(rows_needed(tokenizer)).newbyteorder("<")
    total = sum(map(os.path.getsize, _all_files(corpus))) if corpus.source != "huggingface" else None
    splits = ["train"] + ["validation"] * bool(corpus.validation_fraction or corpus.validation_path)
    with _building(folder) as temporary:
        by_offsets = bytes_of_tokens(tokenizer_json) is None
        with _Output(temporary, splits, dtype, corpus.deduplicate, by_offsets) as output:
            alone = workers < 2 or (total is not None and total < ALONE)
            encoded = _encoded(corpus, output.place, (tokenizer_json, eos, dtype), 0 if alone else workers)
            report(f"tokenising {name}", output.done, total)
            with closing(encoded):
                for tokens, place, done in encoded:
                    output.add(tokens, place, done)
                    report(f"tokenising {name}", output.done, total)
            report(f"tokenising {name}", output.done if total is None else total, total)
        for split in splits:
            if output.statistics[split]["documents"] == 0:
                raise _no_document(name, corpus, split, output)
        shutil.copytree(tokenizer_folder, temporary / "tokenizer", dirs_exist_ok=True)
        summary = {
            "format": FORMAT,
            "corpus": _settings(corpus),
            "splits": {
                split: {
                    **output.statistics[split],
                    "fingerprint": fingerprint(TokenFile(temporary / split), cache=folder.parent, report=report),
                }
                for split in splits
            },
            "skipped": {
                kind: {"count": count, "first": output.skipped.first[kind]}
                for kind, count in sorted(output.skipped.counts.items())
            },
            "tokenizer": identity,
        }
        (temporary / "corpus.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")


def _open_corpus(name: str, folder: Path, prepared: Prepared, cache: Path, report: Progress) -> None:
    """Add to `prepared` the splits that corpus.json lists, after comparing fingerprints."""
    for split, facts in corpus_facts(folder)["splits"].items():
        opened = TokenFile(folder / split)
        found = fingerprint(opened, cache, report)
        # Folders of earlier versions have the sampled fingerprint.
        changed = found != facts["fingerprint"] != opened.sampled_fingerprint()
        if split == "train":
            prepared.train[name], prepared.fingerprints[name] = opened, found
        else:
            prepared.validation[name] = opened
            if (folder / TOKEN_BYTES).exists():
                prepared.token_bytes[name] = np.memmap(folder / TOKEN_BYTES, "<i4", "r")
                changed = changed or len(prepared.token_bytes[name]) != opened.num_tokens
        if changed:
            raise DataError(
                f"{folder / split}.bin or .idx changed since it was prepared. Delete {folder} to prepare it again."
            )


def corpus_facts(folder: Path) -> dict[str, Any]:
    """The content of a prepared corpus's corpus.json: `splits` and `skipped` among others.

    Raises:
        DataError: it is truncated or was edited.
    """
    try:
        facts: dict[str, Any] = json.loads((folder / "corpus.json").read_text(encoding="utf-8"))
        texts = [*(split["fingerprint"] for split in facts["splits"].values()), facts["corpus"]["source"]]
        numbers = [split[what] for split in facts["splits"].values() for what in ("documents", "tokens", "bytes")]
        numbers += [skipped["count"] for skipped in facts["skipped"].values()]
        lists = [skipped["first"] for skipped in facts["skipped"].values()]
        for values, kind in ((texts, str), (numbers, int), (lists, list)):
            if not all(isinstance(value, kind) for value in values):
                raise ValueError
        if "train" not in facts["splits"]:
            raise ValueError
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{folder / 'corpus.json'} is damaged. Delete {folder} to prepare the corpus again.") from error
    return facts


def skipped_records(name: str, folder: Path) -> tuple[dict[str, int], str, bool]:
    """What the preparation of a corpus skipped: records by kind, a sentence ("" for none), and whether that is a
    warning: more than MANY_SKIPPED (duplicates do not count, the corpus asked for it), or any document too long."""
    facts = corpus_facts(folder)
    counts = {kind: skipped["count"] for kind, skipped in facts["skipped"].items()}
    if not counts:
        return {}, "", False
    lost = sum(counts.values()) - counts.get("duplicate", 0)
    total = sum(counts.values()) + sum(split["documents"] for split in facts["splits"].values())
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in counts.items())
    sentence = (
        f"{name}: {sum(counts.values()):,} of {total:,} records ({sum(counts.values()) / total:.2%}) were skipped: "
        f"{kinds}. {folder / 'skipped.jsonl'} lists them."
    )
    if "missing_field" in counts:
        sentence += f" The field read is '{facts['corpus'].get('field')}'."
    if "too_long" in counts:
        sentence += f" A document may have {LONGEST:,} bytes: split longer ones."
    return counts, sentence, lost > MANY_SKIPPED * total or "too_long" in counts


def fingerprint(file: TokenFile, cache: Path, report: Progress = lambda description, done, total: None) -> str:
    """`file.fingerprint()`, cached because it reads the whole file: other ranks and later starts find it in the cache,
    under the sizes, times and inodes of the two files."""
    path = known_fingerprint(file, cache)
    with open(f"{file.prefix}.idx", "rb") as lock:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(lock, fcntl.LOCK_EX)  # one rank reads the files while the others wait
        with suppress(OSError):
            if len(found := path.read_text(encoding="utf-8")) == 64:
                return found
        found = file.fingerprint(lambda done, total: report(f"reading {file.prefix}", done, total))
        # File times may have a resolution of two seconds: a change right after this one could leave them equal.
        changed = max(os.stat(f"{file.prefix}.{suffix}").st_ctime for suffix in ("idx", "bin"))
        if path == known_fingerprint(file, cache) and time.time() - changed > 2:
            with suppress(OSError):  # a full disk, or a read-only cache
                path.parent.mkdir(exist_ok=True)
                path.write_text(found, encoding="utf-8")
    return found


def known_fingerprint(file: TokenFile, cache: Path) -> Path:
    """Where `fingerprint` caches it: named by the files' sizes, times and inodes."""
    states = [os.stat(f"{file.prefix}.{suffix}") for suffix in ("idx", "bin")]
    return cache / "fingerprints" / _short_hash([[s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino] for s in states])


def _no_document(name: str, corpus: Corpus, split: str, output: "_Output") -> DataError:
    skipped = ", ".join(f"{count} {kind}" for kind, count in sorted(output.skipped.counts.items())) or "none"
    total = sum(facts["documents"] for facts in output.statistics.values())
    message = f"The {split} split of corpus {name!r} has no document, out of {total} (skipped: {skipped}). "
    if "too_long" in output.skipped.counts:
        message += f"A document may have {LONGEST:,} bytes: split longer ones. "
    if total == 0 or corpus.validation_path:
        return DataError(message + "Check its path and, for records, the name of the field that holds the text.")
    message += f"validation_fraction is {corpus.validation_fraction} and the split follows a hash of each text. "
    if total == 1:
        return DataError(message + "Set it to 0, or name other documents as validation_path.")
    if split == "validation":
        return DataError(
            message + f"Raise it to {ceil(output.lowest * 1e4) / 1e4} for one document, or set it to 0 for none."
        )
    return DataError(message + "Lower it.")


class _Output:
    """The append-only files of a corpus being prepared, and the state that records how many of their bytes are valid.

    A context manager. Beside the tokens of each split are its documents' lengths (int32), which become the index, and,
    to deduplicate, the hashes of the documents kept. `place`: where to read next.
    """

    def __init__(
        self, folder: Path, splits: list[str], dtype: np.dtype[Any], deduplicate: bool, by_offsets: bool
    ) -> None:
        self._folder, self._dtype = folder, dtype
        self._paths = {f"{split}.bin": folder / f"{split}.bin" for split in splits}
        self._paths |= {name: folder.parent / name for name in (*(f"{split}.lengths" for split in splits), "hashes")}
        self._paths["skipped.jsonl"] = folder / "skipped.jsonl"
        if by_offsets and "validation" in splits:
            self._paths[TOKEN_BYTES] = folder / TOKEN_BYTES
        self.statistics = {split: {"documents": 0, "tokens": 0, "bytes": 0} for split in splits}
        self.skipped, self.lowest, self.done = Skipped(), 1.0, 0
        self.place: tuple[int, Place] = (0, Place())
        self._kept = _Kept() if deduplicate else None

    def __enter__(self) -> "_Output":
        state = self._saved()
        self._files: dict[str, IO[bytes]] = {}
        for name, path in self._paths.items():
            self._files[name] = open(path, "r+b" if state else "wb")
            self._files[name].truncate(state["sizes"][name] if state else 0)
            self._files[name].seek(0, os.SEEK_END)
        if state:
            self.statistics, self.lowest, self.done = state["statistics"], state["lowest"], state["done"]
            self.skipped = Skipped(Counter(state["skipped"]["counts"]), state["skipped"]["first"])
            self.place = state["place"][0], Place(*state["place"][1])
            if self._kept is not None:
                self._kept.new(np.fromfile(self._paths["hashes"], HASH))
        self._saved_at = time.monotonic()
        return self

    def _saved(self) -> Any:
        """What `_save` wrote, if all the bytes it counts are there."""
        try:
            state = json.loads((self._folder.parent / STATE).read_text(encoding="utf-8"))
            whole = all(os.path.getsize(path) >= state["sizes"][name] for name, path in self._paths.items())
        except (OSError, ValueError, LookupError, TypeError):  # as a power cut can leave it
            return None
        return state if whole else None

    def _save(self) -> None:
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
        state = {
            "place": self.place,
            "sizes": {name: file.tell() for name, file in self._files.items()},
            "statistics": self.statistics,
            "skipped": vars(self.skipped),
            "lowest": self.lowest,
            "done": self.done,
        }
        replace_text(self._folder.parent / STATE, json.dumps(state))
        self._saved_at = time.monotonic()

    def add(self, new: "_Encoded", place: tuple[int, Place], done: int | None) -> None:
        """Append the documents of a block that ends at `place`, `done` bytes into the files."""
        keep = np.ones(len(new.lengths), bool)
        if self._kept is not None:
            hashes = np.array(new.hashes, HASH)
            keep = self._kept.new(hashes)
            self._files["hashes"].write(hashes[keep].tobytes())
            new.skipped += [("duplicate", new.identifiers[number]) for number in np.flatnonzero(~keep)]
        for split, facts in self.statistics.items():
            chosen = keep & (new.validation == (split == "validation"))
            lengths = new.lengths[chosen]
            tokens = new.tokens if chosen.all() else new.tokens[np.repeat(chosen, new.lengths)]
            self._files[f"{split}.bin"].write(tokens.data)
            self._files[f"{split}.lengths"].write(lengths.data)
            if split == "validation" and new.token_bytes is not None:
                self._files[TOKEN_BYTES].write(new.token_bytes[np.repeat(chosen, new.lengths)].tobytes())
            size = int(new.sizes[chosen].sum())
            for key, amount in (("documents", len(lengths)), ("tokens", len(tokens)), ("bytes", size)):
                facts[key] += amount
        for kind, identifier in new.skipped:
            if self.skipped.counts.total() < LISTED:
                line = json.dumps({"kind": kind, "document": identifier})
                self._files["skipped.jsonl"].write(f"{line}\n".encode())
            self.skipped.add(kind, identifier)
        self.lowest, self.place = min(self.lowest, new.lowest), place
        self.done = sum(facts["bytes"] for facts in self.statistics.values()) if done is None else done
        if time.monotonic() - self._saved_at >= SAVE_SECONDS:
            self._save()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        for file in self._files.values():
            with suppress(OSError) if kind else nullcontext():  # the state does not count what a full disk refused
                file.close()
        if kind is None:
            for split in self.statistics:
                lengths = np.fromfile(self._paths[f"{split}.lengths"], "<i4")
                write_index(self._folder / f"{split}.idx", self._dtype, lengths)
            if not self.skipped.counts:
                self._paths["skipped.jsonl"].unlink()


class _Kept:
    """A set of text hashes, as sorted arrays each at least four times as long as the next: a Python set would take five
    times the memory."""

    def __init__(self) -> None:
        self._arrays: list[npt.NDArray[np.bytes_]] = []

    def new(self, hashes: npt.NDArray[np.bytes_]) -> npt.NDArray[np.bool_]:
        """Add `hashes` (n,); True where one was in neither the set nor an earlier place of `hashes`, (n,)."""
        unknown, first = np.unique(hashes, return_index=True)
        for known in self._arrays:
            places = np.minimum(np.searchsorted(known, unknown), len(known) - 1)
            other = known[places] != unknown
            unknown, first = unknown[other], first[other]
        if len(unknown):
            self._arrays.append(unknown)
        while len(self._arrays) > 1 and len(self._arrays[-2]) < 4 * len(self._arrays[-1]):
            merged = np.concatenate([self._arrays.pop(), self._arrays.pop()])
            merged.sort(kind="stable")  # merges the two sorted runs
            self._arrays.append(merged)
        is_new = np.zeros(len(hashes), bool)
        is_new[first] = True
        return is_new


# ---------------------------------------------------------------------------------------------------- encoding


@dataclass(frozen=True)
class _Document:
    split: str
    hash: float  # of the text, in [0, 1)
    size: int  # bytes
    text: str
    identifier: str
    digest: bytes  # of the text, a HASH; b"" unless the corpus deduplicates


def _split_documents(
    corpus: Corpus, stream: Iterable[tuple[str, str]], validation: bool = False
) -> Iterator[_Document]:
    """Each (identifier, text) with its split; `validation`: all are of a validation_path."""
    fraction = 0.0 if corpus.validation_path else corpus.validation_fraction
    for identifier, text in stream:
        raw = text.encode()
        # 53 bits: exact in a float, and always below 1.0.
        value = (int.from_bytes(hashlib.blake2b(raw, digest_size=8).digest(), "big") >> 11) / (1 << 53)
        split = "validation" if validation or value < fraction else "train"
        digest = hashlib.blake2b(raw, digest_size=HASH.itemsize).digest() if corpus.deduplicate else b""
        size = len(raw)
        del raw  # it may be long, and the caller works on the text now
        yield _Document(split, 1.0 if validation else value, size, text, identifier, digest)


def _batches(stream: Iterator[_Document], limit: int) -> Iterator[list[tuple[str, _Document, bool]]]:
    """Lists of at least `limit` characters in pieces, each with its document and whether it is the document's last."""
    batch: list[tuple[str, _Document, bool]] = []
    held = left = 0
    for document in stream:
        left = len(document.text)
        for piece in _pieces(document.text):
            left -= len(piece)
            batch.append((piece, document, left == 0))
            held += len(piece)
            if held >= limit:
                yield batch
                batch, held = [], 0
    if batch:
        yield batch


@dataclass
class _Encoded:
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


class _Encoder:
    """Blocks to tokens, at most `batch` characters in one call of the tokenizer."""

    def __init__(self, tokenizer_json: str, eos: int, dtype: np.dtype[Any], batch: int) -> None:
        self._tokenizer, self._eos, self._dtype, self._batch = as_text(tokenizer_json), eos, dtype, batch
        self._by_offsets = bytes_of_tokens(tokenizer_json) is None

    def __call__(self, corpus: Corpus, block: Block, validation: bool) -> _Encoded:
        skipped: list[tuple[str, str]] = []
        stream = read(corpus, block, lambda kind, identifier: skipped.append((kind, identifier)))
        ids, ends, encoded = array("i"), array("q", [0]), []
        token_bytes, rest = array("i"), 0  # rest: bytes of the document after its last token so far
        for batch in _batches(_split_documents(corpus, stream, validation), self._batch):
            encodings = self._tokenizer.encode_batch_fast([piece for piece, *_ in batch], add_special_tokens=False)
            held = [piece for piece, document, _ in batch if self._by_offsets and document.split == "validation"]
            with_offsets = iter(self._tokenizer.encode_batch(held, add_special_tokens=False))
            for (piece, document, last), encoding in zip(batch, encodings, strict=True):
                ids.extend(encoding.ids)
                if self._by_offsets:
                    counts = [0] * len(encoding.ids)
                    if document.split == "validation":
                        counts, rest = _bytes_by_offsets(piece, next(with_offsets).offsets, rest)
                    token_bytes.extend(counts)
                if last:
                    ids.append(self._eos)
                    ends.append(len(ids))
                    token_bytes.append(rest)
                    rest = 0
                    # Without the text, so that memory holds one batch and not the block.
                    encoded.append((document.size, document.split, document.hash, document.digest, document.identifier))
        sizes, splits, values, digests, identifiers = zip(*encoded, strict=True) if encoded else ((),) * 5
        return _Encoded(
            np.frombuffer(ids, np.int32).astype(self._dtype) if ids else np.empty(0, self._dtype),
            np.diff(np.frombuffer(ends, np.int64)).astype("<i4"),
            np.array(sizes, np.int64),
            np.array(splits) == "validation" if encoded else np.empty(0, bool),
            min(values, default=1.0),
            skipped,
            np.array(token_bytes, "<i4") if self._by_offsets else None,
            *((list(digests), list(identifiers)) if corpus.deduplicate else ()),
        )


def _encoded(
    corpus: Corpus, start: tuple[int, Place], tokenizer: tuple[str, int, np.dtype[Any]], workers: int
) -> Generator[tuple[_Encoded, tuple[int, Place], int | None], None, None]:
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
        encode = _Encoder(*tokenizer, BATCH)
        for arguments, place, done in work():
            yield encode(*arguments), place, done
        return
    ahead: deque[tuple[Future[_Encoded], tuple[int, Place], int | None, int]] = deque()
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


_encoder: _Encoder  # of a worker process; `_start_worker` sets it


def _start_worker(*arguments: Any) -> None:
    global _encoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which stops the workers
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # each core has a worker process already
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _encoder = _Encoder(*arguments)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def _encode_here(corpus: Corpus, block: Block, validation: bool) -> _Encoded:
    return _encoder(corpus, block, validation)


# ---------------------------------------------------------------------------------------------------- tokenizers


def _train_tokenizer(
    corpora: Mapping[str, Corpus], sources: Mapping[str, Any], vocab_size: int, cache: Path, report: Progress
) -> Path:
    from tokenizers import Tokenizer, pre_tokenizers

    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size <= len(alphabet):
        raise DataError(
            f"The tokenizer's vocab_size is {vocab_size}; a byte-level one needs at least {len(alphabet) + 1}: every "
            "byte and the end-of-text token. Raise it; 4096 suits small models."
        )
    folder = _trained_folder(sources, vocab_size, cache)
    if _complete(folder, "tokenizer.json"):
        return folder

    def sample() -> Iterator[str]:
        """The first training documents of each corpus, the same number of bytes from each."""
        limit = SAMPLE_BYTES // len(corpora)
        for name, corpus in corpora.items():
            used, taken = 0, set()
            report(f"reading {name} for the tokenizer", 0, None)
            for document in _split_documents(corpus, documents(corpus)):
                if document.split == "train" and document.digest not in taken:
                    yield from _pieces(document.text[: limit - used])
                    used += document.size
                    if corpus.deduplicate:
                        taken.add(document.digest)
                report(f"reading {name} for the tokenizer", used, None)
                if used >= limit:
                    break

    # No padding token: if end of text were one, a model's nn.Embedding(padding_idx=…) would not train its row.
    trained = Tokenizer.from_str(_trained_apart(list(sample()), vocab_size, report))
    with _building(folder) as temporary:
        save_tokenizer(wrap_tokenizer(trained, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT), temporary)
    return folder


def _trained_apart(texts: list[str], vocab_size: int, report: Progress) -> str:
    """The tokenizer.json that `bpe.train` makes of the texts. It runs in a process of its own, so that this one still
    handles signals and what `report` raises."""
    import tokenizers

    installed = str(Path(tokenizers.__file__).parent.parent)
    with tempfile.TemporaryFile() as written:
        # -I: it imports from the installed packages only, never from the current folder.
        process = subprocess.Popen(
            [sys.executable, "-I", bpe.__file__, installed], stdin=subprocess.PIPE, stdout=written
        )
        assert process.stdin is not None
        try:
            with suppress(BrokenPipeError):  # it has exited; its status says why
                pickle.dump((texts, vocab_size, END_OF_TEXT), process.stdin)
                process.stdin.flush()
            while process.poll() is None:
                report("training the tokenizer", 0, None)
                with suppress(subprocess.TimeoutExpired):
                    process.wait(0.2)
        finally:
            process.kill()
            process.wait()
            with suppress(BrokenPipeError):
                process.stdin.close()
        if process.returncode:
            raise ChildProcessError(
                f"The process that trains the tokenizer exited with status {process.returncode}. A negative status is "
                "the signal that killed it, most likely out of memory: give it less text or more memory."
            )
        written.seek(0)
        return written.read().decode()


def _trained_folder(sources: Mapping[str, Any], vocab_size: int, cache: Path) -> Path:
    import tokenizers

    return cache / f"tokenizer-{_short_hash([sources, vocab_size, SAMPLE_BYTES, tokenizers.__version__])}"


def _fetch_tokenizer(path: str, cache: Path) -> Path:
    """The folder of the tokenizer's copy in the cache, named by its content."""
    loaded, folder = _named_tokenizer(path, cache)
    if not _complete(folder, "tokenizer.json"):
        with _building(folder) as temporary:
            save_tokenizer(loaded, temporary)
    return folder


def _named_tokenizer(path: str, cache: Path) -> tuple[Any, Path]:
    """The tokenizer, and the folder of its copy in the cache, which may not exist."""
    loaded = load_tokenizer(path)
    identity = _short_hash([loaded.backend_tokenizer.to_str(), loaded.eos_token_id])
    return loaded, cache / f"tokenizer-{identity}"


def as_text(tokenizer_json: str) -> Any:
    """The tokenizer (of `tokenizers`) as training and evaluation encode texts: without truncation or padding, and
    "<|endoftext|>" inside a text is encoded as text, not as the end-of-text token."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(tokenizer_json)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    return tokenizer


def encode(tokenizer: Any, text: str) -> list[int]:
    """The ids of a text as in a prepared corpus, without the end-of-text token; `tokenizer`: from `as_text`."""
    encodings = (tokenizer.encode_batch_fast([piece], add_special_tokens=False)[0] for piece in _pieces(text))
    return [number for encoding in encodings for number in encoding.ids]


def bytes_of_tokens(tokenizer_json: str) -> npt.NDArray[np.int64] | None:
    """The bytes of text that each token stands for, by id, (ids,); 0 for special tokens.

    None where that depends on the text, because the tokenizer is not lossless: it has unknown tokens, a normalizer, or
    drops white space. Lossless is a byte-level BPE that has a token for every byte.
    """
    from tokenizers.pre_tokenizers import ByteLevel

    facts = json.loads(tokenizer_json)
    model, first = facts["model"], facts["pre_tokenizer"] or {}
    steps = first.get("pretokenizers", [first])
    kinds = {step.get("type") for step in steps}
    keeps_all = (
        facts["normalizer"] is None
        and "ByteLevel" in kinds
        and kinds <= {"ByteLevel", "Digits", "Split", "Punctuation"}
        and not any(step.get("behavior") == "Removed" or step.get("add_prefix_space") for step in steps)
        and model["type"] == "BPE"
        and model["vocab"].keys() >= set(ByteLevel.alphabet())
        and not model["continuing_subword_prefix"]
        and not model["end_of_word_suffix"]
        and not any(token["lstrip"] or token["rstrip"] for token in facts["added_tokens"] if not token["special"])
    )
    if not keeps_all:
        return None
    sizes = {number: len(token) for token, number in model["vocab"].items()}  # the vocab writes a byte as a character
    for token in facts["added_tokens"]:
        sizes[token["id"]] = 0 if token["special"] else len(token["content"].encode())
    found = np.zeros(max(sizes) + 1, np.int64)
    found[list(sizes)] = list(sizes.values())
    return found


def _bytes_by_offsets(text: str, offsets: list[tuple[int, int]], before: int) -> tuple[list[int], int]:
    """Bytes from the end of the token before to each token's end, `before` more for the first; and the bytes after the
    last. So bytes between two tokens count for the second, and a character split into several tokens for the first.
    """
    codes = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    ends = np.cumsum(np.concatenate([[0], 1 + (codes > 0x7F) + (codes > 0x7FF) + (codes > 0xFFFF)]))
    reached = np.maximum.accumulate(ends[np.array([end for _, end in offsets], int)]) + before
    total = int(ends[-1]) + before
    return np.diff(reached, prepend=0).tolist(), total - int(reached[-1] if len(reached) else 0)


def rows_needed(tokenizer: Any) -> int:
    """The rows an embedding needs for a tokenizer of `transformers` or `tokenizers`: ids may have gaps."""
    return max(tokenizer.get_vocab().values()) + 1


def _pieces(text: str) -> Iterator[str]:
    """The text in pieces of at most PIECE characters, because encoding needs far more memory than the text. Pieces end
    between a word and a space, where byte-level pre-tokenizers split anyway; without such a place, after PIECE."""
    begin = 0
    while len(text) - begin > PIECE:
        cut = text.rfind(" ", begin + 1, begin + PIECE)
        while cut > begin and text[cut - 1].isspace():
            cut = text.rfind(" ", begin + 1, cut)
        cut = cut if cut > begin else begin + PIECE
        yield text[begin:cut]
        begin = cut
    yield text[begin:]


# ---------------------------------------------------------------------------------------------------- the cache


def _check_names(corpora: Mapping[str, Corpus]) -> None:
    for name in corpora:
        if name == "overall":
            raise DataError("'overall' cannot name a corpus: it names the evaluation over all corpora.")
        if not re.fullmatch(r"\w[\w.-]*", name):
            raise DataError(
                f"{name!r} cannot name a corpus: use letters, digits, '_', '-' and '.', with no '-' or '.' first."
            )


def _describe(corpus: Corpus) -> dict[str, Any]:
    """Everything that decides a corpus's documents. A dataset of the hub is assumed not to change."""
    facts: list[list[Any]] = [
        [str(path), os.path.getsize(path), os.stat(path).st_mtime_ns] for path in _all_files(corpus)
    ]
    description = {"format": FORMAT, "corpus": _settings(corpus), "files": facts}
    if corpus.source == "stdlib":  # its file times only tell when Python was installed
        description["files"] = [[platform.python_version()], *([path, size] for path, size, _ in facts)]
    if corpus.source == "text" and any(path.endswith(COMPRESSED) for path, *_ in facts):
        description["decompressed"] = True  # the first version did not decompress them
    return description


def _corpus_folder(cache: Path, name: str, source: Mapping[str, Any], tokenizer: str) -> Path:
    """Named by what its content depends on: the description of the corpus and the identity of the tokenizer."""
    return cache / f"{name}-{_short_hash([source, tokenizer])}"


def _settings(corpus: Corpus) -> dict[str, Any]:
    """A corpus as recorded. A setting added later is omitted at its default, so that existing caches stay valid."""
    settings = asdict(corpus)
    if not corpus.deduplicate:
        del settings["deduplicate"]
    return settings


def _all_files(corpus: Corpus) -> list[Path]:
    return [path for part in corpus.parts() for path in files(part)]


def _identity(tokenizer_folder: Path) -> str:
    """SHA-256 of the tokenizer.json and the end-of-text token."""
    end = json.loads((tokenizer_folder / "tokenizer_config.json").read_text(encoding="utf-8"))["eos_token"]
    return _sha256((tokenizer_folder / "tokenizer.json").read_bytes() + json.dumps(end).encode())


def _short_hash(value: Any) -> str:
    return _sha256(json.dumps(value, sort_keys=True).encode())[:12]


def _sha256(raw: bytes) -> str:
    return hashlib.sha256(raw).hexdigest()


def _complete(folder: Path, last: str) -> bool:
    """Whether the folder has the file that is written last. A folder without it is damaged, and removed."""
    if folder.exists() and not (folder / last).exists():  # in this order: a folder appears with all its files
        shutil.rmtree(folder)
    return (folder / last).exists()


@contextmanager
def _building(folder: Path) -> Iterator[Path]:
    """A folder that is synced and renamed to `folder` if the block ends without an error.

    Until then it lies in .NAME.0 (or .NAME.1 while another process has that one), with what resuming needs. After an
    error it stays there to be resumed if it has a STATE, unless it is a DataError.
    """
    slot, lock = _claim(folder)
    temporary = slot / "whole"
    try:
        if not (slot / STATE).exists():
            shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(exist_ok=True)
        yield temporary
        for path in [*temporary.rglob("*"), temporary]:
            sync(path)
        try:
            temporary.rename(folder)
        except OSError:
            if not folder.exists():
                raise  # else another process finished first, with the same content
        sync(folder.parent)
        for other in folder.parent.glob(f".{glob.escape(folder.name)}.*"):
            other_lock = None if other == slot else _lock(other)
            if other_lock is not None:  # left by a process that was killed
                shutil.rmtree(other, ignore_errors=True)
                other_lock.close()
        shutil.rmtree(slot, ignore_errors=True)
    except BaseException as error:
        if isinstance(error, DataError) or not (slot / STATE).exists():
            shutil.rmtree(slot, ignore_errors=True)
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise OSError(
                error.errno,
                f"No space is left for {folder}. Free some and give the same command: it resumes. Or choose another "
                "data.cache_dir.",
            ) from error
        raise
    finally:
        lock.close()


def _claim(folder: Path) -> tuple[Path, IO[str]]:
    """The first temporary folder for `folder` that no other process has, and its lock."""
    for number in itertools.count():
        slot = folder.with_name(f".{folder.name}.{number}")
        slot.mkdir(exist_ok=True)
        try:
            lock = _lock(slot)
        except OSError:  # a file system without locks: a folder with a unique name
            slot = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}")
            slot.mkdir()
            return slot, open(slot / "lock", "w", encoding="utf-8")
        if lock is not None:
            return slot, lock
    raise AssertionError


def _lock(slot: Path) -> IO[str] | None:
    """The lock of a temporary folder; None if another process has it, or has just removed the folder."""
    with suppress(FileNotFoundError):
        return lock(slot / "lock")
    return None
