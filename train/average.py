"""A running average of the weights, whose window is a share of the tokens seen."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import torch

from powertrain.train.engine import Engine, Read


def newest_weight(window: float, new: int, tokens: int) -> float:
    """k in average ← average + k · (weights − average), after a step.

    The weights after step i, at T_i tokens, count (T_i / T)^c − (T_(i−1) / T)^c in the average at T tokens. These sum
    to 1 and are the same however the tokens are divided into steps (a batch may grow). They depend on T alone: on no
    horizon, and with no bias at the beginning that has to be corrected. From one step to the next they all shrink by
    (1 − new / T)^c, so k = 1 − (1 − new / T)^c. It is 1 at the first step, and about c · new / T later.

    c = 2 / window − 1 gives the average the mean age of a plain mean over the last `window` · T tokens, which is half
    of them: ∫ (1 − t) c t^(c−1) dt = 1 / (c + 1) = window / 2. It averages over about as many steps, too: of N equal
    ones 1 / Σ w_i² is (2 c − 1) / c² · N, which is 0.102 N for a window of 0.1. With a window of 1 it is the plain mean
    of all weights so far.

    It is the power function of arXiv 2312.02696 (γ = c − 1), whose width is given there as a standard deviation.

    Args:
        window: share of the tokens seen, above 0 to 1.
        new: tokens of the step.
        tokens: T, those of the run up to the end of this step.
    """
    return 1.0 if new >= tokens else -math.expm1((2 / window - 1) * math.log1p(-new / tokens))


class Average:
    """The average of what this rank keeps of the weights: float32, 4 bytes a parameter, where the masters are.

    It begins with the present weights, which then stand for all earlier ones, or with what `read` has. With
    k = 0.0002, a hundred thousand steps into a run with a window of 0.1, float32 holds it to about 3e-4 of a weight.

    Attributes:
        window: see `newest_weight`.
        values: by parameter name, (stop − start,): the average of the engine's fragment of it.
    """

    def __init__(self, engine: Engine, window: float, read: Read | None) -> None:
        self.window = window
        self._engine = engine
        fragments = engine.fragments()
        self.values = {name: fragment.master.clone() for name, fragment in fragments.items()}
        if read is not None:
            for name, fragment in fragments.items():
                self.values[name].copy_(read(name, fragment.start, fragment.stop))

    def update(self, new: int, tokens: int) -> None:
        """Add the weights after a step of `new` tokens, at `tokens` tokens of the run. A skipped step counts, too."""
        k = newest_weight(self.window, new, tokens)
        for name, fragment in self._engine.fragments().items():
            self.values[name].lerp_(fragment.master, k)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """The model has the average as its weights inside, and its own again afterwards, bit for bit. Collective."""
        self._swap()
        yield
        self._swap()  # not after an error: the run ends, and other ranks may be gone

    @torch.no_grad()
    def _swap(self) -> None:
        for name, fragment in self._engine.fragments().items():
            weights = fragment.master.clone()
            fragment.master.copy_(self.values[name])
            self.values[name].copy_(weights)
        self._engine.masters_changed()
