"""Where documents come from: files, Hugging Face datasets and Python's own standard library.

A source is read in blocks of a few megabytes, whose boundaries depend on its content alone. `blocks` reads them one
after another; `read` makes documents of a block, in any process.
"""

import errno
import glob
import gzip
import hashlib
import io
import json
import os
import stat
import sysconfig
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

from powertrain.data import DataError, expand

if TYPE_CHECKING:
    import pyarrow

SOURCES = ("stdlib", "text", "jsonl", "parquet", "arrow", "huggingface", "tokens")
STDLIB_SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
COMPRESSED = (".gz", ".zst")
EXAMPLES = 5
BLOCK = 1 << 22  # bytes read at once, plus the rest of a record
LONGEST = 1 << 27  # bytes of a document, or of its line: 134 MB. To tokenise it takes several times as much memory
ROWS = 64  # of a table read at once at most, because a document may be long

Skip = Callable[[str, str], None]


@dataclass
class Corpus:
    """One corpus: where its documents are, and which of them are held out.

    source: `stdlib` (the .py files of the running Python's standard library, without tests), `text` (each file a
        document), `jsonl` (an object a line), `parquet`, `arrow` (Arrow IPC files and streams, such as `datasets`
        saves), `huggingface` (through `datasets`) or `tokens` (a token file in Megatron's format, used as it is).
        Files of text and jsonl may be compressed, as .gz or .zst.
    path: a glob such as `books/**/*.txt` (text, jsonl, parquet, arrow); a dataset's name, or a folder that `datasets`
        loads or has saved (huggingface); the token file's PREFIX (tokens).
    field: the key or column that holds the text (jsonl, parquet, arrow, huggingface).
    split, name: the split and the configuration of a dataset (huggingface).
    validation_fraction: the share of documents held out for validation, by a hash of their text, so that equal texts
        are never on both sides. A token file is never split.
    validation_path: the validation documents instead, a path of the same kind; the fraction is then ignored.
    deduplicate: keep only the first of documents with equal texts, in the order of the files. Those of validation_path
        come last, so that validation has no text of training either. Each document takes 16 bytes of
        memory, which are sometimes copied (about 30 GB for a billion documents).

    Raises:
        DataError: an unknown source, or settings that do not go together.
    """

    source: str
    path: str | None = None
    field: str = "text"
    split: str = "train"
    name: str | None = None
    validation_fraction: float = 0.0
    validation_path: str | None = None
    deduplicate: bool = False

    def __post_init__(self) -> None:
        if self.source not in SOURCES:
            raise DataError(f"The source {self.source!r} is unknown; the sources are {', '.join(SOURCES)}.")
        if (self.path is None) != (self.source == "stdlib"):
            raise DataError(
                f"A corpus of source {self.source!r} has the path {self.path!r}; stdlib takes no path, every other "
                "source needs one."
            )
        if not 0 <= self.validation_fraction < 1:
            raise DataError(f"validation_fraction is {self.validation_fraction}; it must be at least 0 and below 1.")
        if self.validation_path and self.source == "stdlib":
            raise DataError(f"validation_path is {self.validation_path!r}; stdlib takes only a validation_fraction.")
        if self.deduplicate and self.source == "tokens":
            raise DataError("deduplicate is true, but a token file is used as it is; remove it for this corpus.")

    def parts(self) -> list["Corpus"]:
        """This corpus and, if it has a validation_path, the corpus of that path."""
        return [self] + ([replace(self, path=self.validation_path)] if self.validation_path else [])


@dataclass
class Skipped:
    """Skipped records, by kind: how many, and the identifiers of the first few."""

    counts: Counter[str] = field(default_factory=Counter)
    first: dict[str, list[str]] = field(default_factory=dict)

    def add(self, kind: str, identifier: str) -> None:
        self.counts[kind] += 1
        if self.counts[kind] <= EXAMPLES:
            self.first.setdefault(kind, []).append(identifier)


class Place(NamedTuple):
    """A position between two records: how many files are read to their end, and how far the next one is read, in
    records and in decompressed bytes (jsonl; else 0)."""

    file: int = 0
    records: int = 0
    offset: int = 0


class Block(NamedTuple):
    """Consecutive records. `content`: paths of files (text), lines (jsonl), an Arrow stream (tables) or values
    (huggingface), of the file `path` after its first `first` records. `end`: where the next block begins. `done`: bytes
    of the files read so far; None for a dataset."""

    path: str
    first: int
    content: Any
    end: Place
    done: int | None


def documents(corpus: Corpus, skipped: Skipped | None = None) -> Iterator[tuple[str, str]]:
    """(identifier, text) of each document of `corpus.path`, in an order that depends on the content alone.

    Records without a text are skipped and counted in `skipped`, as by `read`. One block at a time is in memory.

    Raises:
        DataError: no file matches the path, a file is damaged, or a dataset cannot be loaded.
    """
    skipped = Skipped() if skipped is None else skipped
    for block in blocks(corpus):
        yield from read(corpus, block, skipped.add)


def read(corpus: Corpus, block: Block, skip: Skip) -> Iterator[tuple[str, str]]:
    """(identifier, text) of a block's documents; calls `skip(kind, identifier)` for every other record.

    Kinds: invalid_utf8, invalid_json, missing_field, null, not_a_string, empty (only white space) or too_long (more
    than LONGEST bytes).

    Raises:
        DataError: a compressed file is damaged.
    """
    for identifier, value in _READERS[corpus.source](corpus, block, skip):
        if value is None:
            skip("null", identifier)
        elif not isinstance(value, str):
            skip("not_a_string", identifier)
        elif not value or value.isspace():
            skip("empty", identifier)
        elif (size := _encoded_size(value)) is None:
            skip("invalid_utf8", identifier)
        elif size > LONGEST:
            skip("too_long", identifier)
        else:
            yield identifier, value
        del value  # so that it is freed before the next one is read


def _encoded_size(text: str) -> int | None:
    try:
        return len(text.encode())
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can spell
        return None


def files(corpus: Corpus) -> list[Path]:
    """The files that `documents` will read, sorted; none for a dataset of the hub.

    Raises:
        DataError: no file matches, or something cannot be read.
    """
    if corpus.source == "stdlib":
        root = Path(sysconfig.get_paths()["stdlib"])
        found = []
        for folder, folders, names in _walk(root):
            folders[:] = [name for name in folders if name not in STDLIB_SKIPPED]
            found += [Path(folder, name) for name in names if name.endswith(".py")]
        return sorted(found)
    pattern = expand(str(corpus.path))
    if corpus.source == "huggingface":
        inside = (os.path.join(folder, name) for folder, _, names in _walk(pattern) for name in names)
        return sorted(Path(path) for path in inside if _is_file(path))
    # Each file once: with a link to a parent folder ** finds it under dozens of paths.
    _check_folders(pattern)
    names = sorted(name for name in glob.glob(pattern, recursive=True) if _is_file(name))
    found = list({os.path.realpath(name): Path(name) for name in reversed(names)}.values())
    if not found:
        raise DataError(
            f"No file matches {pattern!r} (from {os.getcwd()}). Give a glob that names files, such as "
            f"{os.path.join(pattern, '**', '*') if os.path.isdir(pattern) else 'folder/**/*.txt'}."
        )
    return sorted(found)


def _check_folders(pattern: str) -> None:
    """Raise a DataError for a folder that the glob has to list and cannot: glob itself skips it silently."""
    parts = Path(pattern).parts
    for number, part in enumerate(parts):
        if glob.has_magic("".join(parts[: number + 1])):
            above = parts[: number + (part == "**")]  # ** also lists the folders that it finds
            for folder in glob.iglob(os.path.join(*above, "") or "./", recursive=True):
                if Path(folder).name == "lost+found":
                    continue  # part of the file system, readable by root only
                try:
                    if glob.has_magic(part):
                        os.scandir(folder).close()
                    else:
                        os.lstat(os.path.join(folder, part))
                except OSError as error:
                    _refuse_unreadable(folder, error)


def _is_file(path: str) -> bool:
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except OSError as error:
        _refuse_unreadable(path, error)
        return False


def _refuse_unreadable(path: str | Path, error: OSError) -> None:
    """Raise a DataError, except for a path that does not exist or is a loop of links."""
    if os.path.islink(path) and error.errno == errno.ENOENT:
        raise DataError(f"{path} is a broken link. Restore its target, or remove it.") from error
    if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG):
        raise DataError(
            f"{path} cannot be read: {error.strerror}. Make it readable, or give a path that excludes it."
        ) from error


def _walk(root: str | Path) -> Iterator[tuple[str, list[str], list[str]]]:
    def refuse(error: OSError) -> None:
        _refuse_unreadable(error.filename, error)

    return os.walk(root, onerror=refuse)


# ---------------------------------------------------------------------------------------------------- to blocks


def blocks(corpus: Corpus, start: Place = Place()) -> Iterator[Block]:  # noqa: B008
    """The blocks of a source from `start` on, which is the end of another block: they are the same however reading got
    there.

    Raises:
        DataError: no file matches, a file is damaged, or a dataset cannot be loaded.
    """
    if corpus.source == "huggingface":
        yield from _dataset_blocks(corpus, start)
        return
    paths = files(corpus)
    sizes = [os.path.getsize(path) for path in paths]
    done = sum(sizes[: start.file])
    if corpus.source in ("stdlib", "text"):
        group: list[Path] = []
        held = 0
        for number in range(start.file, len(paths)):
            group.append(paths[number])
            held += sizes[number]
            if held >= BLOCK or number == len(paths) - 1:
                done += held
                yield Block("", 0, group, Place(number + 1), done)
                group, held = [], 0
        return
    for number in range(start.file, len(paths)):
        path, size = paths[number], sizes[number]
        place = start if number == start.file else Place(number)
        try:
            for content, first, end, share in _SPLITTERS[corpus.source](corpus, path, place):
                yield Block(str(path), first, content, end, done + int(share * size))
        except _unreadable() as error:
            raise _cannot_be_read(path, error) from error
        done += size


def _unreadable() -> tuple[type[Exception], ...]:
    """What the readers raise on damaged files."""
    import pyarrow

    return OSError, EOFError, zlib.error, UnicodeDecodeError, pyarrow.ArrowException


def _cannot_be_read(path: Path, error: Exception) -> DataError:
    return DataError(f"{path} cannot be read to its end: {error}. Replace the file or exclude it.")


Split = Iterator[tuple[Any, int, Place, float]]  # content, records before it, place after it, share of the file


def _line_blocks(corpus: Corpus, path: Path, place: Place) -> Split:
    if path.suffix in (".bz2", ".xz"):
        raise DataError(f"{path}: only plain, .gz and .zst files can be read. Decompress it first.")
    size = os.path.getsize(path)
    number, records, offset = place
    with open(path, "rb") as raw, decompressed(path, raw) as file:
        if file is raw:
            file.seek(offset)
        else:
            left = offset
            while left:
                left -= len(file.read(min(left, BLOCK)))
        while content := file.read(BLOCK):
            content += (rest := file.readline(asked := LONGEST + 1))
            first = records
            records += content.count(b"\n")
            offset += len(content)
            while len(rest) == asked and not rest.endswith(b"\n"):  # the line is too long: `_lines` skips it
                rest = file.readline(asked := BLOCK)
                records += rest.count(b"\n")
                offset += len(rest)
            del rest
            yield content, first, Place(number, records, offset), raw.tell() / size


def decompressed(path: Path, raw: BinaryIO) -> BinaryIO:
    """The bytes of an open file, decompressed if its name ends in one of COMPRESSED.

    Raises:
        OSError, EOFError, zlib.error: when it is read, if it is damaged.
    """
    if path.suffix == ".gz":
        return gzip.GzipFile(fileobj=raw)  # type: ignore[return-value]
    return io.BufferedReader(_Zstd(raw), 1 << 17) if path.suffix == ".zst" else raw


class _Zstd(io.RawIOBase):
    """All frames of a file, one after another. zstandard's own reader does not notice a truncated file."""

    def __init__(self, raw: BinaryIO) -> None:
        import zstandard

        # By default it refuses large windows, as `zstd --long=31` writes them.
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 31)
        self._error = zstandard.ZstdError
        self._raw, self._compressed, self._held = raw, b"", memoryview(b"")
        self._frame: Any = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._held:
            self._compressed = self._compressed or self._raw.read(1 << 10)  # may decompress to 32 MB
            if not self._compressed:
                if self._frame is not None:
                    raise EOFError("the last zstd frame is truncated")
                return 0
            self._frame = self._frame or self._decompressor.decompressobj()
            try:
                self._held = memoryview(self._frame.decompress(self._compressed))
            except self._error as error:
                raise OSError(str(error)) from error
            self._compressed = self._frame.unused_data if self._frame.eof else b""
            if self._frame.eof:
                self._frame = None
        count = min(len(buffer), len(self._held))
        buffer[:count] = self._held[:count]
        self._held = self._held[count:]
        return count


def _parquet_blocks(corpus: Corpus, path: Path, place: Place) -> Split:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        _column(corpus, path, file.schema_arrow)

        def batches() -> Iterator[tuple["pyarrow.RecordBatch", float]]:
            row = 0
            for group in range(file.num_row_groups):
                facts = file.metadata.row_group(group)
                rows = facts.num_rows
                if row + rows <= place.records:
                    row += rows
                    continue
                columns = map(facts.column, range(facts.num_columns))
                size = sum(c.total_uncompressed_size for c in columns if c.path_in_schema == corpus.field)
                several = max(1, min(ROWS, BLOCK * rows // max(1, size)))
                for batch in file.iter_batches(batch_size=several, row_groups=[group], columns=[corpus.field]):
                    row += len(batch)
                    if row > place.records:
                        yield batch, row / file.metadata.num_rows

        yield from _table_blocks(place, batches())


def _arrow_blocks(corpus: Corpus, path: Path, place: Place) -> Split:
    import pyarrow

    with pyarrow.memory_map(str(path)) as source:
        is_file = source.read(6) == b"ARROW1"
        source.seek(0)
        reader = pyarrow.ipc.open_file(source) if is_file else pyarrow.ipc.open_stream(source)
        column = _column(corpus, path, reader.schema)

        def batches() -> Iterator[tuple["pyarrow.RecordBatch", float]]:
            row, size = 0, source.size()
            count = reader.num_record_batches if is_file else 0
            for index, batch in enumerate(map(reader.get_batch, range(count)) if is_file else reader, 1):
                share = index / count if is_file else source.tell() / size
                texts = batch.column(column)
                bare = {pyarrow.string(): pyarrow.binary(), pyarrow.large_string(): pyarrow.large_binary()}
                # pyarrow trusts a damaged file's lengths. As bytes, because bad UTF-8 skips a row, not the file.
                texts.view(bare.get(texts.type, texts.type)).validate(full=True)
                one = pyarrow.RecordBatch.from_arrays([texts], [corpus.field])
                for begin in range(0, len(batch), ROWS):
                    part = one.slice(begin, ROWS)
                    row += len(part)
                    if row > place.records:
                        yield part, share

        yield from _table_blocks(place, batches())


def _column(corpus: Corpus, path: Path, schema: "pyarrow.Schema") -> int:
    if corpus.field not in schema.names:
        raise DataError(
            f"{path} has no column {corpus.field!r}; it has {schema.names}. Set the corpus's field to one of these."
        )
    number: int = schema.names.index(corpus.field)
    return number


def _table_blocks(place: Place, batches: Iterator[tuple["pyarrow.RecordBatch", float]]) -> Split:
    """Arrow streams of one block each, from batches and the share of the file at their ends."""
    number, first, _ = place
    held: list[pyarrow.RecordBatch] = []
    size, share = 0, 0.0
    for batch, share in batches:
        held.append(batch)
        size += batch.nbytes
        if size >= BLOCK:
            end = first + sum(map(len, held))
            yield _stream(held), first, Place(number, end), share
            first, held, size = end, [], 0
    if held:
        yield _stream(held), first, Place(number, first + sum(map(len, held))), share


def _stream(batches: list["pyarrow.RecordBatch"]) -> bytes:
    import pyarrow

    sink = pyarrow.BufferOutputStream()
    with pyarrow.ipc.new_stream(sink, batches[0].schema) as stream:
        for batch in batches:
            stream.write_batch(batch)
    content: bytes = sink.getvalue().to_pybytes()
    return content


_SPLITTERS = {"jsonl": _line_blocks, "parquet": _parquet_blocks, "arrow": _arrow_blocks}


def _dataset_blocks(corpus: Corpus, start: Place) -> Iterator[Block]:
    import datasets

    path = expand(str(corpus.path))
    try:
        if any(os.path.isfile(os.path.join(path, name)) for name in ("state.json", "dataset_dict.json")):
            rows: Any = datasets.load_from_disk(path)
            if isinstance(rows, datasets.DatasetDict):
                rows = rows[corpus.split]
        else:
            rows = datasets.load_dataset(path, corpus.name, split=corpus.split, streaming=True)
        first = records = start.records
        values: list[Any] = []
        held = 0
        if first:
            # Dataset.skip refuses to skip all rows.
            rows = (rows.to_iterable_dataset() if isinstance(rows, datasets.Dataset) else rows).skip(first)
        for record in rows:
            value = record.get(corpus.field, ...)  # ... stands for a missing field
            if value is not None and value is not ... and not isinstance(value, str):
                value = 0  # skipped as not_a_string anyway, and an image would take memory
            values.append(value)
            records += 1
            held += len(value) if isinstance(value, str) else 1
            if held >= BLOCK:
                yield Block(path, first, values, Place(0, records), None)
                first, values, held = records, [], 0
        if values:
            yield Block(path, first, values, Place(0, records), None)
    except Exception as error:  # `datasets` raises whatever its readers and the network raise
        raise DataError(
            f"The dataset {path!r} (configuration {corpus.name}, split {corpus.split}) cannot be read: "
            f"{type(error).__name__}: {error}. Check the name, or that this machine can reach the hub."
        ) from error


# ---------------------------------------------------------------------------------------------------- from blocks


def _texts(corpus: Corpus, block: Block, skip: Skip) -> Iterator[tuple[str, Any]]:
    root = sysconfig.get_paths()["stdlib"] if corpus.source == "stdlib" else None
    for path in block.content:
        identifier = os.path.relpath(path, root) if root else str(path)
        try:
            with open(path, "rb") as raw, decompressed(path, raw) as file:
                content = file.read(LONGEST + 1)
        except (OSError, EOFError, zlib.error) as error:
            if path.suffix not in COMPRESSED:
                raise
            raise _cannot_be_read(path, error) from error
        if len(content) > LONGEST:
            skip("too_long", identifier)
            continue
        try:
            text = content.decode("utf-8-sig")
        except UnicodeDecodeError:
            skip("invalid_utf8", identifier)
            continue
        content = b""
        yield identifier, text


def _lines(corpus: Corpus, block: Block, skip: Skip) -> Iterator[tuple[str, Any]]:
    # Line by line, because `datasets` fails on a whole file for one bad line.
    for number, line in enumerate(io.BytesIO(block.content), block.first + 1):
        identifier = f"{block.path}:{number}"
        if len(line) > LONGEST:
            skip("too_long", identifier)
            continue
        if not line.strip():
            continue
        try:
            record = json.loads(line.decode("utf-8-sig"))
        except UnicodeDecodeError:
            skip("invalid_utf8", identifier)
        except (ValueError, RecursionError):  # RecursionError: brackets nested thousands deep
            skip("invalid_json", identifier)
        else:
            if isinstance(record, dict) and corpus.field in record:
                value = record[corpus.field]
                del line, record  # they may be long
                yield identifier, value
            else:
                skip("missing_field", identifier)


def _rows(corpus: Corpus, block: Block, skip: Skip) -> Iterator[tuple[str, Any]]:
    import pyarrow

    row = block.first
    for batch in pyarrow.ipc.open_stream(block.content):
        for value in batch.column(0):
            row += 1
            identifier = f"{block.path}:{row}"
            try:
                text = value.as_py()
            except UnicodeDecodeError:
                skip("invalid_utf8", identifier)
            else:
                yield identifier, text


def _values(corpus: Corpus, block: Block, skip: Skip) -> Iterator[tuple[str, Any]]:
    for row, value in enumerate(block.content, block.first + 1):
        identifier = f"{block.path}:{row}"
        if value is ...:
            skip("missing_field", identifier)
        else:
            yield identifier, value


_READERS = {
    "stdlib": _texts, "text": _texts, "jsonl": _lines, "parquet": _rows, "arrow": _rows, "huggingface": _values,
}  # fmt: skip


DIGEST = 16  # bytes of a text's hash: the probability of a collision among 1e12 documents is 1e-15


@dataclass(frozen=True)
class Document:
    split: str
    hash: float  # of the text, in [0, 1)
    size: int  # bytes
    text: str
    identifier: str
    digest: bytes  # of the text, a HASH; b"" unless the corpus deduplicates


def split_documents(corpus: Corpus, stream: Iterable[tuple[str, str]], validation: bool = False) -> Iterator[Document]:
    """Each (identifier, text) with its split; `validation`: all are of a validation_path."""
    fraction = 0.0 if corpus.validation_path else corpus.validation_fraction
    for identifier, text in stream:
        raw = text.encode()
        # 53 bits: exact in a float, and always below 1.0.
        value = (int.from_bytes(hashlib.blake2b(raw, digest_size=8).digest(), "big") >> 11) / (1 << 53)
        split = "validation" if validation or value < fraction else "train"
        digest = hashlib.blake2b(raw, digest_size=DIGEST).digest() if corpus.deduplicate else b""
        size = len(raw)
        del raw  # it may be long, and the caller works on the text now
        yield Document(split, 1.0 if validation else value, size, text, identifier, digest)
