"""What the schedules share: the decay and its shapes, the phases of equation 8, their answers, and checks of fields."""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from .power import Power

Phase = Literal["warmup", "trunk", "decay"]

# Each shape takes the elapsed fraction x and y = 1 - x. Both come from integers, so neither loses precision near 0 or
# 1, and every shape is exactly 1 at (0, 1) and exactly 0 at (1, 0).
SHAPES: dict[str, Callable[[float, float], float]] = {
    "exponential": lambda x, y: math.expm1(y) / math.expm1(1.0),
    "linear": lambda x, y: y,
    "cosine": lambda x, y: math.sin(0.5 * math.pi * y) ** 2,
    "sqrt": lambda x, y: y / (1.0 + math.sqrt(x)),
}

_RULES: dict[str, Callable[[float], bool]] = {
    "a finite number": lambda v: True,
    "a finite number > 0": lambda v: v > 0,
    "a finite number < 0": lambda v: v < 0,
    "a fraction from 0 to 1": lambda v: 0 <= v <= 1,
    "a whole number of tokens >= 0": lambda v: v >= 0 and v == int(v),
    "a whole number of tokens > 0": lambda v: v > 0 and v == int(v),
}


def require(owner: object, **rules: str) -> None:
    """Check attributes of `owner` by name against rules of `_RULES`.

    Raises:
        ValueError: an attribute breaks its rule; the message has the value.
    """
    for name, rule in rules.items():
        value = getattr(owner, name)
        if (
            not isinstance(value, Real)
            or isinstance(value, bool)
            or not math.isfinite(value)
            or not _RULES[rule](float(value))
        ):
            raise ValueError(f"{type(owner).__name__}: {name} must be {rule}; it is {value!r}.")


@dataclass(frozen=True, kw_only=True)
class Decay:
    """The last part of a run: the learning rate falls from its value at `start` to `floor` times that value.

    It is f of equations 2 and 8 (arXiv 2408.13359), which the paper lets fall exponentially to 0:
    f = floor + (1 - floor) * s(x), where x = (n - start) / tokens, held at 1 after the decay's end.

    Args:
        start: tokens seen when the decay begins (N - N_d in the paper).
        tokens: length of the decay in tokens (N_d).
        shape: s(x): "exponential" (e^(1-x) - 1) / (e - 1), "linear" 1 - x, "cosine" (1 + cos(pi x)) / 2
            or "sqrt" 1 - sqrt(x).
        floor: the learning rate at the end, as a fraction of that at `start`.

    Raises:
        ValueError: a value out of its range, or a shape that is not in the list.
    """

    start: int
    tokens: int
    shape: str = "exponential"
    floor: float = 0.0

    def __post_init__(self) -> None:
        require(
            self,
            start="a whole number of tokens >= 0",
            tokens="a whole number of tokens > 0",
            floor="a fraction from 0 to 1",
        )
        if self.shape not in SHAPES:
            raise ValueError(f"Decay: there is no shape {self.shape!r}; the shapes are {', '.join(SHAPES)}.")

    def factor(self, tokens: int) -> float:
        """f after `tokens` tokens: 1 up to the start, `floor` from the end on."""
        elapsed = min(max(tokens - self.start, 0), self.tokens)
        left = self.tokens - elapsed
        return self.floor + (1.0 - self.floor) * SHAPES[self.shape](elapsed / self.tokens, left / self.tokens)


def check_decay(warmup_tokens: int, decay: Decay | None) -> None:
    """Check that `decay` is None or a Decay that starts at the end of the warmup or later.

    Raises:
        ValueError: it is not.
    """
    if decay is None:
        return
    if not isinstance(decay, Decay):
        raise ValueError(f"decay must be a Decay or None; it is {decay!r}.")
    if decay.start < warmup_tokens:
        raise ValueError(
            f"The decay starts at {decay.start:,} tokens, inside the warmup of {warmup_tokens:,} tokens: "
            "shorten the warmup or start the decay later."
        )


def equation_8(tokens: int, warmup_tokens: int, decay: Decay | None) -> tuple[Phase, float, int]:
    """Equation 8 (arXiv 2408.13359) after `tokens` tokens.

    Returns:
        The phase; the factor on the trunk's learning rate; and the token count at which the trunk is evaluated: the
        end of the warmup during warmup, the start of the decay during decay.

    Raises:
        ValueError: `tokens` is negative or not a number.
    """
    if not tokens >= 0:
        raise ValueError(f"tokens is the count of tokens before this step, 0 or more; it is {tokens!r}.")
    if tokens < warmup_tokens:
        return "warmup", tokens / warmup_tokens, warmup_tokens
    if decay is not None and tokens > decay.start:
        return "decay", decay.factor(tokens), decay.start
    return "trunk", 1.0, tokens


class Answers:
    """What every schedule says of itself, so that nobody has to ask which one it is.

    Attributes:
        warmup_tokens: length of the warmup.
        decay: the decay, or None.
        rewarmup: tokens between which a second warmup lies, or None.
        power: the Power schedule that sets the rate, or None.
    """

    warmup_tokens: int
    decay: Decay | None = None
    rewarmup: tuple[int, int] | None = None

    @property
    def power(self) -> "Power | None":
        return None

    @property
    def fall(self) -> tuple[int, int] | None:
        """Tokens between which the rate falls to its end, or None."""
        return None if self.decay is None else (self.decay.start, self.decay.start + self.decay.tokens)

    def phase(self, tokens: int) -> Phase:
        """The part of equation 8 that the step after `tokens` tokens is in: "warmup", "trunk" or "decay"."""
        return equation_8(tokens, self.warmup_tokens, self.decay)[0]

    def at_cap(self, tokens: int, batch: float) -> bool:
        """Whether a cap binds the rate of this step."""
        return False

    def edges(self, batches: Iterable[float]) -> Iterator[float]:
        """Tokens at which the rate of one of `batches` begins to follow another formula."""
        yield self.warmup_tokens
        yield from self.fall or ()
