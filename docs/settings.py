"""Generate docs/settings.md from the dataclasses that hold the settings: their fields, defaults and comments.

usage: python docs/settings.py > docs/settings.md
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import typing
from pathlib import Path
from typing import Any

import yaml
from omegaconf import MISSING

from powertrain import schedulers
from powertrain.launch.sweep.trials import SweepConfig
from powertrain.train import config

HEAD = """# Every setting

Set a setting by its name, on the command line (`run.tokens=4_000_000`) or in a YAML file of your own
([own-experiment](own-experiment.md)). `powertrain train +experiment=NAME --cfg` prints the values of a run; experiments
and groups change the defaults listed here. **Needed** means that there is no default; the last
column says what a default of `null` means.

Token counts are of two kinds. `run.tokens`, `data.stages` and `batch.ramp` count the tokens of the **run**, from 0.
Those of a `schedule` are on its **clock**, which starts at `run.tokens_seen`. The two differ only if that is set
([continued-pretraining](continued-pretraining.md#the-clock-and-the-run)).

`python docs/settings.py` generates this page from the code, and a test compares the two.
"""
SCHEDULE = """Chosen by `schedule=NAME`. All token counts are on the clock, so they include `run.tokens_seen`.
[schedule](schedule.md) is about choosing the values.
"""
NULLS = {  # the meaning of null and 0 in configs/schedule
    "decay.start": "; null: so that it ends with the run",
    "decay.tokens": "; 0: no decay",
    "rewarmup.start": "; null: run.tokens_seen",
    "rewarmup.tokens": "; 0: none",
    "total_tokens": "; null: the end of the run",
}


def page() -> str:
    """The whole page."""
    parts, top = [HEAD], []
    types = typing.get_type_hints(config.Config, vars(config))
    for entry in dataclasses.fields(config.Config):
        kind = types[entry.name]
        if entry.name == "schedule":
            parts += [
                f"## schedule\n\n{SCHEDULE}",
                *(f"{schedule(*named)}\n" for named in schedulers._SCHEDULES.items()),
            ]
        elif dataclasses.is_dataclass(kind):
            parts.append(f"## {entry.name}\n\n{described(kind)[0]}\n\n{table(rows(kind, f'{entry.name}.'))}\n")
        else:
            top.append((entry.name, default_of(entry), comments(config.Config)[entry.name]))
    parts.append(f"## Without a group\n\n{table(top)}\n")
    parts.append(
        f"## sweep\n\n{described(SweepConfig)[0]} See [law](law.md).\n\n{table(rows(SweepConfig, 'sweep.'))}\n"
    )
    return "\n".join(parts)


def rows(kind: type, prefix: str) -> list[tuple[str, str, str]]:
    """(setting, default, meaning) of a dataclass's fields, including those of nested dataclasses."""
    types, said = typing.get_type_hints(kind, vars(inspect.getmodule(kind))), described(kind)[1] | comments(kind)
    found = []
    for entry in dataclasses.fields(kind):
        hint = types[entry.name]
        inside = next((each for each in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(each)), None)
        if inside is not hint:
            found.append((prefix + entry.name, default_of(entry), said[entry.name]))
        if inside is not None:
            step = {dict: ".NAME.", list: "[]."}.get(typing.get_origin(hint), ".")
            found += rows(inside, f"{prefix}{entry.name}{step}")
    return found


def schedule(name: str, kind: type) -> str:
    """A schedule's section, with the values in configs/schedule."""
    given = yaml.safe_load(
        (Path(config.__file__).parents[1] / f"configs/schedule/{name}.yaml").read_text(encoding="utf-8")
    )
    about, said = described(kind)
    for part, inner in (("decay", schedulers.Decay), ("rewarmup", schedulers.Rewarmup)):
        said |= {f"{part}.{field}": text for field, text in described(inner)[1].items()}
    found = []
    for key, value in given.items():
        nested = value if isinstance(value, dict) else {None: value}
        for field, default in nested.items() if key != "name" else ():
            full = f"{key}.{field}" if field else key
            found.append((f"schedule.{full}", written(default), said[full].rstrip(".") + NULLS.get(full, "")))
    return f"### schedule={name}\n\n{about.split('. ')[0].rstrip('.')}.\n\n{table(found)}"


def comments(kind: type) -> dict[str, str]:
    """Field → the comment on its line; the name of a tuple of names is replaced by them."""
    found = re.findall(r"^    (\w+):[^#\n]*?  # (.*)$", inspect.getsource(kind), re.M)
    held = {name: ", ".join(value) for name, value in vars(inspect.getmodule(kind)).items() if isinstance(value, tuple)}
    return {name: re.sub(r"\b[A-Z]+\b", lambda word: held.get(word[0], word[0]), text) for name, text in found}


def described(kind: type) -> tuple[str, dict[str, str]]:
    """A docstring's text, and its descriptions of fields, in lines `name: …` or `name, name: …`."""
    text, fields, names = [], {}, []
    for line in inspect.cleandoc(kind.__doc__ or "").partition("Raises:")[0].splitlines():
        if entry := re.match(r" {0,4}(\w+(?:, \w+)*): (.*)", line):
            names = entry[1].split(", ")
            fields |= {name: entry[2] for name in names}
        elif names and line.startswith(" "):
            fields |= {name: f"{fields[name]} {line.strip()}" for name in names}
        elif line != "Args:":
            names = []
            text.append(line)
    return " ".join(" ".join(text).split()), fields


def default_of(entry: dataclasses.Field[Any]) -> str:
    """The default of a field in YAML."""
    made = entry.default_factory
    return written(entry.default if made is dataclasses.MISSING else made())


def written(value: Any) -> str:
    """A value in YAML."""
    if value == MISSING or value is dataclasses.MISSING:
        return "**needed**"
    if isinstance(value, int) and value >= 10_000:
        return f"`{value:_}`"
    plain = list(value) if isinstance(value, tuple) else value
    return f"`{yaml.safe_dump(plain, default_flow_style=True).removesuffix('...' + chr(10)).strip()}`"


def table(found: list[tuple[str, str, str]]) -> str:
    """A table of (setting, default, meaning)."""
    lines = []
    for name, default, text in found:
        linked = re.sub(r"docs/(\w+)\.md", r"[\1](\1.md)", text.rstrip(".").replace("|", "\\|"))
        lines.append(f"| `{name}` | {default} | {linked} |")
    return "\n".join(["| setting | default | |", "|---|---|---|", *lines])


if __name__ == "__main__":
    print(page(), end="")
