"""Tokenise corpora once, into a cache that is shared by every run with the same text and tokenizer.

CACHE/NAME-HASH/ holds train.bin and .idx, validation.bin and .idx, tokenizer/ and corpus.json, which describes them.
HASH covers what the content depends on: the corpus's description, its files' sizes and times, and the tokenizer. A
folder takes its name when it is whole; what a killed preparation leaves begins with a dot and may be deleted.
"""

import hashlib
import json
import os
import platform
import re
import shutil
import uuid
from array import array
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from math import ceil
from pathlib import Path
from typing import Any

from data import DataError
from data.sources import Corpus, Skipped, documents, files
from data.tokens import TokenFile, TokenWriter, dtype_for

FORMAT = 1  # goes into HASH: raise it when the same inputs give other files
END_OF_TEXT = "<|endoftext|>"
SAMPLE_BYTES = 64 << 20  # of text that a tokenizer is trained on
PIECE = 1 << 18  # characters encoded together at most
BATCH = 1 << 22  # characters encoded in one call: the tokenizer takes a hundred times that in bytes

Progress = Callable[[str, int, int | None], None]


@dataclass
class TokenizerSpec:
    """`path`: a Hugging Face tokenizer, name or folder. None trains a byte-level BPE of `vocab_size` on the training
    documents of the corpora prepared with it, so that another corpus means another tokenizer: a run that may gain
    corpora later should name the folder of a tokenizer trained once."""

    path: str | None = None
    vocab_size: int = 4096


@dataclass(frozen=True)
class Prepared:
    """What `prepare` made or found, by corpus name.

    folders: of the corpora that were tokenised; each has a corpus.json. tokenizer_folder: loads with AutoTokenizer;
    None when every corpus is a token file and no tokenizer was named. validation: the corpora that have one.
    """

    folders: dict[str, Path]
    tokenizer_folder: Path | None
    train: dict[str, TokenFile]
    validation: dict[str, TokenFile]


def prepare(
    corpora: Mapping[str, Corpus], tokenizer: TokenizerSpec, cache_dir: str | Path, progress: Progress | None = None
) -> Prepared:
    """Tokenise every corpus that is not in the cache yet; each document is followed by the end-of-text token.

    The same inputs give the same bytes. Documents are split by a hash of their text, so equal ones never straddle the
    split. `progress(description, bytes of text done, bytes in all or None)` is called now and then. Several processes
    may prepare at once; the first to finish wins. DataErrors: names that are no file names, no text, no document on
    one side of the split, a tokenizer that cannot be loaded or has no end-of-text token, files changed since.
    """
    _check_names(corpora)
    cache = Path(cache_dir).expanduser()
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

    folders, train, validation = {}, {}, {}
    for name, corpus in corpora.items():
        if corpus.source == "tokens":
            train[name] = TokenFile(os.path.expanduser(str(corpus.path)))
            if corpus.validation_path:
                validation[name] = TokenFile(os.path.expanduser(corpus.validation_path))
            continue
        assert tokenizer_folder is not None
        identity = _identity(tokenizer_folder)
        folder = cache / f"{name}-{_short_hash([sources[name], identity])}"
        if not _complete(folder, "corpus.json"):
            _write_corpus(name, corpus, folder, tokenizer_folder, identity, report)
        folders[name] = folder
        for split, opened in _open_corpus(folder).items():
            (train if split == "train" else validation)[name] = opened
    return Prepared(folders, tokenizer_folder, train, validation)


def find(corpora: Mapping[str, Corpus], tokenizer: TokenizerSpec, cache_dir: str | Path) -> Prepared:
    """What `prepare` would find in place, and makes none of it; validation files are left out.

    DataErrors: names that are no file names, paths that match no file.
    """
    _check_names(corpora)
    cache = Path(cache_dir).expanduser()
    text = {name: corpora[name] for name in sorted(corpora) if corpora[name].source != "tokens"}
    sources = {name: _describe(corpus) for name, corpus in text.items()}
    folder = None
    if tokenizer.path is not None and os.path.isdir(os.path.expanduser(tokenizer.path)):
        folder = _fetch_tokenizer(tokenizer.path, cache)
    elif tokenizer.path is None and text:
        trained = _trained_folder(sources, tokenizer.vocab_size, cache)
        folder = trained if _complete(trained, "tokenizer.json") else None
    folders, train = {}, {}
    for name, corpus in corpora.items():
        if corpus.source == "tokens":
            train[name] = TokenFile(os.path.expanduser(str(corpus.path)))
        elif folder is not None:
            own = cache / f"{name}-{_short_hash([sources[name], _identity(folder)])}"
            if _complete(own, "corpus.json"):
                folders[name] = own
                train[name] = TokenFile(own / "train")
    return Prepared(folders, folder, train, {})


# ---------------------------------------------------------------------------------------------------- one corpus


def _write_corpus(
    name: str, corpus: Corpus, folder: Path, tokenizer_folder: Path, identity: str, report: Progress
) -> None:
    encode, eos, vocab_size = _load_encoder(tokenizer_folder)
    total = sum(map(os.path.getsize, _all_files(corpus))) if corpus.source in ("stdlib", "text") else None
    skipped, done, lowest, ids = Skipped(), 0, 1.0, array("i")
    splits = ["train"] + ["validation"] * bool(corpus.validation_fraction or corpus.validation_path)
    statistics = {split: {"documents": 0, "tokens": 0, "bytes": 0} for split in splits}
    with _building(folder) as temporary:
        with ExitStack() as stack:
            writers = {
                split: stack.enter_context(TokenWriter(temporary / split, dtype_for(vocab_size))) for split in splits
            }
            for batch in _batches(_split_documents(corpus, skipped)):
                encoded = encode([piece for piece, _ in batch])
                for (_, document), piece_ids in zip(batch, encoded, strict=True):
                    ids.extend(piece_ids)
                    if document is None:  # more of it follows
                        continue
                    ids.append(eos)
                    writers[document.split].add(ids)
                    for key, amount in (("documents", 1), ("tokens", len(ids)), ("bytes", document.size)):
                        statistics[document.split][key] += amount
                    done += document.size
                    lowest = min(lowest, document.hash)
                    del ids[:]
                report(f"tokenising {name}", done, total)
        for split in splits:
            if statistics[split]["documents"] == 0:
                raise _no_document(name, corpus, split, statistics, skipped, lowest)
        shutil.copytree(tokenizer_folder, temporary / "tokenizer")
        summary = {
            "format": FORMAT,
            "corpus": asdict(corpus),
            "splits": {
                split: {**statistics[split], "fingerprint": TokenFile(temporary / split).fingerprint()}
                for split in splits
            },
            "skipped": {
                kind: {"count": count, "first": skipped.first[kind]} for kind, count in sorted(skipped.counts.items())
            },
            "tokenizer": identity,
        }
        (temporary / "corpus.json").write_text(json.dumps(summary, indent=2) + "\n")


def _open_corpus(folder: Path) -> dict[str, TokenFile]:
    """Split → file, for the splits that the folder's corpus.json lists with these very bytes."""
    opened = {}
    for split, facts in json.loads((folder / "corpus.json").read_text())["splits"].items():
        opened[split] = TokenFile(folder / split)
        if opened[split].fingerprint() != facts["fingerprint"]:
            raise DataError(
                f"{folder / split}.bin or .idx changed since it was prepared. Delete {folder} to prepare it anew."
            )
    return opened


def _no_document(
    name: str, corpus: Corpus, split: str, statistics: dict[str, dict[str, int]], skipped: Skipped, lowest: float
) -> DataError:
    left_out = ", ".join(f"{count} {kind}" for kind, count in sorted(skipped.counts.items())) or "none"
    total = sum(facts["documents"] for facts in statistics.values())
    message = f"The {split} split of corpus {name!r} has no document, out of {total} (left out: {left_out}). "
    if total == 0 or corpus.validation_path:
        return DataError(message + "Check its path and, for records, the name of the field that holds the text.")
    message += f"validation_fraction is {corpus.validation_fraction} and the split follows a hash of each text. "
    if total == 1:
        return DataError(message + "Set it to 0, or name other documents as validation_path.")
    if split == "validation":
        return DataError(message + f"Raise it to {ceil(lowest * 1e4) / 1e4} for one document, or set it to 0 for none.")
    return DataError(message + "Lower it.")


@dataclass(frozen=True)
class _Document:
    split: str
    hash: float  # of the text, in [0, 1)
    size: int  # bytes
    text: str


def _split_documents(corpus: Corpus, skipped: Skipped) -> Iterator[_Document]:
    fraction = 0.0 if corpus.validation_path else corpus.validation_fraction
    for _, text in documents(corpus, skipped):
        raw = text.encode()
        # 53 bits: a float holds them exactly, and 1.0 cannot be reached.
        value = (int.from_bytes(hashlib.blake2b(raw, digest_size=8).digest(), "big") >> 11) / (1 << 53)
        split = "validation" if value < fraction else "train"
        yield _Document(split, value, len(raw), text)
    if corpus.validation_path:
        for _, text in documents(replace(corpus, path=corpus.validation_path), skipped):
            yield _Document("validation", 1.0, len(text.encode()), text)


def _batches(stream: Iterator[_Document]) -> Iterator[list[tuple[str, _Document | None]]]:
    """Pieces of text in lists of bounded size; the last piece of a document comes with the document."""
    batch: list[tuple[str, _Document | None]] = []
    held = 0
    for document in stream:
        pieces = list(_pieces(document.text))
        for number, piece in enumerate(pieces, 1):
            batch.append((piece, document if number == len(pieces) else None))
            held += len(piece)
            if held >= BATCH:
                yield batch
                batch, held = [], 0
    if batch:
        yield batch


# ---------------------------------------------------------------------------------------------------- tokenizers


def _train_tokenizer(
    corpora: Mapping[str, Corpus], sources: Mapping[str, Any], vocab_size: int, cache: Path, report: Progress
) -> Path:
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if vocab_size <= len(alphabet):
        raise DataError(
            f"The tokenizer's vocab_size is {vocab_size}; a byte-level one takes at least {len(alphabet) + 1}: every "
            "byte and the end of text. Raise it; 4096 suits small models."
        )
    folder = _trained_folder(sources, vocab_size, cache)
    if _complete(folder, "tokenizer.json"):
        return folder

    def sample() -> Iterator[str]:
        """The first training documents of each corpus, the same number of bytes of each."""
        limit = SAMPLE_BYTES // len(corpora)
        for name, corpus in corpora.items():
            used = 0
            for document in _split_documents(corpus, Skipped()):
                if document.split == "train":
                    yield from _pieces(document.text[: limit - used])
                    used += document.size
                if used >= limit:
                    break
            report(f"reading {name} for the tokenizer", used, None)

    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        sample(),
        trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet, show_progress=False
        ),
    )
    # No padding token: as the end of text is one, a model that is told of it would not train its embedding.
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )
    with _building(folder) as temporary:
        wrapped.save_pretrained(temporary)
    return folder


def _trained_folder(sources: Mapping[str, Any], vocab_size: int, cache: Path) -> Path:
    import tokenizers

    return cache / f"tokenizer-{_short_hash([sources, vocab_size, SAMPLE_BYTES, tokenizers.__version__])}"


def _fetch_tokenizer(path: str, cache: Path) -> Path:
    """A copy of the tokenizer in the cache, named by its content."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(os.path.expanduser(path))
    except Exception as error:  # whatever is wrong with a file or the network
        raise DataError(
            f"No tokenizer could be loaded from {path!r}: {type(error).__name__}: {error} Give a folder with a "
            "tokenizer.json, a name that the hub knows, or no path to train one."
        ) from error
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise DataError(f"The tokenizer {path!r} has no tokenizer.json. Convert it to a fast tokenizer first.")
    if tokenizer.eos_token_id is None:
        raise DataError(
            f"The tokenizer {path!r} has no end-of-text token, which must follow every document. Set eos_token in its "
            "tokenizer_config.json."
        )
    identity = _short_hash([tokenizer.backend_tokenizer.to_str(), tokenizer.eos_token_id])
    folder = cache / f"tokenizer-{identity}"
    if not _complete(folder, "tokenizer.json"):
        with _building(folder) as temporary:
            tokenizer.save_pretrained(temporary)
    return folder


def _load_encoder(folder: Path) -> tuple[Callable[[list[str]], list[list[int]]], int, int]:
    """(texts → token ids without any special token, the end-of-text id, the vocabulary's size)."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True  # "<|endoftext|>" written in a document is text, not the end of it

    def encode(texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]

    return encode, tokenizer.eos_token_id, max(tokenizer.get_vocab().values()) + 1


def _pieces(text: str) -> Iterator[str]:
    """The text in pieces of bounded size, for encoding takes far more memory than text. A cut falls between a word and
    a space, where byte-level tokenizers cut anyway; a piece without such a place is cut at its end."""
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
        if not re.fullmatch(r"\w[\w.-]*", name):
            raise DataError(
                f"{name!r} cannot name a corpus: use letters, digits, '_', '-' and '.', no '-' or '.' first."
            )


def _describe(corpus: Corpus) -> dict[str, Any]:
    """Everything about a corpus that decides its documents. A data set of the hub is taken to be what it was."""
    facts: list[list[Any]] = [
        [str(path), os.path.getsize(path), os.stat(path).st_mtime_ns] for path in _all_files(corpus)
    ]
    if corpus.source == "stdlib":  # its times say when Python was installed
        facts = [[platform.python_version()], *([path, size] for path, size, _ in facts)]
    return {"format": FORMAT, "corpus": asdict(corpus), "files": facts}


def _all_files(corpus: Corpus) -> list[Path]:
    return files(corpus) + (files(replace(corpus, path=corpus.validation_path)) if corpus.validation_path else [])


def _identity(tokenizer_folder: Path) -> str:
    """SHA-256 of what the tokenizer does: its tokenizer.json and which token ends a text."""
    end = json.loads((tokenizer_folder / "tokenizer_config.json").read_text())["eos_token"]
    return _sha256((tokenizer_folder / "tokenizer.json").read_bytes() + json.dumps(end).encode())


def _short_hash(value: Any) -> str:
    return _sha256(json.dumps(value, sort_keys=True).encode())[:12]


def _sha256(raw: bytes) -> str:
    return hashlib.sha256(raw).hexdigest()


def _complete(folder: Path, last: str) -> bool:
    """Whether the folder has the file that is written last. One without it was damaged, and is removed."""
    if folder.exists() and not (folder / last).exists():  # in this order: a folder appears with all its files
        shutil.rmtree(folder)
    return (folder / last).exists()


@contextmanager
def _building(folder: Path) -> Iterator[Path]:
    """A temporary folder beside `folder` that takes its name, synced, if the block ends without an error."""
    temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}")
    temporary.mkdir()
    try:
        yield temporary
        for path in [*temporary.rglob("*"), temporary]:
            _sync(path)
        try:
            temporary.rename(folder)
        except OSError:
            if not folder.exists():
                raise  # else another process was faster, with the same content
        _sync(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
