"""The command line of verbs that build a run: Hydra overrides in, an exit status out.

0 done, 1 a check failed or the run broke, 2 bad usage or bad input. What a user can mend is one paragraph
without a traceback.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import difflib
import logging
import os
import re
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from hydra import compose, initialize_config_module
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from powertrain.data import DataError, expand
from powertrain.train import streams
from powertrain.train.config import (
    Config,
    DataConfig,
    ModelConfig,
    RunConfig,
    as_typed,
    check_interpolations,
    data_from_hydra,
    from_hydra,
    load,
    setting_names,
    setting_values,
    unchecked,
)
from powertrain.train.errors import ConfigError, RunFailed, status_of
from powertrain.train.redact import HIDDEN, settings_text, without_secrets

# torch 2.13 says at every collective of DeepSpeed's that it will have another name.
warnings.filterwarnings("ignore", "`torch.distributed.* is deprecated", FutureWarning)
# Its successor is not in the torch that we admit at least.
warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
logging.getLogger("DeepSpeed").addFilter(lambda record: "Setting accelerator to CPU" not in record.getMessage())
# What a person should see is said by this project. Set before Transformers is imported.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
if not (sys.stderr and sys.stderr.isatty()):  # a log has lm-eval's progress once a minute
    for name in ("TQDM_MININTERVAL", "TQDM_MAXINTERVAL"):
        os.environ.setdefault(name, "60")

LAST_WORDS_SECONDS = 2.0  # in which a rank says what is wrong when another has found something, too

TRAIN_HELP = """Train a model as described by Hydra configs.

usage: accelerate launch $(which powertrain) train +experiment=NAME [KEY=VALUE …]
       powertrain train +experiment=NAME [KEY=VALUE …]

The first works from any folder, with any number of processes; in a checkout `accelerate launch train.py` is the same.
The second is a single process.

examples:
  accelerate launch $(which powertrain) train +experiment=quickstart
  accelerate launch --config_file $(powertrain path zero1) $(which powertrain) train +experiment=moe_1b
  powertrain train +experiment=quickstart run.name=second run.tokens=4_000_000 schedule.a=3
  powertrain train run.name=second run.tokens=6_000_000      # one that is there, by its own config.yaml

  --cfg              print the composed configuration and do nothing
  --config-dir DIR   look for configs in DIR too (an experiment is DIR/experiment/NAME.yaml)
  --help             this text

experiments: {experiments}
groups: {groups}
Every setting, with its default and meaning, is in docs/settings.md and train/config.py; --cfg prints them all.
"""


def main(arguments: list[str] | None = None) -> None:
    """`train`: compose, check, run."""
    arguments = sys.argv[1:] if arguments is None else arguments
    leave(lambda: _train(arguments))


def _train(arguments: list[str]) -> int:
    if "--help" in arguments or "-h" in arguments:
        print(TRAIN_HELP.format(experiments=", ".join(options("experiment")), groups=_groups()))
        return 0
    print_only = "--cfg" in arguments
    described = [argument for argument in arguments if argument != "--cfg"]
    config = of_a_run(described) or composed(described)
    if print_only:
        print(settings_text(config), end="")
        return 0

    return run_training(config, "train", arguments)


def run_training(config: Config, verb: str, arguments: list[str]) -> int:
    """Train; the run's folder tells in exit.json how it ended, and in run.json by which command it was started.

    Raises:
        ConfigError: a run is continued by its config.yaml, which does not hold a tracker's secret.
    """
    for name, value in setting_values(config.tracker, "tracker."):
        if value == HIDDEN:
            raise ConfigError(f"{name} is a secret, which config.yaml leaves out: give it again, as {name}=….")
    # Only now: a mistake in the configuration should not have to wait for these imports.
    from powertrain.train.run import train
    from powertrain.train.stop import Stop

    def end(number: int, frame: object) -> None:
        Stop.early = number  # an exception is lost when it meets Python in a destructor
        sys.exit(128 + number)

    # Outside the loop, which saves first, a signal ends the process in a way that exit.json can tell.
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup leaves the last one
            signal.signal(number, end)
    train(config, ["powertrain", verb, *arguments])
    return 0


def of_a_run(overrides: list[str]) -> Config | None:
    """The configuration of a run that is there and only named, by `run.name` and `run.folder`, with KEY=VALUE changed;
    None where the overrides describe one, by an experiment or another group, or where there is none.

    Raises:
        ConfigError: with what is wrong, in one paragraph.
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
        if not any(key.startswith(("model.", "data.", "batch.")) for key in keys):  # without which there is no new one
            there_are = sorted(path.parent.name for path in folder.glob("*/config.yaml"))
            raise ConfigError(
                f"There is no run {settings.parent}; {folder} has {', '.join(there_are) or 'none'}. A new one is "
                "described by an experiment: +experiment=NAME." + _did_you_mean(place["run.name"], there_are)
            )
        return None
    return load(settings, place, [f"{name}={value}" for name, value in given.items()])


def composed(overrides: list[str], checked: bool = True) -> Config:
    """The configuration that these Hydra overrides make.

    Raises:
        ConfigError: with what is wrong, in one paragraph; without `checked` only with what cannot be read.
    """
    settings = _compose(overrides)
    if "sweep" in settings:  # a trial of it
        OmegaConf.set_struct(settings, False)
        del settings["sweep"]
    given = _given_of_the_model(overrides)
    return from_hydra(settings, given) if checked else unchecked(settings, given)


def _given_of_the_model(overrides: list[str]) -> list[str]:
    """The settings of the model that these overrides name, all of them where they choose or describe one."""
    keys = [override.lstrip("+~").partition("=")[0] for override in overrides]
    everything = [field.name for field in dataclasses.fields(ModelConfig)] if "model" in keys else []
    return [*everything, *(key.removeprefix("model.") for key in keys if key.startswith("model."))]


def composed_sweep(overrides: list[str]) -> tuple[DictConfig, Any]:
    """The unchecked settings of a sweep, which is only described whole with those of a trial, and its `sweep` part.

    Raises:
        ConfigError: with what is wrong, in one paragraph.
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
        ConfigError: with what is wrong, in one paragraph.
    """
    settings = _compose(overrides)
    budget = None if OmegaConf.is_missing(settings.run, "tokens") else settings.run.tokens
    return data_from_hydra(settings), budget if isinstance(budget, int) else None


def _compose(overrides: list[str]) -> DictConfig:
    for argument in overrides:
        if re.match(r"[+~]*/?hydra(?![\w-])", argument):
            raise ConfigError(
                f"'{argument}' is a setting of Hydra itself, which could import or run what it names; none is taken. "
                "A folder with your own configs is named with --config-dir DIR."
            )
    # A sweep's settings are its own to check: those that its file leaves at their defaults can be given, too.
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
    # Plain values here, so that a dict can be given on the command line; from_hydra sees to the types.
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
        raise ConfigError(_in_plain_words(error)) from error


def guard(verb: Callable[[], int]) -> int:
    """Run a verb; turn the errors that a user can mend into one paragraph and exit status 2."""
    streams.protect()
    _shield()
    try:
        return verb()
    except (ConfigError, DataError) as error:
        notes = getattr(error, "__notes__", [])  # whose it is, when it is a rank's own
        if notes or os.environ.get("LOCAL_RANK", "0") == "0":  # all see the same configuration and files
            print("powertrain:", *notes, without_secrets(str(error)), file=sys.stderr)
        return 2
    except RunFailed as error:
        print(f"powertrain: {without_secrets(str(error))}", file=sys.stderr)
        return 1
    except UnicodeEncodeError as error:  # of a path: files' contents are UTF-8, and what is printed is escaped
        print(
            f"powertrain: {without_secrets(repr(error.object))} cannot be named in the encoding of this locale, "
            f"{error.encoding}. Set LC_ALL=C.UTF-8, or PYTHONUTF8=1.",
            file=sys.stderr,
        )
        return 2
    except OSError as error:  # a folder that cannot be made, a file that cannot be read, a full disk
        print(f"powertrain: {without_secrets(str(error))}", file=sys.stderr)
        return status_of(error)
    except KeyboardInterrupt:  # in the middle of a run it is a request to save: see train.stop.Stop
        print("powertrain: interrupted before there was anything to save.", file=sys.stderr)
        return 130


def _shield() -> None:
    """What this process starts, by whatever way, finds no module of its working directory: it is the user's."""
    os.environ["PYTHONSAFEPATH"] = "1"


def leave(verb: Callable[[], int]) -> NoReturn:
    """Run a verb that trains, and exit with its status. A rank leaves without freeing its process group.

    A process group of PyTorch's that is freed joins its thread, which may be waiting for the interpreter to free a
    tensor: once in a while they wait for each other for ever (seen with gloo, at the end of a run). And after an error
    on one rank, the others' part in it would be waited for.
    """
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ or "LOCAL_RANK" in os.environ
    if launched and sys.platform == "linux":
        # A launcher that is killed, or only told to end when it has a single process, would leave it training.
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
    try:
        status: Any = guard(verb)
    except SystemExit as leaving:
        status = leaving.code
    except BaseException:
        print(without_secrets(traceback.format_exc()), end="", file=sys.stderr)
        status = 1
    if "LOCAL_RANK" in os.environ:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):  # nobody listens any more
                stream.flush()
        if status in (1, 2) and os.environ.get("WORLD_SIZE") != "1":
            time.sleep(LAST_WORDS_SECONDS)  # the launcher ends all others as soon as one is gone
        os._exit(status if isinstance(status, int) else 1)
    sys.exit(status)


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


def _in_plain_words(error: Exception) -> str:
    """Hydra's message without its advice to append, which a checked configuration would refuse."""
    said = str(error)
    missing = re.search(r"Could not (?:override|append[^']*) '([^']+)'", said)
    if missing and missing[1] == "experiment":
        return "There is no setting 'experiment': an experiment is chosen with a plus, +experiment=NAME."
    if missing and missing[1].startswith("schedule."):
        return f"This schedule has no '{missing[1]}'; `--cfg` without it shows what it has."
    if missing and missing[1] not in setting_names():
        return f"There is no setting '{missing[1]}'." + _did_you_mean(missing[1], setting_names())
    if missing := re.search(r"Could not find '([^/']+)/([^']+)'", said):
        there_are = re.findall(r"\n\t(\S+)", said.partition("Config search path")[0]) or options(missing[1])
        return (
            f"There is no '{missing[2]}' in configs/{missing[1]}; there are {', '.join(there_are)}. "
            f"Your own go into DIR/{missing[1]}/, with --config-dir DIR." + _did_you_mean(missing[2], there_are)
        )
    cause = error.__cause__ or error.__context__
    if isinstance(error, OverrideParseException):
        return (
            f"'{error.override}' is not KEY=VALUE as Hydra reads it: {str(error).partition(chr(10))[0]}. A value with "
            "brackets, commas, spaces or equal signs in it is quoted twice: KEY='\"VALUE\"'."
        )
    first_line = str(cause or "").partition("\n")[0]
    return " ".join(f"{said.partition(' To append')[0].partition(chr(10))[0]} {first_line}".split())


def _did_you_mean(value: str, known: list[str]) -> str:
    near = difflib.get_close_matches(value, known, n=1, cutoff=0.6)
    return f" Did you mean '{near[0]}'?" if near else ""


def _configs() -> Path:
    from powertrain import configs

    return Path(next(iter(configs.__path__)))


def group_names() -> list[str]:
    """The folders of configs/."""
    return sorted(path.name for path in _configs().iterdir() if path.is_dir() and not path.name.startswith("_"))


def _texts() -> list[str]:
    """What is a text besides settings of type str: an option of a group, and names in a sweep."""
    return [*group_names(), *(f"sweep.{name}" for name in ("name", "ledger", "launcher"))]


def options(group: str) -> list[str]:
    """The files of one of them."""
    return sorted(path.stem for path in (_configs() / group).glob("*.yaml"))


def _groups() -> str:
    names = [
        f"{group} ({', '.join(options(group))})" for group in group_names() if group not in ("experiment", "sweep")
    ]
    return ", ".join(names)
