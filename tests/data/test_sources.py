import contextlib
import gzip
import json
import os
import shutil
import struct
import tempfile
import tracemalloc
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from powertrain import data
from powertrain.data import DataError
from powertrain.data.sources import Corpus, Skipped, blocks, documents, files


def read(corpus: Corpus) -> tuple[list[str], Skipped]:
    skipped = Skipped()
    return [text for _, text in documents(corpus, skipped)], skipped


def test_text_files_are_documents_in_sorted_order(tmp_path):
    (tmp_path / "sub").mkdir()
    for name, content in {"b.txt": b"two", "a.txt": b"\xef\xbb\xbfone", "sub/c.txt": b"three", "d.md": b"no"}.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "e.txt").write_bytes(b"caf\xe9")
    (tmp_path / "f.txt").write_bytes(b" \n\t ")
    texts, skipped = read(Corpus("text", str(tmp_path / "**" / "*.txt")))
    assert texts == ["one", "two", "three"]
    assert skipped.first == {"invalid_utf8": [str(tmp_path / "e.txt")], "empty": [str(tmp_path / "f.txt")]}


BAD_LINES = [
    (b'{"text": "caf\xe9"}', "invalid_utf8"),
    (b'{"text": "half a pair: \\ud800"}', "invalid_utf8"),
    (b'{"text": "unfinished', "invalid_json"),
    (b"[" * 100_000, "invalid_json"),
    (b'{"words": "no field"}', "missing_field"),
    (b'["text"]', "missing_field"),
    (b'{"text": null}', "null"),
    (b'{"text": 7}', "not_a_string"),
    (b'{"text": ["a"]}', "not_a_string"),
    (b'{"text": ""}', "empty"),
    (b'{"text": " \\n"}', "empty"),
]


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz"])
def test_fault_19_bad_json_lines_are_counted_and_never_stop_it(tmp_path, suffix):
    lines = [b'{"text": "first"}', *(line for line, _ in BAD_LINES), b"", b"  ", b'{"text": "last", "id": 1}\r']
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(gzip.compress(b"\n".join(lines)) if suffix.endswith("gz") else b"\n".join(lines))
    texts, skipped = read(Corpus("jsonl", str(path)))
    assert texts == ["first", "last"]
    for kind in {kind for _, kind in BAD_LINES}:
        numbers = [number for number, (_, other) in enumerate(BAD_LINES, 2) if other == kind]
        assert skipped.first[kind] == [f"{path}:{number}" for number in numbers]
        assert skipped.counts[kind] == len(numbers)


def test_only_the_first_bad_records_are_kept(tmp_path):
    (tmp_path / "a.jsonl").write_text("{}\n" * 1000)
    _, skipped = read(Corpus("jsonl", str(tmp_path / "a.jsonl")))
    assert skipped.counts["missing_field"] == 1000 and len(skipped.first["missing_field"]) == 5


def test_damaged_files_are_named(tmp_path):
    whole = gzip.compress(json.dumps({"text": "word " * 10_000}).encode())
    for damaged in (whole[:-20], whole[:30] + b"\xff" * 20 + whole[50:]):
        (tmp_path / "a.jsonl.gz").write_bytes(damaged)
        with pytest.raises(DataError, match=r"a\.jsonl\.gz cannot be read"):
            read(Corpus("jsonl", str(tmp_path / "*.gz")))
    (tmp_path / "a.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(DataError, match=r"a\.parquet cannot be read"):
        read(Corpus("parquet", str(tmp_path / "a.parquet")))
    (tmp_path / "a.jsonl.xz").write_bytes(b"")
    with pytest.raises(DataError, match="Decompress"):
        read(Corpus("jsonl", str(tmp_path / "a.jsonl.xz")))


@pytest.mark.parametrize("source", ["jsonl", "text"])
@pytest.mark.parametrize("suffix", ["gz", "zst"])
def test_compressed_files_that_are_not_whole_or_not_compressed_are_named(tmp_path, suffix, source):
    raw = json.dumps({"text": "word " * 10_000}).encode() + b"\n"
    frame = gzip.compress(raw) if suffix == "gz" else zstandard.compress(raw)
    path = tmp_path / f"a.{suffix}"
    for damaged in (frame[:-1], frame + frame[: len(frame) // 2], raw, frame + b"more"):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=rf"a\.{suffix} cannot be read"):
            read(Corpus(source, str(path)))
    path.write_bytes(frame + frame)
    assert len(read(Corpus(source, str(path)))[0]) == (2 if source == "jsonl" else 1)
    path.write_bytes(b"")
    assert read(Corpus(source, str(path)))[0] == []


def test_zst_frames_are_read_to_the_last_and_with_long_windows(tmp_path):
    lines = [json.dumps({"text": f"{number} " * 500}).encode() + b"\n" for number in range(300)]
    long = zstandard.ZstdCompressor(
        compression_params=zstandard.ZstdCompressionParameters(window_log=28, enable_ldm=True)
    ).compressobj()  # larger than zstandard takes by default
    frames = [
        zstandard.compress(b"".join(lines[:100])),
        b"\x50\x2a\x4d\x18\x04\0\0\0skip",  # a frame that is to be skipped
        long.compress(b"".join(lines[100:200])) + long.flush(),
        *map(zstandard.compress, lines[200:]),
    ]
    (tmp_path / "a.zst").write_bytes(b"".join(frames))
    texts, skipped = read(Corpus("jsonl", str(tmp_path / "a.zst")))
    assert texts == [json.loads(line)["text"] for line in lines] and not skipped.counts


def write_table(path: Path, table: pyarrow.Table) -> None:
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(table, path, row_group_size=70)
    else:
        new = pyarrow.ipc.new_file if path.suffix == ".file" else pyarrow.ipc.new_stream
        with new(path, table.schema) as writer:
            writer.write_table(table, max_chunksize=100)


@pytest.mark.parametrize("kind", ["text", "jsonl", "jsonl.gz", "jsonl.zst", "parquet", "file", "stream", "huggingface"])
def test_reading_resumes_at_the_end_of_any_block(tmp_path, kind, monkeypatch):
    datasets.disable_progress_bars()
    monkeypatch.setattr(data.sources, "BLOCK", 3000)
    monkeypatch.setattr(data.sources, "ROWS", 16)
    texts = [f"{number} " * (number % 97 + 1) for number in range(300)]
    for part in range(3):
        some: list = [*texts[part * 100 : part * 100 + 100], None]
        path = tmp_path / f"{part}.{kind}"
        if kind == "text":
            for number, text in enumerate(some[:-1]):
                (tmp_path / f"{part}-{number:03}.text").write_text(text)
        elif kind.startswith("jsonl"):
            raw = "".join(json.dumps({"text": text}) + "\n" for text in some).encode()
            path.write_bytes({"gz": gzip.compress, "zst": zstandard.compress}.get(kind[6:], bytes)(raw))
        elif kind == "huggingface":
            datasets.Dataset.from_dict({"text": some if part else texts}).save_to_disk(tmp_path / str(part))
        else:
            write_table(path, pyarrow.table({"text": some}))
    source = {"file": "arrow", "stream": "arrow"}.get(kind, kind.partition(".")[0])
    corpus = Corpus(source, str(tmp_path / ("0" if kind == "huggingface" else f"*.{kind}")))
    every = list(blocks(corpus))
    assert len(every) > 10 and read(corpus)[0] == texts
    for number, block in enumerate(every[:-1]):
        assert list(blocks(corpus, block.end)) == every[number + 1 :]
    assert list(blocks(corpus, every[-1].end)) == []
    if kind != "huggingface":
        done = [block.done for block in every]
        total = sum(path.stat().st_size for path in files(corpus))
        assert done == sorted(done) and done[-1] == total - 8 * (kind == "stream")  # the mark of its end


def test_arrow_files_and_streams(tmp_path):
    strings = pyarrow.array(["one", None, "", "two", "café"])
    kinds = {
        "string": strings,
        "large": strings.cast(pyarrow.large_string()),
        "view": strings.cast(pyarrow.string_view()),
        "dictionary": strings.dictionary_encode(),
    }
    for suffix in ("file", "stream"):
        for name, column in kinds.items():
            path = tmp_path / f"{name}.{suffix}"
            write_table(path, pyarrow.table({"id": range(5), "text": column}))
            texts, skipped = read(Corpus("arrow", str(path)))
            assert texts == ["one", "two", "café"]
            assert skipped.first == {"null": [f"{path}:2"], "empty": [f"{path}:3"]}
        with pytest.raises(DataError, match=r"no column 'body'.*\['id', 'text'\]"):
            read(Corpus("arrow", str(path), field="body"))
        whole = path.read_bytes()
        for damaged in (whole[: len(whole) // 2], b"", b"ARROW1", b"nothing of the kind"):
            path.write_bytes(damaged)
            with pytest.raises(DataError, match=rf"dictionary\.{suffix} cannot be read"):
                read(Corpus("arrow", str(path)))
    lengths = struct.pack("<6i", 0, 3, 3, 3, 6, 11)
    for suffix in ("file", "stream"):  # pyarrow would read a gigabyte past the end
        path = tmp_path / f"string.{suffix}"
        whole = path.read_bytes()
        assert whole.count(lengths) == 1
        path.write_bytes(whole.replace(lengths, struct.pack("<6i", 0, 3, 3, 1 << 30, 6, 11)))
        with pytest.raises(DataError, match=rf"string\.{suffix} cannot be read"):
            read(Corpus("arrow", str(path)))
    nulls = tmp_path / "nulls.stream"
    write_table(nulls, pyarrow.table({"text": pyarrow.nulls(3), "nested": [{"a": None}] * 3}))
    assert read(Corpus("arrow", str(nulls)))[1].counts == {"null": 3}
    assert read(Corpus("arrow", str(nulls), field="nested"))[1].counts == {"not_a_string": 3}


def test_a_file_is_read_once(tmp_path):
    """However many paths links make of it."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / "a.txt").write_text("one")
    (folder / "b.txt").symlink_to(folder / "a.txt")
    (folder / "self").symlink_to(folder)
    assert files(Corpus("text", f"{folder}/**/*.txt")) == [folder / "a.txt"]


def test_parquet(tmp_path):
    path = tmp_path / "a.parquet"
    invalid = pyarrow.array([b"one", b"caf\xe9", None, b"", b"two"]).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": invalid, "id": [1, 2, 3, 4, 5]}), path)
    texts, skipped = read(Corpus("parquet", str(path)))
    assert texts == ["one", "two"]
    assert skipped.first == {"invalid_utf8": [f"{path}:2"], "null": [f"{path}:3"], "empty": [f"{path}:4"]}
    texts, skipped = read(Corpus("parquet", str(path), field="id"))
    assert texts == [] and skipped.counts["not_a_string"] == 5
    with pytest.raises(DataError, match=r"no column 'body'.*\['text', 'id'\]"):
        read(Corpus("parquet", str(path), field="body"))


def test_huggingface_folders(tmp_path):
    datasets.disable_progress_bars()
    table = datasets.Dataset.from_dict({"body": ["one", None, "", "two"]})
    table.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"test": table}).save_to_disk(tmp_path / "splits")
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "train.jsonl").write_text('{"body": "one"}\n{"body": "two"}\n')
    for folder, split in (("saved", "train"), ("splits", "test"), ("plain", "train")):
        corpus = Corpus("huggingface", str(tmp_path / folder), field="body", split=split)
        texts, skipped = read(corpus)
        assert texts == ["one", "two"]
        assert folder == "plain" or skipped.counts == {"null": 1, "empty": 1}
        assert files(corpus)
    with pytest.raises(DataError, match="split other"):
        read(Corpus("huggingface", str(tmp_path / "splits"), split="other"))


def test_the_standard_library():
    texts, _ = read(Corpus("stdlib"))
    assert len(texts) > 300 and sum(map(len, texts)) > 5_000_000
    identifiers = [identifier for identifier, _ in documents(Corpus("stdlib"))]
    assert "argparse.py" in identifiers and identifiers == sorted(identifiers, key=lambda name: Path(name))
    assert not any({"test", "tests", "site-packages"} & set(Path(name).parts) for name in identifiers)


def test_no_file_matches(tmp_path):
    for path in (tmp_path / "*.txt", tmp_path):
        with pytest.raises(DataError, match="No file matches"):
            files(Corpus("text", str(path)))


@pytest.mark.parametrize(
    ("corpus", "words"),
    [
        ({"source": "web"}, "'web' is unknown; the sources are stdlib"),
        ({"source": "text"}, "path None"),
        ({"source": "stdlib", "path": "x"}, "path 'x'"),
        ({"source": "text", "path": "x", "validation_fraction": 1.0}, "1.0"),
        ({"source": "text", "path": "x", "validation_fraction": -0.1}, "-0.1"),
        ({"source": "stdlib", "validation_path": "x"}, "stdlib takes only"),
        ({"source": "tokens", "path": "x", "deduplicate": True}, "as it is"),
    ],
)
def test_invalid_corpora(corpus, words):
    with pytest.raises(DataError, match=words):
        Corpus(**corpus)


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz", "jsonl.zst"])
def test_fault_19_lines_that_are_too_long_are_counted(tmp_path, suffix, monkeypatch):
    monkeypatch.setattr(data.sources, "BLOCK", 64)
    monkeypatch.setattr(data.sources, "LONGEST", 1000)
    fits = 1000 - len('{"text": ""}\n')  # a line of 1000 bytes
    lengths = [5, fits, fits + 1, 20, 5000, 100_000, 30, fits + 1, 7, 2000]
    lines = [json.dumps({"text": str(number % 10) * length}) for number, length in enumerate(lengths)]
    path = tmp_path / f"a.{suffix}"
    raw = "\n".join(lines).encode()  # none behind the last
    path.write_bytes({"gz": gzip.compress, "zst": zstandard.compress}.get(suffix[6:], bytes)(raw))
    texts, skipped = read(Corpus("jsonl", str(path)))
    short = [number for number, length in enumerate(lengths) if length <= fits]
    assert texts == [str(number) * lengths[number] for number in short]
    assert skipped.counts == {"too_long": 5}
    assert skipped.first["too_long"] == [f"{path}:{number + 1}" for number in (2, 4, 5, 7, 9)]
    every = list(blocks(Corpus("jsonl", str(path))))
    for number, block in enumerate(every):
        assert list(blocks(Corpus("jsonl", str(path)), block.end)) == every[number + 1 :]
        assert len(block.content) <= 64 + 1001


def test_fault_19_a_document_that_is_too_long_takes_no_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(data.sources, "BLOCK", 1 << 16)
    monkeypatch.setattr(data.sources, "LONGEST", 1 << 20)
    line = b'{"text": "one"}\n{"text": "' + b"a" * 50_000_000 + b'"}\n{"text": "two"}\n'
    for number, text in enumerate((b"a" * (1 << 20), b"a" * 50_000_000)):
        (tmp_path / f"{number}.txt.gz").write_bytes(gzip.compress(text, 1))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(line, 1))
    table = pyarrow.table({"text": ["one", "a" * ((1 << 20) + 1), "two"]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    del line, table
    read(Corpus("jsonl", str(tmp_path / "a.jsonl.gz")))  # whatever is imported
    for source, path, expected, most in (
        ("jsonl", "a.jsonl.gz", ["one", "two"], 6),
        ("text", "*.txt.gz", ["a" * (1 << 20)], 6),
        ("parquet", "a.parquet", ["one", "two"], 12),
    ):
        tracemalloc.start()
        texts, skipped = read(Corpus(source, str(tmp_path / path)))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert (texts, skipped.counts) == (expected, {"too_long": 1})
        assert peak < most << 20, source


def test_a_small_zst_file_of_much_text(tmp_path):
    """It takes 4 bytes for 128 KiB of one character."""
    compressor = zstandard.ZstdCompressor().compressobj()
    text = b"".join(compressor.compress(b"a" * 1_000_000) for _ in range(400)) + compressor.flush()
    path = tmp_path / "a.txt.zst"
    path.write_bytes(text)
    tracemalloc.start()
    with open(path, "rb") as raw, data.sources.decompressed(path, raw) as file:
        size = sum(len(part) for part in iter(lambda: file.read(1 << 20), b""))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert size == 400_000_000 and peak < 100_000_000


@pytest.fixture
def folder_for_all():
    """Not in `tmp_path`, which is for its owner alone."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    for path in [folder, *sorted(folder.rglob("*"))]:
        if path.is_dir():
            path.chmod(0o755)
    shutil.rmtree(folder)


@contextlib.contextmanager
def without_rights():
    """Root may read everything."""
    os.seteuid(65534 if os.getuid() == 0 else os.getuid())
    try:
        yield
    finally:
        os.seteuid(os.getuid())


def test_folders_that_cannot_be_read_are_named(folder_for_all):
    root = folder_for_all
    for name in ("a", "a/b", "a/b/.hidden", "lost+found"):
        (root / name).mkdir()
        (root / name / "x.txt").write_text(name)
    for name in ("a/b/.hidden", "lost+found"):  # where no pattern looks that does not name them
        (root / name).chmod(0)
    with without_rights():
        for pattern in ("**/*.txt", "a/*/x.txt", "a/b/*", "*/*.txt"):
            assert files(Corpus("text", f"{root}/{pattern}")), pattern
    for mode in (0, 0o444, 0o111):  # 0o444: names, but no files; 0o111: files, but no names
        (root / "a/b").chmod(mode)
        with without_rights():
            for pattern in ("**/*.txt", "a/b/*.txt", "a/*/x.txt", "a/**"):
                if (mode, pattern) == (0o111, "a/*/x.txt"):
                    assert files(Corpus("text", f"{root}/{pattern}")) == [root / "a/b/x.txt"]
                    continue
                with pytest.raises(DataError, match=r"a/b.* cannot be read: Permission denied\. Make it readable"):
                    files(Corpus("text", f"{root}/{pattern}"))
    (root / "a/b").chmod(0)
    with without_rights(), pytest.raises(DataError, match=r"a/b cannot be read"):
        files(Corpus("huggingface", str(root / "a")))


def test_a_broken_link_is_named(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "b.txt").symlink_to(tmp_path / "nothing")
    with pytest.raises(DataError, match=r"b\.txt is a broken link"):
        files(Corpus("text", f"{tmp_path}/**/*.txt"))
    (tmp_path / "b.txt").unlink()
    (tmp_path / "loop.txt").symlink_to(tmp_path / "loop.txt")
    assert files(Corpus("text", f"{tmp_path}/**/*.txt")) == [tmp_path / "a.txt"]
