"""Learning-rate schedules as pure functions of the tokens seen and the batch size.

    from powertrain.schedulers import Decay, Power
    lr = Power(decay=Decay(start=900_000_000_000, tokens=100_000_000_000))(tokens=26_000_000_000, batch=1024)

Tokens are counted before the step; the batch is in units of 4096 tokens. `powertrain.schedulers.adapters` has the same
schedules as PyTorch's LRScheduler.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Any

from .constant import Constant
from .cosine import Cosine
from .decay import Decay
from .power import Power
from .rewarmup import Rewarmup
from .wsd import WSD

if __name__ != "powertrain.schedulers":
    raise ImportError("This folder is the package powertrain.schedulers; import it by that name.")

__all__ = ["WSD", "Constant", "Cosine", "Decay", "Power", "Rewarmup", "Schedule", "build", "power_of"]

Named = Power | WSD | Cosine | Constant
Schedule = Named | Rewarmup

_SCHEDULES: dict[str, type[Named]] = {"power": Power, "wsd": WSD, "cosine": Cosine, "constant": Constant}


def build(name: str, **fields: Any) -> Named:
    """Make a schedule from its name and the values of its fields.

    Args:
        name: power, wsd, cosine or constant.
        fields: the fields of that dataclass; `decay` may be a mapping of Decay's fields, or None.

    Raises:
        ValueError: an unknown name or field, a missing field, or a value that the schedule refuses.
    """
    if name not in _SCHEDULES:
        raise ValueError(_unknown("There is no schedule", name, _SCHEDULES))
    if isinstance(fields.get("decay"), Mapping):
        fields["decay"] = _make(Decay, "decay", fields["decay"])
    schedule: Named = _make(_SCHEDULES[name], name, fields)
    return schedule


def fields_of(name: str) -> set[str]:
    """Names of the fields that `build` takes for the schedule `name`; none of an unknown one."""
    return {field.name for field in dataclasses.fields(_SCHEDULES[name])} if name in _SCHEDULES else set()


def power_of(schedule: Schedule) -> Power | None:
    """The schedule itself, or the one that it warms up to again, if that is a Power; else None."""
    return schedule.power


WITH_DECAY = tuple(name for name in _SCHEDULES if "decay" in fields_of(name))


def _make(cls: type[Any], label: str, values: Mapping[str, Any]) -> Any:
    known = {field.name: field.default for field in dataclasses.fields(cls)}
    for key in values:
        if key not in known:
            raise ValueError(_unknown(f"The schedule's {label} has no field", key, known))
    missing = [key for key, default in known.items() if default is dataclasses.MISSING and key not in values]
    if missing:
        raise ValueError(f"{label} needs a value for {', '.join(missing)}.")
    return cls(**values)


def _unknown(what: str, value: str, allowed: Iterable[str]) -> str:
    close = get_close_matches(str(value), allowed, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return f"{what} {value!r}.{hint} Allowed: {', '.join(allowed)}."
