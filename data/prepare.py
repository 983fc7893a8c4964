"""Tokenise corpora once, into a cache shared by all runs with the same text and tokenizer.

CACHE/NAME-HASH/ holds train.bin and .idx, validation.bin and .idx, tokenizer/ and corpus.json, which describes them.
HASH covers what the content depends on: the corpus's description, its files' sizes and times, and the tokenizer. A
folder gets its name when it is complete. Until then it is .NAME-HASH.0: append-only files, and a state that records how
many of their bytes are valid. The next process that prepares the same corpus resumes from that state.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import closing, nullcontext, suppress
from dataclasses import dataclass, field
from math import ceil
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from powertrain.data import DataError, expand
from powertrain.data.cache import (
    FORMAT,
    STATE,
    Progress,
    all_files,
    building,
    check_names,
    complete,
    corpus_folder,
    describe,
    fingerprint,
    identity_of,
    settings_of,
)
from powertrain.data.encode import Encoded, encode_blocks
from powertrain.data.files import replace_text
from powertrain.data.sources import DIGEST, LONGEST, Corpus, Place, Skipped
from powertrain.data.tokenizer import (
    bytes_of_tokens,
    fetch_tokenizer,
    load_tokenizer,
    named_tokenizer,
    rows_needed,
    train_tokenizer,
    trained_folder,
)
from powertrain.data.tokens import TokenFile, dtype_for, write_index

ALONE = 64 << 20  # bytes of files: for fewer, starting worker processes takes longer than it saves
MANY_SKIPPED = 0.01  # share of a corpus's skipped records above which it warns

HASH = np.dtype(f"S{DIGEST}")
SAVE_SECONDS = 10.0  # of work that a kill may lose
TOKEN_BYTES = "validation.bytes"
LISTED = 100_000  # lines of skipped.jsonl at most


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
    check_names(corpora)
    cache = Path(expand(cache_dir))
    cache.mkdir(parents=True, exist_ok=True)
    report = progress or (lambda description, done, total: None)
    text = {name: corpora[name] for name in sorted(corpora) if corpora[name].source != "tokens"}
    sources = {name: describe(corpus) for name, corpus in text.items()}

    if tokenizer.path is not None:
        tokenizer_folder: Path | None = fetch_tokenizer(tokenizer.path, cache)
    elif text:
        tokenizer_folder = train_tokenizer(text, sources, tokenizer.vocab_size, cache, report)
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
        identity = identity_of(tokenizer_folder)
        folder = corpus_folder(cache, name, sources[name], identity)
        if not complete(folder, "corpus.json"):
            _write_corpus(name, corpus, folder, tokenizer_folder, identity, report, workers)
        prepared.folders[name] = folder
        _open_corpus(name, folder, prepared, cache, report)
    return prepared


def find(corpora: Mapping[str, Corpus], tokenizer: TokenizerSpec, cache_dir: str | Path) -> Prepared:
    """What `prepare` would find in the cache; prepares nothing. Validation files are not looked up.

    Raises:
        DataError: a name cannot be a file name, or a path matches no file.
    """
    check_names(corpora)
    cache = Path(expand(cache_dir))
    text = {name: corpora[name] for name in sorted(corpora) if corpora[name].source != "tokens"}
    sources = {name: describe(corpus) for name, corpus in text.items()}
    folder = None
    if tokenizer.path is not None and os.path.isdir(expand(tokenizer.path)):
        folder = named_tokenizer(tokenizer.path, cache)[1]
    elif tokenizer.path is None and text:
        folder = trained_folder(sources, tokenizer.vocab_size, cache)
    if folder is not None and not (folder / "tokenizer.json").exists():
        folder = None
    folders, train = {}, {}
    for name, corpus in corpora.items():
        if corpus.source == "tokens":
            train[name] = TokenFile(expand(str(corpus.path)))
        elif folder is not None:
            own = corpus_folder(cache, name, sources[name], identity_of(folder))
            if (own / "corpus.json").exists():
                folders[name] = own
                train[name] = TokenFile(own / "train")
    return Prepared(folders, folder, train, {})


def _write_corpus(
    name: str, corpus: Corpus, folder: Path, tokenizer_folder: Path, identity: str, report: Progress, workers: int
) -> None:
    tokenizer = load_tokenizer(tokenizer_folder)
    tokenizer_json, eos = tokenizer.backend_tokenizer.to_str(), tokenizer.eos_token_id
    dtype = dtype_for(rows_needed(tokenizer)).newbyteorder("<")
    total = sum(map(os.path.getsize, all_files(corpus))) if corpus.source != "huggingface" else None
    splits = ["train"] + ["validation"] * bool(corpus.validation_fraction or corpus.validation_path)
    with building(folder) as temporary:
        by_offsets = bytes_of_tokens(tokenizer_json) is None
        with Output(temporary, splits, dtype, corpus.deduplicate, by_offsets) as output:
            alone = workers < 2 or (total is not None and total < ALONE)
            encoded = encode_blocks(corpus, output.place, (tokenizer_json, eos, dtype), 0 if alone else workers)
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
            "corpus": settings_of(corpus),
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


def _no_document(name: str, corpus: Corpus, split: str, output: Output) -> DataError:
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


class Output:
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
        self._kept = Kept() if deduplicate else None

    def __enter__(self) -> Output:
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

    def add(self, new: Encoded, place: tuple[int, Place], done: int | None) -> None:
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


class Kept:
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
