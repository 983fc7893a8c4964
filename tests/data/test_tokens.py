import hashlib
import itertools
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest

from powertrain import data
from powertrain.data import DataError
from powertrain.data.tokens import TokenFile, TokenWriter, dtype_for

DOCUMENTS = [[5, 6, 7, 0], [8, 0], [9], [], [1, 2, 3, 4, 5, 0]]
TOKENS = list(itertools.chain(*DOCUMENTS))


def write(prefix: Path, documents=DOCUMENTS, dtype=np.uint16) -> TokenFile:
    with TokenWriter(prefix, dtype) as writer:
        for document in documents:
            writer.add(document)
    return TokenFile(prefix)


def write_raw(
    prefix: Path, lengths, pointers, documents, tokens, magic=b"MMIDIDX\x00\x00", version=1, code=8, extra=b""
):
    """A pair of files straight from the format's description."""
    index = magic + struct.pack("<QBQQ", version, code, len(lengths), len(documents))
    index += struct.pack(f"<{len(lengths)}i", *lengths) + struct.pack(f"<{len(pointers)}q", *pointers)
    prefix.with_suffix(".idx").write_bytes(index + struct.pack(f"<{len(documents)}q", *documents) + extra)
    prefix.with_suffix(".bin").write_bytes(struct.pack(f"<{len(tokens)}H", *tokens))


def read_raw(prefix: Path) -> list[list[int]]:
    """The documents, by a reader that shares nothing with the one under test."""
    index, tokens = prefix.with_suffix(".idx").read_bytes(), prefix.with_suffix(".bin").read_bytes()
    assert index[:9] == b"MMIDIDX\x00\x00"
    version, code, sequences, indices = struct.unpack_from("<QBQQ", index, 9)
    assert version == 1 and len(index) == 34 + 12 * sequences + 8 * indices
    lengths = struct.unpack_from(f"<{sequences}i", index, 34)
    pointers = struct.unpack_from(f"<{sequences}q", index, 34 + 4 * sequences)
    documents = struct.unpack_from(f"<{indices}q", index, 34 + 12 * sequences)
    letter = {1: "B", 2: "b", 3: "h", 4: "i", 5: "q", 8: "H"}[code]
    read = [list(struct.unpack_from(f"<{n}{letter}", tokens, p)) for n, p in zip(lengths, pointers, strict=True)]
    return [list(itertools.chain(*read[a:b])) for a, b in itertools.pairwise(documents)]


@pytest.mark.parametrize("dtype", ["uint8", "int8", "int16", "int32", "int64", "uint16"])
def test_round_trip(tmp_path, dtype):
    file = write(tmp_path / "a", dtype=dtype)
    assert read_raw(tmp_path / "a") == DOCUMENTS
    assert file.tokens.dtype == dtype and file.tokens.tolist() == TOKENS
    assert (file.num_tokens, file.num_documents) == (13, 5)
    assert file.document_starts.tolist() == [0, 4, 6, 7, 7]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.bin", "a.idx"]
    file.check(10)


def test_starts_between_agrees_with_all_starts(tmp_path):
    lengths = np.random.default_rng(0).integers(0, 5, size=60)
    file = write(tmp_path / "a", [[1] * n for n in lengths])
    starts = file.document_starts
    for begin in range(file.num_tokens + 2):
        for end in range(begin, file.num_tokens + 2):
            assert file.starts_between(begin, end).tolist() == [s for s in starts if begin <= s < end]


def test_several_sequences_a_document_and_documents_without_any(tmp_path):
    write_raw(tmp_path / "a", [2, 1, 3], [0, 4, 6], [0, 2, 2, 3, 3], [1, 2, 3, 4, 5, 6])
    file = TokenFile(tmp_path / "a")
    file.check(7)
    assert file.document_starts.tolist() == [0, 3, 3, 6]
    assert file.starts_between(3, 7).tolist() == [3, 3, 6]


def test_a_file_without_documents(tmp_path):
    file = write(tmp_path / "a", [])
    assert (file.num_tokens, file.num_documents) == (0, 0) and file.document_starts.size == 0
    file.check(1)


def test_the_dtype_is_megatrons():
    assert [dtype_for(size).name for size in (4096, 65499, 65500, 100_000)] == ["uint16", "uint16", "int32", "int32"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"magic": b"WRONGIDX\x00"}, "does not start with"),
        ({"version": 2}, "version 2"),
        ({"code": 7}, "float32"),
        ({"code": 99}, "dtype code 99"),
        ({"extra": b"\0\0"}, "multimodal"),
        ({"extra": b"\0"}, "damaged"),
        ({"documents": [0, 1]}, "document indices"),
        ({"tokens": [1, 2, 3]}, "truncated"),
        ({"tokens": [1, 2, 3, 4, 5]}, "another corpus"),
    ],
)
def test_fault_20_what_is_wrong_is_named_at_opening(tmp_path, change, words):
    good = {"lengths": [2, 2], "pointers": [0, 4], "documents": [0, 1, 2], "tokens": [1, 2, 3, 4]}
    write_raw(tmp_path / "a", **good)
    TokenFile(tmp_path / "a")
    write_raw(tmp_path / "a", **{**good, **change})
    with pytest.raises(DataError, match=words) as error:
        TokenFile(tmp_path / "a")
    assert str(tmp_path / "a") in str(error.value)


@pytest.mark.parametrize("name", ["a.bin", "a.idx"])
def test_fault_20_truncated_or_missing_files(tmp_path, name):
    write(tmp_path / "a")
    path = tmp_path / name
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match=name):
        TokenFile(tmp_path / "a")
    path.write_bytes(b"")
    with pytest.raises(DataError, match=r"a\.idx|a\.bin"):
        TokenFile(tmp_path / "a")
    path.unlink()
    with pytest.raises(DataError, match=f"{name} does not exist"):
        TokenFile(tmp_path / "a")


@pytest.mark.parametrize(("document", "token", "bad"), [(0, 0, 100), (2, 0, 100), (4, 5, 65535), (4, 0, -1)])
def test_fault_20_check_names_document_and_token(tmp_path, document, token, bad, monkeypatch):
    monkeypatch.setattr(data.tokens, "SCAN", 3)
    documents = [list(d) for d in DOCUMENTS]
    documents[document][token] = bad
    file = write(tmp_path / "a", documents, np.int32)
    with pytest.raises(DataError, match=rf"a\.bin, document {document}: token id {bad} .* vocabulary of 100"):
        file.check(100)


@pytest.mark.parametrize("pointers", [[0, 6, 4, 8], [0, 2, 2, 8], [2, 4, 6, 8]])
def test_sequences_with_gaps_or_out_of_order_are_refused(tmp_path, pointers, monkeypatch):
    write_raw(tmp_path / "a", [2, 1, 1, 1], pointers, [0, 1, 2, 3, 4], [1, 2, 3, 4, 5])
    for scan in (1, 2, 100):
        monkeypatch.setattr(data.tokens, "SCAN", scan)
        with pytest.raises(DataError, match="contiguous"):
            TokenFile(tmp_path / "a").check(100)


def test_documents_out_of_order_are_refused(tmp_path):
    write_raw(tmp_path / "a", [1, 1, 1], [0, 2, 4], [0, 2, 1, 3], [1, 2, 3])
    with pytest.raises(DataError, match="order"):
        TokenFile(tmp_path / "a").check(100)


def test_an_error_while_writing_leaves_what_was_there(tmp_path):
    write(tmp_path / "a")
    with pytest.raises(DataError, match="document 1: token ids from 70000"):
        write(tmp_path / "a", [[1], [70000]])
    assert read_raw(tmp_path / "a") == DOCUMENTS
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.bin", "a.idx"]


def test_pickled_files_open_again(tmp_path):
    file = write(tmp_path / "a")
    assert pickle.loads(pickle.dumps(file)).tokens.tolist() == file.tokens.tolist()
    assert len(pickle.dumps(file)) < 1000


def test_fingerprint_follows_content_not_name(tmp_path, monkeypatch):
    first = write(tmp_path / "a").fingerprint()
    assert write(tmp_path / "b").fingerprint() == first
    other = write(tmp_path / "b", [*DOCUMENTS[:-1], [1, 2, 3, 4, 6, 0]]).fingerprint()
    split_elsewhere = write(tmp_path / "c", [TOKENS]).fingerprint()
    assert len({first, other, split_elsewhere}) == 3
    raw = [Path(f"{tmp_path}/a.{suffix}").read_bytes() for suffix in ("idx", "bin")]
    assert first == hashlib.sha256(b"".join(len(part).to_bytes(8, "little") + part for part in raw)).hexdigest()
    assert write(tmp_path / "a").sampled_fingerprint() == first  # of a file that is not large

    monkeypatch.setattr(data.tokens, "BLOCK", 16)
    monkeypatch.setattr(data.tokens, "SAMPLED_BLOCKS", 4)
    long = [[7] * 1000]
    file = write(tmp_path / "d", long)
    whole, sampled = file.fingerprint(), file.sampled_fingerprint()
    # In the first, an inner and the last block of those that were sampled, and in none of them.
    for place, in_sample in ((0, True), (335, True), (999, True), (500, False), (20, False)):
        changed = [list(long[0])]
        changed[0][place] = 8
        file = write(tmp_path / "e", changed)
        assert file.fingerprint() != whole
        assert (file.sampled_fingerprint() != sampled) == in_sample
    assert write(tmp_path / "e", [[7] * 1001]).fingerprint() != whole
