"""Where documents come from: files, Hugging Face datasets and Python's own standard library."""

import glob
import gzip
import json
import os
import sysconfig
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from data import DataError

SOURCES = ("stdlib", "text", "jsonl", "parquet", "huggingface", "tokens")
STDLIB_LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
EXAMPLES = 5


@dataclass
class Corpus:
    """What one corpus is made of.

    source: `stdlib` (the .py files of the running Python's standard library, without tests), `text` (each file a
        document), `jsonl` (an object a line, .gz too), `parquet`, `huggingface` (through `datasets`) or `tokens` (a
        token file in Megatron's format, used as it is).
    path: a glob such as `books/**/*.txt` (text, jsonl, parquet); a dataset's name, or a folder that `datasets` can
        load or has saved (huggingface); the token file's PREFIX (tokens).
    field: the key or column that holds the text (jsonl, parquet, huggingface).
    split, name: the split and the configuration of a dataset (huggingface).
    validation_fraction: the share of documents, by a hash of their text, that is kept for validation. A token file is
        never split.
    validation_path: the validation documents instead, a path of the same kind; the fraction is ignored then.
    """

    source: str
    path: str | None = None
    field: str = "text"
    split: str = "train"
    name: str | None = None
    validation_fraction: float = 0.0
    validation_path: str | None = None

    def __post_init__(self) -> None:
        if self.source not in SOURCES:
            raise DataError(f"The source {self.source!r} is unknown; the sources are {', '.join(SOURCES)}.")
        if (self.path is None) != (self.source == "stdlib"):
            raise DataError(
                f"A corpus of source {self.source!r} has the path {self.path!r}; stdlib takes none, every other one."
            )
        if not 0 <= self.validation_fraction < 1:
            raise DataError(f"validation_fraction is {self.validation_fraction}; it must be at least 0 and below 1.")
        if self.validation_path and self.source == "stdlib":
            raise DataError(f"validation_path is {self.validation_path!r}; stdlib takes only a validation_fraction.")


@dataclass
class Skipped:
    """Records left out, by kind: how many, and the identifiers of the first few."""

    counts: Counter[str] = field(default_factory=Counter)
    first: dict[str, list[str]] = field(default_factory=dict)

    def add(self, kind: str, identifier: str) -> None:
        self.counts[kind] += 1
        if self.counts[kind] <= EXAMPLES:
            self.first.setdefault(kind, []).append(identifier)


def documents(corpus: Corpus, skipped: Skipped | None = None) -> Iterator[tuple[str, str]]:
    """(identifier, text) of each training or fraction-split document, in an order that only the content decides.

    Records that are no text are left out and entered in `skipped` as invalid_utf8, invalid_json, missing_field, null,
    not_a_string or empty (nothing but white space). Only one document is held at a time. A path without files, a
    damaged file, or a data set that cannot be loaded is a DataError.
    """
    skipped = Skipped() if skipped is None else skipped
    for identifier, value in _READERS[corpus.source](corpus, skipped):
        if value is None:
            skipped.add("null", identifier)
        elif not isinstance(value, str):
            skipped.add("not_a_string", identifier)
        elif not value or value.isspace():
            skipped.add("empty", identifier)
        elif not _encodable(value):
            skipped.add("invalid_utf8", identifier)
        else:
            yield identifier, value


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can spell
        return False
    return True


def files(corpus: Corpus) -> list[Path]:
    """The files that `documents` will read, sorted; none for a data set of the hub. No file is a DataError."""
    if corpus.source == "stdlib":
        root = Path(sysconfig.get_paths()["stdlib"])
        found = []
        for folder, folders, names in os.walk(root):
            folders[:] = [name for name in folders if name not in STDLIB_LEFT_OUT]
            found += [Path(folder, name) for name in names if name.endswith(".py")]
        return sorted(found)
    pattern = os.path.expanduser(str(corpus.path))
    if corpus.source == "huggingface":
        return sorted(path for path in Path(pattern).rglob("*") if path.is_file()) if os.path.isdir(pattern) else []
    found = [Path(name) for name in glob.glob(pattern, recursive=True) if os.path.isfile(name)]
    if not found:
        raise DataError(
            f"No file matches {pattern!r} (from {os.getcwd()}). Give a glob that names files, such as "
            f"{os.path.join(pattern, '**', '*') if os.path.isdir(pattern) else 'folder/**/*.txt'}."
        )
    return sorted(found)


def _texts(corpus: Corpus, skipped: Skipped) -> Iterator[tuple[str, Any]]:
    root = sysconfig.get_paths()["stdlib"] if corpus.source == "stdlib" else None
    for path in files(corpus):
        identifier = os.path.relpath(path, root) if root else str(path)
        try:
            yield identifier, path.read_bytes().decode("utf-8-sig")
        except UnicodeDecodeError:
            skipped.add("invalid_utf8", identifier)


def _lines(corpus: Corpus, skipped: Skipped) -> Iterator[tuple[str, Any]]:
    # Line by line, because `datasets` gives up a whole file for one bad line.
    for path in files(corpus):
        if path.suffix in (".zst", ".bz2", ".xz"):
            raise DataError(f"{path}: only plain and .gz files can be read. Decompress it first.")
        try:
            with _open(path) as file:
                for number, line in enumerate(file, 1):
                    if not line.strip():
                        continue
                    identifier = f"{path}:{number}"
                    try:
                        record = json.loads(line.decode("utf-8-sig"))
                    except UnicodeDecodeError:
                        skipped.add("invalid_utf8", identifier)
                    except (ValueError, RecursionError):  # RecursionError: brackets nested thousands deep
                        skipped.add("invalid_json", identifier)
                    else:
                        if isinstance(record, dict) and corpus.field in record:
                            yield identifier, record[corpus.field]
                        else:
                            skipped.add("missing_field", identifier)
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(f"{path} cannot be read to its end: {error}. Replace the file or leave it out.") from error


def _open(path: Path) -> BinaryIO:
    return gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb")  # type: ignore[return-value]


def _parquet(corpus: Corpus, skipped: Skipped) -> Iterator[tuple[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    for path in files(corpus):
        row = 0
        try:
            with pyarrow.parquet.ParquetFile(path) as file:
                if corpus.field not in file.schema_arrow.names:
                    raise DataError(
                        f"{path} has no column {corpus.field!r}; it has {file.schema_arrow.names}. Set the corpus's "
                        "field to one of these."
                    )
                for batch in file.iter_batches(batch_size=64, columns=[corpus.field]):
                    for value in batch.column(0):
                        row += 1
                        try:
                            text = value.as_py()
                        except UnicodeDecodeError:
                            skipped.add("invalid_utf8", f"{path}:{row}")
                        else:
                            yield f"{path}:{row}", text
        except (OSError, pyarrow.ArrowException) as error:
            raise DataError(f"{path} cannot be read to its end: {error}. Replace the file or leave it out.") from error


def _dataset(corpus: Corpus, skipped: Skipped) -> Iterator[tuple[str, Any]]:
    import datasets

    path = os.path.expanduser(str(corpus.path))
    try:
        if any(os.path.isfile(os.path.join(path, name)) for name in ("state.json", "dataset_dict.json")):
            rows: Any = datasets.load_from_disk(path)
            if isinstance(rows, datasets.DatasetDict):
                rows = rows[corpus.split]
        else:
            rows = datasets.load_dataset(path, corpus.name, split=corpus.split, streaming=True)
        for number, record in enumerate(rows, 1):
            if corpus.field in record:
                yield f"{path}:{number}", record[corpus.field]
            else:
                skipped.add("missing_field", f"{path}:{number}")
    except Exception as error:  # `datasets` raises what its many readers and the network raise
        raise DataError(
            f"The data set {path!r} (configuration {corpus.name}, split {corpus.split}) cannot be read: "
            f"{type(error).__name__}: {error}. Check the name, or that this machine can reach the hub."
        ) from error


_READERS = {"stdlib": _texts, "text": _texts, "jsonl": _lines, "parquet": _parquet, "huggingface": _dataset}
