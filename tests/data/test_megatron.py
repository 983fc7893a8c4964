"""Token files against megatron-core, which defines the format: what it writes is read, and it reads what is written."""

import itertools
import warnings

import numpy as np
import pytest
import torch

from powertrain.data.tokens import TokenFile, TokenWriter

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it misses what only GPUs have
    indexed_dataset = pytest.importorskip("megatron.core.datasets.indexed_dataset")

# Each document a list of sequences.
DOCUMENTS = [[[5, 6, 7, 0]], [[8, 0], [9, 1, 2]], [[]], [[3, 0]], [], [[], [4, 0]], []]


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_what_megatron_writes_is_read(tmp_path, dtype):
    builder = indexed_dataset.IndexedDatasetBuilder(str(tmp_path / "a.bin"), dtype=dtype)
    for document in DOCUMENTS:
        builder.add_document(torch.tensor(list(itertools.chain(*document))), [len(sequence) for sequence in document])
    builder.finalize(str(tmp_path / "a.idx"))
    file = TokenFile(tmp_path / "a")
    whole = [list(itertools.chain(*document)) for document in DOCUMENTS]
    assert file.tokens.dtype == dtype and file.tokens.tolist() == list(itertools.chain(*whole))
    assert file.document_starts.tolist() == [0, *itertools.accumulate(map(len, whole))][:-1]
    assert file.num_documents == len(DOCUMENTS)
    file.check(10)


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_merged_files_of_megatron_are_read(tmp_path, dtype):
    for name, documents in (("a", [[1, 2], [3]]), ("b", [[4, 5, 6]])):
        builder = indexed_dataset.IndexedDatasetBuilder(str(tmp_path / f"{name}.bin"), dtype=dtype)
        for document in documents:
            builder.add_item(torch.tensor(document))
            builder.end_document()
        builder.finalize(str(tmp_path / f"{name}.idx"))
    merged = indexed_dataset.IndexedDatasetBuilder(str(tmp_path / "m.bin"), dtype=dtype)
    for name in ("a", "b"):
        merged.add_index(str(tmp_path / name))
    merged.finalize(str(tmp_path / "m.idx"))
    file = TokenFile(tmp_path / "m")
    assert file.tokens.tolist() == [1, 2, 3, 4, 5, 6] and file.document_starts.tolist() == [0, 2, 3]
    file.check(7)


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_megatron_reads_what_is_written(tmp_path, dtype):
    documents = [[5, 6, 7, 0], [8, 0], [9], [], [1, 2, 3, 4, 5, 0], []]
    with TokenWriter(tmp_path / "a", dtype) as writer:
        for document in documents:
            writer.add(document)
    theirs = indexed_dataset.IndexedDataset(str(tmp_path / "a"))
    assert [theirs[number].tolist() for number in range(len(theirs))] == documents
    assert all(theirs[number].dtype == dtype for number in range(len(theirs)))
    assert theirs.sequence_lengths.tolist() == [len(document) for document in documents]
    assert theirs.document_indices.tolist() == list(range(len(documents) + 1))
