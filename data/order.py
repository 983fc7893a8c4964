"""The order of training: which sequence comes i-th is a pure function of a seed, the stages and i. Nothing is shuffled,
stored or restored."""

import hashlib
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import isqrt

from powertrain.data import DataError
from powertrain.data.mixture import SLOTS, Mixture, mixture_of

MASK = (1 << 64) - 1
ROUNDS = 6  # with 4, the orders of five or six sequences are not all equally likely


def permute(index: int, size: int, key: int) -> int:
    """The image of `index` under a pseudo-random permutation of range(size), chosen by the 64-bit `key`.

    A Feistel network on a grid of a × b ≥ size cells, repeated while its output is outside range(size) (cycle walking).
    The grid is at most one column larger than size, so repeats are rare; memory and time do not depend on size.
    """
    assert 0 <= index < size
    a = isqrt(size - 1) + 1
    b = -(-size // a)
    while True:
        high, low = divmod(index, b)
        salt = key
        for _ in range(ROUNDS):
            salt += 0x9E3779B97F4A7C15
            high = (high + _mix(low * 0xD1342543DE82EF95 ^ salt)) % a
            salt += 0x9E3779B97F4A7C15
            low = (low + _mix(high * 0xD1342543DE82EF95 ^ salt)) % b
        index = high * b + low
        if index < size:
            return index


def _mix(x: int) -> int:
    """splitmix64's finaliser: every input bit changes every output bit with probability near a half."""
    x &= MASK
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & MASK
    x = (x ^ x >> 27) * 0x94D049BB133111EB & MASK
    return x ^ x >> 31


@dataclass(frozen=True)
class Stage:
    """From sequence number `start` on, corpora are drawn in proportion to the weights of `mixture` (name → weight)."""

    start: int
    mixture: Mapping[str, float]


@dataclass(frozen=True)
class Order:
    """The order of all sequences. `sequences`: corpus → how many sequences it has.

    A corpus continues across stages, and starts a new epoch, in another order, when all its sequences were used. So a
    later stage or another corpus changes nothing before it.

    Raises:
        DataError: stages do not start at 0 or do not ascend, a mixture names a corpus without a sequence, or
            `mixture_of` refuses a weight.
    """

    seed: int
    stages: Sequence[Stage]
    sequences: Mapping[str, int]
    _starts: list[int] = field(init=False, repr=False, compare=False)
    _mixtures: list[Mixture] = field(init=False, repr=False, compare=False)
    _before: list[dict[str, int]] = field(init=False, repr=False, compare=False)  # sequences before each stage

    def __post_init__(self) -> None:
        starts = [stage.start for stage in self.stages]
        if not starts or starts[0] != 0 or sorted(set(starts)) != starts:
            raise DataError(
                f"Stages start at sequences {starts}; the first must start at 0, and each later one after the previous."
            )
        for name in sorted({name for stage in self.stages for name in stage.mixture}):
            if self.sequences.get(name, 0) < 1:
                raise DataError(
                    f"A mixture names the corpus {name!r}, which has {self.sequences.get(name, 0)} sequences; the "
                    f"corpora are {sorted(self.sequences)}. Name one of these, or give it more text than one sequence."
                )
        mixtures = [mixture_of(stage.mixture) for stage in self.stages]
        before: list[dict[str, int]] = [{}]
        for mixture, start, end in zip(mixtures, starts, starts[1:], strict=False):
            before.append(_add(before[-1], mixture.counts(end - start)))
        for name, value in (("_starts", starts), ("_mixtures", mixtures), ("_before", before)):
            object.__setattr__(self, name, value)

    def sequence(self, i: int) -> tuple[str, int]:
        """(corpus, index of the sequence in it) of sequence number i ≥ 0 of training; costs the same for every i."""
        stage = bisect_right(self._starts, i) - 1
        mixture = self._mixtures[stage]
        cycles, slot = divmod(i - self._starts[stage], SLOTS)
        corpus, earlier = mixture.at(slot)
        cursor = self._before[stage].get(corpus, 0) + cycles * mixture.slots[corpus] + earlier
        size = self.sequences[corpus]
        epoch, position = divmod(cursor, size)
        return corpus, permute(position, size, _key(self.seed, corpus, epoch))

    def counts(self, i: int) -> dict[str, int]:
        """Corpus → how many of the first i sequences are its own; without corpora that no stage has had so far."""
        stage = bisect_right(self._starts, i) - 1
        return _add(self._before[stage], self._mixtures[stage].counts(i - self._starts[stage]))


def epochs(stages: Sequence[Stage], sequences: Mapping[str, int], samples: int) -> dict[str, float]:
    """Epochs of each corpus of `sequences` in the first `samples` sequences.

    Raises:
        DataError: as `Order` does.
    """
    unknown = {name: 1 for stage in stages for name in stage.mixture if name not in sequences}
    counts = Order(0, stages, {**sequences, **unknown}).counts(samples)
    return {name: counts.get(name, 0) / count for name, count in sequences.items()}


def _add(a: Mapping[str, int], b: Mapping[str, int]) -> dict[str, int]:
    return {name: a.get(name, 0) + b.get(name, 0) for name in sorted({*a, *b})}


def _key(seed: int, corpus: str, epoch: int) -> int:
    # Not hash(), which differs between processes.
    return int.from_bytes(hashlib.blake2b(f"{seed}/{epoch}/{corpus}".encode(), digest_size=8).digest(), "little")
