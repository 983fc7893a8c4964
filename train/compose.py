"""A `Config` from Hydra's overrides and `configs/`, or from what a run left in its config.yaml."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import itertools
import logging
import math
import os
import re
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import omegaconf._utils
from hydra import compose, initialize_config_module
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException, ValidationError
from yaml import CollectionNode, MappingNode, Node, YAMLError

from powertrain import configs
from powertrain.data import expand
from powertrain.train.check import check, check_data
from powertrain.train.config import Config, DataConfig, ModelConfig, RunConfig, setting_names, setting_values, type_of
from powertrain.train.errors import ConfigError
from powertrain.train.imports import heavy_imports

# torch 2.13 warns at every collective of DeepSpeed's that it will have another name.
warnings.filterwarnings("ignore", "`torch.distributed.* is deprecated", FutureWarning)
# The oldest torch that we support does not have its successor.
warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
logging.getLogger("DeepSpeed").addFilter(lambda record: "Setting accelerator to CPU" not in record.getMessage())
# This project logs what matters itself. Set before Transformers is imported.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
if not (sys.stderr and sys.stderr.isatty()):  # in a log file lm-eval's progress once a minute
    for name in ("TQDM_MININTERVAL", "TQDM_MAXINTERVAL"):
        os.environ.setdefault(name, "60")

T = TypeVar("T")

MAX_YAML_VALUES = 100_000
MAX_EXPANDED = 1_000_000  # characters and values, interpolations expanded


class _Loader(omegaconf._utils.get_yaml_loader()):  # type: ignore[misc]
    """OmegaConf's, which copies the value of an alias at each use: nine lines can mean 10^9 values."""

    def get_single_node(self) -> Any:
        node = super().get_single_node()
        if node is not None and _values(node, {}) > MAX_YAML_VALUES:
            raise YAMLError(f"{node.start_mark.name} has more than {MAX_YAML_VALUES:,} values, aliases written out")
        return node


def _values(node: Node, counted: dict[int, float]) -> float:
    """How many values a node of YAML is with its aliases written out; infinitely many when it holds itself."""
    if id(node) not in counted:
        counted[id(node)] = math.inf
        inside = node.value if isinstance(node, CollectionNode) else []
        parts = itertools.chain(*inside) if isinstance(node, MappingNode) else inside
        counted[id(node)] = 1 + sum(_values(part, counted) for part in parts)
    return counted[id(node)]


omegaconf._utils.get_yaml_loader = lambda: _Loader  # Hydra's files, a run's config.yaml and KEY=VALUE are read by it


def composed(overrides: list[str], checked: bool = True) -> Config:
    """The configuration that these Hydra overrides make; with `run.init_from`, the model is that folder's.

    Raises:
        ConfigError: it cannot be read, or, if `checked`, `check` refuses it.
    """
    settings = _compose(overrides)
    if "sweep" in settings:  # a trial of it
        OmegaConf.set_struct(settings, False)
        del settings["sweep"]
    config = typed(settings, Config)
    if config.run.init_from is not None:
        with heavy_imports():
            from powertrain.train.init_from import adopt

        adopt(config, _model_of_checkpoint(config), _given_model_settings(overrides))
    if checked:
        check(config)
    return config


def _model_of_checkpoint(config: Config) -> ModelConfig | None:
    """The model of the checkpoint that the run will resume from, or None at its first start."""
    from powertrain.train import checkpoint  # imports torch

    wanted = config.run.resume
    found = [] if wanted == "never" else checkpoint.available(config.run_folder / "checkpoints")
    if not found and wanted not in ("auto", "never"):
        found = [Path(wanted)]
    for path in reversed(found):
        with contextlib.suppress(ConfigError):  # damaged: it will resume from another one, or from none
            then = load(path / "config.yaml")
            return then.model if then.run.init_from == config.run.init_from else None
    return None


def _given_model_settings(overrides: list[str]) -> list[str]:
    """The settings of the model that these overrides name, all of them where they choose or describe one."""
    keys = [override.lstrip("+~").partition("=")[0] for override in overrides]
    everything = [field.name for field in dataclasses.fields(ModelConfig)] if "model" in keys else []
    return [*everything, *(key.removeprefix("model.") for key in keys if key.startswith("model."))]


def composed_sweep(overrides: list[str]) -> tuple[DictConfig, Any]:
    """The unchecked settings of a sweep, which are complete only with those of a trial, and its `sweep` part.

    Raises:
        ConfigError: they cannot be read.
    """
    settings = _compose(overrides)
    try:
        check_interpolations(settings)
        return settings, OmegaConf.to_container(settings.get("sweep") or OmegaConf.create(), resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"sweep: {str(error).partition(chr(10))[0]}") from error


def composed_data(overrides: list[str]) -> tuple[DataConfig, int | None]:
    """The `data` part, for which a run need not be described, and the budget in tokens where one is given.

    Raises:
        ConfigError: it cannot be read, or `check_data` refuses it.
    """
    settings = _compose(overrides)
    budget = None if OmegaConf.is_missing(settings.run, "tokens") else settings.run.tokens
    data = typed(settings.data, DataConfig)
    check_data(data)
    return data, budget if isinstance(budget, int) else None


def _compose(overrides: list[str]) -> DictConfig:
    for argument in overrides:
        if re.match(r"[+~]*/?hydra(?![\w-])", argument):
            raise ConfigError(
                f"'{argument}' is a setting of Hydra itself, which could import or run what it names; none is taken. "
                "A folder with your own configs is named with --config-dir DIR."
            )
    # A sweep checks its own settings: those that its file leaves at their defaults can be given, too.
    overrides = [f"++{o}" if o.startswith("sweep.") else o for o in _take_config_dir(overrides)]
    overrides = [as_typed(override, _texts()) for override in overrides]
    for argument in overrides:
        if argument in ("-m", "--multirun"):
            raise ConfigError(
                "Hydra's multirun would start all trials in one process, which accelerate refuses. `powertrain "
                "sweep +sweep=NAME` trains a grid, each trial in a process of its own."
            )
        if argument.startswith("-"):
            raise ConfigError(f"There is no option '{argument}'. Settings are KEY=VALUE; --help shows examples.")
    # Plain values here, so that a dict can be given on the command line; `typed` checks the types.
    settings = OmegaConf.create(OmegaConf.to_container(OmegaConf.structured(Config)))
    for name in ("data.corpora", "data.mixture", "tracker.init_kwargs"):  # whose keys are the user's own
        OmegaConf.set_struct(OmegaConf.select(settings, name), False)
    ConfigStore.instance().store(name="settings", node=settings)
    try:
        with initialize_config_module("powertrain.configs", version_base="1.3"):
            return compose("train", overrides=overrides)
    except YAMLError as error:
        raise ConfigError(f"A configuration file is not valid YAML: {' '.join(str(error).split())}.") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"A configuration file is not in UTF-8: {error}.") from error
    except RecursionError as error:
        raise ConfigError("A configuration file, or a KEY=VALUE, is nested too deep to be read.") from error
    except (HydraException, OmegaConfBaseException, ValueError, TypeError) as error:  # the last of [tiny,1e5]
        raise ConfigError(_readable(error)) from error


def existing_run(overrides: list[str]) -> Config | None:
    """The configuration of an existing run that is only named, by `run.name` and `run.folder`, with KEY=VALUE changed;
    None where the overrides describe a run, by an experiment or another group, or where there is none.

    Raises:
        ConfigError: there is no run of that name and nothing that describes one, or a change is refused (see `load`).
    """
    keys = [override.partition("=")[0] for override in overrides]
    if any(not re.fullmatch(r"\w[\w.-]*", key) or key in group_names() for key in keys):
        return None
    given = dict(override.split("=", 1) for override in overrides if "=" in override)
    place: dict[str, Any] = {name: given.pop(name) for name in ("run.name", "run.folder") if name in given}
    folder = Path(expand(place.get("run.folder", RunConfig.folder)))
    settings = folder / place.get("run.name", "") / "config.yaml"
    if "run.name" not in place:
        return None
    if not settings.is_file():
        if not any(key.startswith(("model.", "data.", "batch.")) for key in keys):  # which a new run needs
            known = sorted(path.parent.name for path in folder.glob("*/config.yaml"))
            raise ConfigError(
                f"There is no run {settings.parent}; {folder} has {', '.join(known) or 'none'}. A new one is "
                "described by an experiment: +experiment=NAME." + _did_you_mean(place["run.name"], known)
            )
        return None
    return load(settings, place, [f"{name}={value}" for name, value in given.items()])


def load(path: Path, changed: dict[str, Any] | None = None, overrides: Sequence[str] = ()) -> Config:
    """The configuration in a run's config.yaml, with changes by dotted name and KEY=VALUE on top.

    Without a change it is not checked again: what an earlier version allowed can still be read, and resumed from.

    Raises:
        ConfigError: no such file, one of another version, or a change that `check` refuses.
    """
    if not path.is_file():
        raise ConfigError(f"{path} does not exist; {path.parent} is not the folder of a run.")
    try:
        saved = DictConfig(OmegaConf.load(path))
        for name, value in (changed or {}).items():
            OmegaConf.update(saved, name, value, merge=False)
        given = OmegaConf.from_dotlist([as_typed(override) for override in overrides])
        config = typed(DictConfig(OmegaConf.merge(saved, given)), Config)
    except (OmegaConfBaseException, YAMLError, TypeError, ValueError, RecursionError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{path}, or a change to it, cannot be read: {str(error).partition(chr(10))[0]}") from error
    if changed or overrides:
        check(config)
    return config


def _take_config_dir(arguments: list[str]) -> list[str]:
    """Hydra's own spelling of --config-dir is an entry of its search path."""
    left, folders = [], []
    rest = iter(arguments)
    for argument in rest:
        if argument == "--config-dir" or argument.startswith("--config-dir="):
            folder = argument.partition("=")[2] or next(rest, "")
            if not Path(folder := expand(folder)).is_dir():
                raise ConfigError(f"--config-dir '{folder}' is not a folder.")
            folders.append(f"'file://{Path(folder).resolve()}'")
        else:
            left.append(argument)
    return [*left, f"hydra.searchpath=[{','.join(folders)}]"] if folders else left


def _readable(error: Exception) -> str:
    """Hydra's message without its advice to append, which a checked configuration would refuse."""
    message = str(error)
    missing = re.search(r"Could not (?:override|append[^']*) '([^']+)'", message)
    if missing and missing[1] == "experiment":
        return "There is no setting 'experiment': an experiment is chosen with a plus, +experiment=NAME."
    if missing and missing[1].startswith("schedule."):
        return f"This schedule has no '{missing[1]}'; `--cfg` without it shows what it has."
    if missing and missing[1] not in setting_names():
        return f"There is no setting '{missing[1]}'." + _did_you_mean(missing[1], setting_names())
    if missing := re.search(r"Could not find '([^/']+)/([^']+)'", message):
        known = re.findall(r"\n\t(\S+)", message.partition("Config search path")[0]) or options(missing[1])
        return (
            f"There is no '{missing[2]}' in configs/{missing[1]}; there are {', '.join(known)}. "
            f"Your own go into DIR/{missing[1]}/, with --config-dir DIR." + _did_you_mean(missing[2], known)
        )
    cause = error.__cause__ or error.__context__
    if isinstance(error, OverrideParseException):
        return (
            f"'{error.override}' is not KEY=VALUE as Hydra reads it: {str(error).partition(chr(10))[0]}. A value with "
            "brackets, commas, spaces or equal signs in it is quoted twice: KEY='\"VALUE\"'."
        )
    first_line = str(cause or "").partition("\n")[0]
    return " ".join(f"{message.partition(' To append')[0].partition(chr(10))[0]} {first_line}".split())


def _did_you_mean(value: str, known: list[str]) -> str:
    near = difflib.get_close_matches(value, known, n=1, cutoff=0.6)
    return f" Did you mean '{near[0]}'?" if near else ""


def _configs() -> Path:
    return Path(next(iter(configs.__path__)))


def group_names() -> list[str]:
    """The folders of configs/."""
    return sorted(path.name for path in _configs().iterdir() if path.is_dir() and not path.name.startswith("_"))


def _texts() -> list[str]:
    """What takes text besides settings of type str: the options of groups, and names in a sweep."""
    return [*group_names(), *(f"sweep.{name}" for name in ("name", "ledger", "launcher"))]


def options(group: str) -> list[str]:
    """The files of a group, without their ending."""
    return sorted(path.stem for path in (_configs() / group).glob("*.yaml"))


def as_typed(override: str, texts: Sequence[str] = ()) -> str:
    """KEY=VALUE with its value in quotes, where KEY takes text or is one of `texts`: 123e456 is a name, not infinity.

    `null` stays null where a setting can be absent.
    """
    key, _, value = override.partition("=")
    name = key.lstrip("+")
    hint = str | None if name in texts else type_of(name)
    text = hint is str or (hint == str | None and value != "null")
    return f"{key}='{value}'" if text and re.fullmatch(r"[\w.:+/~-]+", value) else override


def typed(composed: DictConfig, kind: type[T]) -> T:
    """The dataclass `kind` with these values.

    Raises:
        ConfigError: a setting is unknown, missing or of another type.
    """
    check_interpolations(composed)  # before anything resolves them
    try:
        if missing := sorted(OmegaConf.missing_keys(composed)):
            names = ", ".join(missing)
            raise ConfigError(
                f"These settings have no value yet: {names}. Give them as KEY=VALUE; +experiment=NAME brings most."
            )
        # As plain values first: a key added with + becomes part of the typed configuration.
        plain: Any = OmegaConf.to_container(composed, resolve=True)
        for name, hint in get_type_hints(kind).items():
            if dataclasses.is_dataclass(hint) and not isinstance(plain.get(name, {}), dict):
                example = dataclasses.fields(hint)[0].name
                raise ConfigError(f"{name} is {plain[name]!r}, but it has settings of its own, as {name}.{example}=….")
        for name, value in setting_values(plain):
            hint, each = type_of(name, kind), value if isinstance(value, list) else [value]
            if hint in (str, str | None, list[str]) and not all(isinstance(text, str | None) for text in each):
                raise ConfigError(f"{name} takes text, but YAML reads {value!r}: put the value in quotes.")
        typed = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(kind), plain))
    except ConfigKeyError as error:
        hint = " An experiment is chosen with a plus: +experiment=NAME." if error.full_key == "experiment" else ""
        raise ConfigError(f"There is no setting '{error.full_key}'.{hint}") from error
    except MissingMandatoryValue as error:
        raise ConfigError(f"{error.full_key} has no value.") from error
    except OmegaConfBaseException as error:
        hint = " Whole numbers are written 1_000_000." if "Integer" in str(error) else ""
        name = str(error.full_key).partition("[")[0]
        form = _form(type_of(name, kind))
        if form and isinstance(error, ValidationError):
            given = OmegaConf.to_container(composed, resolve=False)
            raise ConfigError(
                f"{name} is written '{name}={form}', not {_at(given, tuple(name.split('.')))!r}."
            ) from error
        raise ConfigError(f"{error.full_key}: {str(error).partition(chr(10))[0].rstrip('.')}.{hint}") from error
    assert isinstance(typed, kind)
    return typed


def _form(hint: Any) -> str:
    """How a list or a mapping of this type is written on the command line; empty for another type."""
    if dataclasses.is_dataclass(hint):
        return f"{{{', '.join(f'{entry.name}: …' for entry in dataclasses.fields(hint))}}}"
    if get_origin(hint) is list:
        return f"[{_form(get_args(hint)[0]) or '…'}, …]"
    if get_origin(hint) is tuple:
        return f"[{', '.join('…' for _ in get_args(hint))}]"
    return f"{{NAME: {_form(get_args(hint)[1]) or '…'}, …}}" if get_origin(hint) is dict else ""


def check_interpolations(composed: DictConfig) -> None:
    """Check that interpolations do not expand beyond MAX_EXPANDED: thirty lines of ${a}${a} are 10^9 values.

    Raises:
        ConfigError: they do.
    """
    root = OmegaConf.to_container(composed, resolve=False)
    sizes: dict[tuple[str, ...], float] = {}

    def size(path: tuple[str, ...], node: Any) -> float:
        """Characters and values of a node; infinitely many of one that holds itself."""
        if path not in sizes:
            sizes[path] = math.inf
            parts = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
            total = 1.0 + sum(size((*path, str(key)), part) for key, part in parts)
            if isinstance(node, str):
                total += len(node)
                for dots, name in re.findall(r"\$\{(\.*)([^${}:]+)\}", node):
                    target = (*(path[: -len(dots)] if dots else ()), *re.findall(r"[^.\[\]]+", name))
                    total += size(target, _at(root, target))
            sizes[path] = total
        return sizes[path]

    if size((), root) > MAX_EXPANDED:
        first = min((path for path in sizes if sizes[path] > MAX_EXPANDED), key=lambda path: sizes[path])
        raise ConfigError(
            f"With its interpolations written out the configuration has more than {MAX_EXPANDED:,} characters and "
            f"values, as {'.'.join(first)} alone has. Give the values themselves."
        )


def _at(node: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        try:
            node = node[int(key) if isinstance(node, list) else key]
        except (KeyError, IndexError, TypeError, ValueError):
            return None  # OmegaConf will report it
    return node
