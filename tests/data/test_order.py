import time
from collections import Counter

import numpy as np
import pytest

from powertrain.data import DataError
from powertrain.data.order import Order, Stage, epochs, permute


@pytest.mark.parametrize("size", [*range(1, 70), 127, 128, 255, 256, 257, 1000, 4096, 4097, 10_007])
def test_permute_is_a_bijection(size):
    for key in (0, 1, 2**64 - 1):
        assert sorted(permute(i, size, key) for i in range(size)) == list(range(size))


def test_keys_give_different_and_fair_permutations():
    size, keys = 20, 4000
    table = np.array([[permute(i, size, key) for i in range(size)] for key in range(keys)])
    assert len({tuple(row) for row in table}) == keys
    expected = keys / size
    for i in range(size):  # every place is equally likely: chi-square with 19 degrees of freedom stays below 53
        counts = np.bincount(table[:, i], minlength=size)
        assert ((counts - expected) ** 2 / expected).sum() < 53
    follows = np.bincount((table[:, 1:] - table[:, :-1]).ravel() % size, minlength=size)
    expected = keys * (size - 1) / (size - 1)  # neighbours are as likely to be any distance apart
    assert follows[0] == 0 and ((follows[1:] - expected) ** 2 / expected).sum() < 52


def test_all_orders_of_a_small_range_are_equally_likely():
    counts = Counter(tuple(permute(i, 3, key) for i in range(3)) for key in range(6000))
    assert len(counts) == 6 and all(850 < count < 1150 for count in counts.values())


def test_large_ranges_are_spread_evenly_at_constant_cost():
    for size in (2**60, 2**62, 2**61 - 1):
        begin = time.perf_counter()
        places = [permute(i, size, 7) for i in range(2000)]
        assert (time.perf_counter() - begin) / 2000 < 200e-6  # about 8 µs on a quiet machine
        assert len(set(places)) == 2000 and max(places) < size
        counts = np.histogram(places, bins=20, range=(0, size))[0]
        assert ((counts - 100) ** 2 / 100).sum() < 53


ORDER = Order(3, [Stage(0, {"a": 3, "b": 1}), Stage(1000, {"b": 1, "c": 1})], {"a": 11, "b": 7, "c": 5})


def test_every_epoch_covers_each_sequence_once():
    seen: dict[str, list[int]] = {"a": [], "b": [], "c": []}
    for i in range(2000):
        corpus, index = ORDER.sequence(i)
        seen[corpus].append(index)
    for corpus, sequences in seen.items():
        size = ORDER.sequences[corpus]
        epochs = [tuple(sequences[k : k + size]) for k in range(0, len(sequences) - size + 1, size)]
        assert len(epochs) > 20
        assert all(sorted(epoch) == list(range(size)) for epoch in epochs)
        assert len(set(epochs)) > len(epochs) * 0.6  # each in another order, of 5! = 120 for the smallest


def test_counts_are_those_of_the_samples_before():
    running: Counter[str] = Counter()
    for i in range(1500):
        assert {name: n for name, n in ORDER.counts(i).items() if n} == dict(running)
        running[ORDER.sequence(i)[0]] += 1


def test_a_later_stage_or_another_corpus_changes_nothing_before():
    first = Order(3, ORDER.stages[:1], {"a": 11, "b": 7})
    third = Order(3, [*ORDER.stages, Stage(1500, {"d": 1})], {**ORDER.sequences, "d": 2})
    samples = [ORDER.sequence(i) for i in range(1500)]
    assert [first.sequence(i) for i in range(1000)] == samples[:1000]
    assert [third.sequence(i) for i in range(1500)] == samples
    assert [third.sequence(i)[0] for i in range(1500, 1510)] == ["d"] * 10
    # b's own order is the same whatever it is mixed with.
    alone = Order(3, [Stage(0, {"b": 1})], {"b": 7})
    b = [index for corpus, index in samples if corpus == "b"]
    assert [alone.sequence(i)[1] for i in range(len(b))] == b


def test_the_order_is_the_same_in_every_process_and_version():
    assert [ORDER.sequence(i) for i in (0, 1, 2, 999, 1000, 10**15)] == [
        ("a", 8),
        ("a", 6),
        ("a", 1),
        ("b", 5),
        ("b", 1),
        ("b", 2),
    ]
    assert Order(4, ORDER.stages, ORDER.sequences).sequence(10**15) != ORDER.sequence(10**15)


def test_shares_hold_far_out():
    counts = ORDER.counts(10**12)
    assert abs(counts["c"] - (10**12 - 1000) / 2) < 1
    assert sum(counts.values()) == 10**12


def test_epochs_are_passes_through_a_corpus():
    stages = [Stage(0, {"a": 3, "b": 1}), Stage(400, {"c": 1})]
    assert epochs(stages, {"a": 100, "b": 200, "d": 5}, 500) == {"a": 3.0, "b": 0.5, "d": 0.0}
    assert epochs(stages, {"a": 100, "c": 50}, 500) == {"a": 3.0, "c": 2.0}


@pytest.mark.parametrize("starts", [[], [1], [0, 0], [0, 5, 4]])
def test_stages_must_start_at_zero_and_ascend(starts):
    with pytest.raises(DataError, match="Stages start at"):
        Order(0, [Stage(start, {"a": 1}) for start in starts], {"a": 1})


@pytest.mark.parametrize("sequences", [{}, {"a": 0}])
def test_a_corpus_without_a_sequence_is_refused(sequences):
    with pytest.raises(DataError, match="'a'"):
        Order(0, [Stage(0, {"a": 1})], sequences)
