"""Which window is sample i: a pure function of a seed, the stages and i. Nothing is shuffled, stored or restored."""

import hashlib
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import isqrt

from powertrain.data import DataError
from powertrain.data.mixture import SLOTS, Mixture, mixture_of

MASK = (1 << 64) - 1
ROUNDS = 6  # with 4, orders of five or six windows are not all equally likely


def permute(index: int, size: int, key: int) -> int:
    """Where a pseudo-random permutation of range(size), chosen by the 64-bit `key`, sends `index`.

    A Feistel network on a grid of a × b ≥ size cells. The grid is at most one column larger than size, so that walking
    on from a cell outside ends at once on average; memory and time do not depend on size.
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
    """From sample `start` on, corpora are drawn in proportion to the weights of `mixture` (name → weight)."""

    start: int
    mixture: Mapping[str, float]


@dataclass(frozen=True)
class Order:
    """The order of all samples. `windows`: corpus → its number of windows.

    A corpus goes on where it was when a stage begins, and starts a new epoch, in another order, when all its windows
    were used. So a later stage or another corpus changes nothing before it. Stages that do not start at 0 or do not
    ascend, and corpora without windows, are DataErrors.
    """

    seed: int
    stages: Sequence[Stage]
    windows: Mapping[str, int]
    _starts: list[int] = field(init=False, repr=False, compare=False)
    _mixtures: list[Mixture] = field(init=False, repr=False, compare=False)
    _before: list[dict[str, int]] = field(init=False, repr=False, compare=False)  # samples before each stage

    def __post_init__(self) -> None:
        starts = [stage.start for stage in self.stages]
        if not starts or starts[0] != 0 or sorted(set(starts)) != starts:
            raise DataError(
                f"Stages start at samples {starts}; the first must start at 0 and each later one after the one before."
            )
        for name in sorted({name for stage in self.stages for name in stage.mixture}):
            if self.windows.get(name, 0) < 1:
                raise DataError(
                    f"A mixture names the corpus {name!r}, which has {self.windows.get(name, 0)} windows; the corpora "
                    f"are {sorted(self.windows)}. Name one of these, or give it more text than one sequence."
                )
        mixtures = [mixture_of(stage.mixture) for stage in self.stages]
        before: list[dict[str, int]] = [{}]
        for mixture, start, end in zip(mixtures, starts, starts[1:], strict=False):
            before.append(_add(before[-1], mixture.counts(end - start)))
        for name, value in (("_starts", starts), ("_mixtures", mixtures), ("_before", before)):
            object.__setattr__(self, name, value)

    def sample(self, i: int) -> tuple[str, int]:
        """(corpus, window) of sample i ≥ 0; costs the same for every i."""
        stage = bisect_right(self._starts, i) - 1
        mixture = self._mixtures[stage]
        cycles, slot = divmod(i - self._starts[stage], SLOTS)
        corpus, earlier = mixture.at(slot)
        cursor = self._before[stage].get(corpus, 0) + cycles * mixture.slots[corpus] + earlier
        windows = self.windows[corpus]
        epoch, position = divmod(cursor, windows)
        return corpus, permute(position, windows, _key(self.seed, corpus, epoch))

    def counts(self, i: int) -> dict[str, int]:
        """Corpus → how many of the samples before i are its own; corpora not seen in a stage so far are left out."""
        stage = bisect_right(self._starts, i) - 1
        return _add(self._before[stage], self._mixtures[stage].counts(i - self._starts[stage]))


def epochs(stages: Sequence[Stage], windows: Mapping[str, int], samples: int) -> dict[str, float]:
    """How often so many samples go through each corpus; one that `windows` does not have is left out.

    DataErrors: as those of an `Order`.
    """
    unknown = {name: 1 for stage in stages for name in stage.mixture if name not in windows}
    counts = Order(0, stages, {**windows, **unknown}).counts(samples)
    return {name: counts.get(name, 0) / count for name, count in windows.items()}


def _add(a: Mapping[str, int], b: Mapping[str, int]) -> dict[str, int]:
    return {name: a.get(name, 0) + b.get(name, 0) for name in sorted({*a, *b})}


def _key(seed: int, corpus: str, epoch: int) -> int:
    # Not hash(), which differs from process to process.
    return int.from_bytes(hashlib.blake2b(f"{seed}/{epoch}/{corpus}".encode(), digest_size=8).digest(), "little")
