import numpy as np
import pytest
import torch

from powertrain.data import DataError
from powertrain.data.loader import Batches, num_sequences, sequence
from powertrain.data.order import Order, Stage
from powertrain.data.tokens import TokenFile, TokenWriter


def make(path, lengths):
    """Documents of these lengths; token values count up from 1, so that every token is its own offset plus one."""
    offset = 1
    with TokenWriter(path, np.int32) as writer:
        for length in lengths:
            writer.add(range(offset, offset + length))
            offset += length
    return TokenFile(path)


def reference(lengths, index, S):
    """Token by token."""
    flat = [(offset, document) for document, n in enumerate(lengths) for offset in range(n)]
    ids, labels, positions = [], [], []
    position = 0
    for t in range(index * S, index * S + S):
        position = 0 if t == index * S or flat[t][1] != flat[t - 1][1] else position + 1
        ids.append(t + 1)
        positions.append(position)
        labels.append(t + 2 if flat[t + 1][1] == flat[t][1] else -100)
    return ids, labels, positions


@pytest.mark.parametrize(
    "lengths",
    [
        [9],
        [1] * 9,
        [4, 4, 4],  # boundaries at the edges of sequences
        [5, 3, 1, 8],
        [1, 30, 2],  # a document over several sequences
        [0, 3, 0, 0, 5, 0],  # documents of no token
        [4, 0, 4, 1],
    ],
)
def test_sequences_against_a_reference(tmp_path, lengths):
    file = make(tmp_path / "a", lengths)
    for S in (1, 2, 3, 4, 7):
        for index in range(num_sequences(file.num_tokens, S)):
            got = sequence(file, index, S)
            assert [part.tolist() for part in got] == list(reference(lengths, index, S))
            assert all(part.dtype == np.int64 and part.shape == (S,) for part in got)


def test_random_documents_against_a_reference(tmp_path):
    rng = np.random.default_rng(0)
    for trial in range(30):
        lengths = rng.integers(0, 12, size=40).tolist()
        file = make(tmp_path / f"{trial}", lengths)
        S = int(rng.integers(1, 20))
        for index in range(num_sequences(file.num_tokens, S)):
            assert [part.tolist() for part in sequence(file, index, S)] == list(reference(lengths, index, S))


def test_sequences_cover_every_target_once(tmp_path):
    file = make(tmp_path / "a", [6, 1, 10, 4])
    labels = np.concatenate([sequence(file, i, 5)[1] for i in range(num_sequences(21, 5))])
    # 21 tokens make 4 sequences of 5 targets; the first token of a document (1, 7, 8, 18) is never one.
    assert sorted(set(range(1, 22)) - set(labels.tolist())) == [1, 7, 8, 18]


@pytest.mark.parametrize(("tokens", "sequences"), [(5, 1), (8, 1), (9, 2), (10, 2)])
def test_number_of_sequences(tokens, sequences):
    assert num_sequences(tokens, 4) == sequences


@pytest.mark.parametrize("tokens", [0, 1, 4])
def test_fault_21_a_corpus_smaller_than_one_sequence(tokens):
    with pytest.raises(DataError, match=rf"books has {tokens} tokens.*= 5.*shorter sequence_length"):
        num_sequences(tokens, 4, "books")


def test_batches_do_not_depend_on_how_they_are_split(tmp_path):
    files = {"a": make(tmp_path / "a", [7, 20, 3]), "b": make(tmp_path / "b", [40])}
    sequences = {name: num_sequences(file.num_tokens, 4) for name, file in files.items()}
    order = Order(0, [Stage(0, {"a": 1, "b": 2})], sequences)
    batches = Batches(files, order, 4)
    whole = batches.batch(10, 12)
    parts = [batches.batch(10 + k, 3) for k in range(0, 12, 3)]
    for name in ("input_ids", "labels", "position_ids"):
        assert whole[name].shape == (12, 4) and whole[name].dtype == torch.int64
        assert torch.equal(whole[name], torch.cat([part[name] for part in parts]))
    batches.prefetch(10, 12)
    assert torch.equal(batches.batch(13, 3)["input_ids"], parts[1]["input_ids"])
    assert torch.equal(batches.batch(10, 12)["labels"], whole["labels"])
    for row in range(12):
        corpus, index = order.sequence(10 + row)
        assert whole["input_ids"][row].tolist() == sequence(files[corpus], index, 4)[0].tolist()
