import random
import time

import numpy as np
import pytest

from powertrain.data import DataError
from powertrain.data.mixture import SLOTS, mixture_of


def corpora(mixture, count=SLOTS):
    return [mixture.at(slot)[0] for slot in range(count)]


@pytest.mark.parametrize("number", [1, 2, 3, 5, 10, 25, 50])
def test_every_prefix_is_within_one_sequence_of_every_share(number):
    rng = random.Random(number)
    begin = time.process_time()
    mixture = mixture_of({f"corpus{i}": rng.random() ** 3 + 1e-4 for i in range(number)})
    assert time.process_time() - begin < 3  # about 0.07 s on a quiet machine
    order = np.array(corpora(mixture))
    k = np.arange(1, SLOTS + 1)
    for name, slots in mixture.slots.items():
        count = np.cumsum(order == name)
        assert np.abs(count * SLOTS - slots * k).max() < SLOTS  # |count - share·k| < 1, in integers
        assert count[-1] == slots


def test_slots_are_the_nearest_to_the_weights():
    weights = {"a": 0.7, "b": 0.2, "c": 0.1}
    slots = mixture_of(weights).slots
    assert sum(slots.values()) == SLOTS
    assert all(abs(slots[name] - weight * SLOTS) < 1 for name, weight in weights.items())
    assert mixture_of({"a": 1, "b": 1, "c": 1}).slots == {"a": 21846, "b": 21845, "c": 21845}


def test_only_ratios_and_names_matter():
    a, b = mixture_of({"x": 1, "y": 3, "z": 4}), mixture_of({"z": 8.0, "x": 2.0, "y": 6.0})
    assert corpora(a) == corpora(b) and a.slots == b.slots


def test_two_equal_corpora_alternate():
    order = corpora(mixture_of({"a": 1, "b": 1}), 100)
    assert all(set(order[i : i + 2]) == {"a", "b"} for i in range(0, 100, 2))


def test_counts_and_ranks_agree_with_the_sequence():
    mixture = mixture_of({"a": 5, "b": 2, "c": 1})
    order = corpora(mixture)
    for k in [*range(50), 1000, SLOTS - 1]:
        assert mixture.counts(k) == {name: order[:k].count(name) for name in "abc"}
        assert mixture.at(k) == (order[k], order[:k].count(order[k]))
    assert mixture.counts(3 * SLOTS + 7) == {n: 3 * mixture.slots[n] + order[:7].count(n) for n in "abc"}


def test_more_corpora_than_a_byte_counts():
    mixture = mixture_of({f"{i:03}": 1 for i in range(300)})
    assert len(set(corpora(mixture, 600))) == 300


@pytest.mark.parametrize("weight", [0, -1, float("nan"), float("inf"), 1e-9])
def test_invalid_weights_are_refused(weight):
    with pytest.raises(DataError, match=r"'tiny'.*[Ll]eave"):
        mixture_of({"a": 1, "tiny": weight})


def test_an_empty_mixture_is_refused():
    with pytest.raises(DataError, match="no corpus"):
        mixture_of({})
