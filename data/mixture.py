"""Weights of corpora to a cycle of slots in which every prefix is within one sequence of each corpus's share."""

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from heapq import heapify, heappop, heappush
from math import isfinite
from typing import Any

import numpy as np
import numpy.typing as npt

from powertrain.data import DataError

SLOTS = 65536


@dataclass(frozen=True)
class Mixture:
    """One cycle of sequences. `slots`: corpus → its slots of the 65,536. For every k and every corpus, the first k
    sequences have share·k of it, within less than one sequence (share = slots / 65,536)."""

    slots: dict[str, int]
    _names: list[str]
    _cycle: npt.NDArray[Any]  # (SLOTS,) index into _names
    _earlier: npt.NDArray[np.uint16]  # (SLOTS,) how many slots before this one are of the same corpus
    _positions: list[npt.NDArray[np.uint16]]  # per corpus, ascending

    def at(self, slot: int) -> tuple[str, int]:
        """(corpus of the slot, how many slots before it in the cycle are of the same corpus)."""
        return self._names[self._cycle[slot]], int(self._earlier[slot])

    def counts(self, k: int) -> dict[str, int]:
        """Corpus → how many of the first k sequences are its own, k ≥ 0; the cycle repeats."""
        cycles, slot = divmod(k, SLOTS)
        return {
            name: cycles * self.slots[name] + int(np.searchsorted(positions, slot))
            for name, positions in zip(self._names, self._positions, strict=True)
        }


def mixture_of(weights: Mapping[str, float]) -> Mixture:
    """The cycle for `weights`: corpus → weight > 0. Only the ratios of the weights matter, not the order of names.

    Raises:
        DataError: a weight is not a positive number, or too small for a single slot.
    """
    return _mixture(tuple(sorted(weights.items())))


@lru_cache(maxsize=64)
def _mixture(weights: tuple[tuple[str, float], ...]) -> Mixture:
    slots = _slots(weights)
    names = list(slots)
    cycle = _cycle(list(slots.values()))
    positions = [np.flatnonzero(cycle == corpus).astype(np.uint16) for corpus in range(len(names))]
    earlier = np.empty(SLOTS, dtype=np.uint16)
    for own in positions:
        earlier[own] = np.arange(len(own))
    return Mixture(slots, names, cycle, earlier, positions)


def _slots(weights: tuple[tuple[str, float], ...]) -> dict[str, int]:
    """Corpus → slots, by largest remainder in exact arithmetic."""
    if not weights:
        raise DataError("A mixture names no corpus. Give at least one name with a weight, such as {corpus: 1}.")
    for name, weight in weights:
        if not (isfinite(weight) and weight > 0):
            raise DataError(
                f"The weight of corpus {name!r} is {weight}; it must be above 0. Leave out what is not used."
            )
    total = sum(Fraction(weight) for _, weight in weights)
    quotas = {name: Fraction(weight) * SLOTS / total for name, weight in weights}
    slots = {name: int(quota) for name, quota in quotas.items()}
    left = SLOTS - sum(slots.values())
    for name in sorted(quotas, key=lambda name: (slots[name] - quotas[name], name))[:left]:
        slots[name] += 1
    for name, weight in weights:
        if slots[name] == 0:
            raise DataError(
                f"The weight of corpus {name!r} is {weight} of a total of {float(total)}: less than one sequence in "
                f"{SLOTS}. Raise the weight or leave the corpus out."
            )
    return slots


def _cycle(slots: list[int]) -> npt.NDArray[Any]:
    """The sequence (SLOTS,) of corpus indices: Tijdeman's chairman assignment.

    The j-th slot (from 0) of a corpus with n of the N slots must not come before floor(jN/n), or its count would run
    ahead by a whole sequence, nor after ceil((j+1)N/n) - 1, or it would fall behind by one. Of the corpora that may
    come next, the one with the earliest deadline does. That meets all deadlines if it is possible at all, and it is,
    because the shares add up to one.
    """
    cycle = np.zeros(SLOTS, dtype=np.uint8 if len(slots) <= 256 else np.uint16)
    if len(slots) == 1:
        return cycle
    base = len(slots)
    ready = [-(-SLOTS // n) * base + corpus for corpus, n in enumerate(slots)]  # deadline and corpus in one integer
    heapify(ready)
    waiting: list[list[int]] = [[] for _ in range(SLOTS + 1)]  # by the first slot that an entry may take
    done = [0] * base
    for slot in range(SLOTS):
        for entry in waiting[slot]:
            heappush(ready, entry)
        corpus = heappop(ready) % base
        cycle[slot] = corpus
        done[corpus] = j = done[corpus] + 1
        n = slots[corpus]
        if j < n:
            entry = -(-(j + 1) * SLOTS // n) * base + corpus
            waiting[max(j * SLOTS // n, slot + 1)].append(entry)
    return cycle
