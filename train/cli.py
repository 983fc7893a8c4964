"""The command line of verbs that train: arguments in, an exit status out.

0 done, 1 a check failed or the run broke, 2 bad usage or bad input, 130 Ctrl-C. What a user can mend is one paragraph
without a traceback.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

from powertrain.data import DataError
from powertrain.train import streams
from powertrain.train.compose import composed, existing_run, group_names, options
from powertrain.train.config import Config, setting_values
from powertrain.train.errors import ConfigError, RunFailed, status_of
from powertrain.train.imports import heavy_imports
from powertrain.train.redact import HIDDEN, settings_text, without_secrets

LAST_WORDS_SECONDS = 2.0  # in which a rank can print its own error when another has found one, too

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


def _groups() -> str:
    names = [
        f"{group} ({', '.join(options(group))})" for group in group_names() if group not in ("experiment", "sweep")
    ]
    return ", ".join(names)


def main(arguments: list[str] | None = None) -> None:
    """`powertrain train`: compose, check, run."""
    arguments = sys.argv[1:] if arguments is None else arguments
    leave(lambda: _train(arguments))


def _train(arguments: list[str]) -> int:
    if "--help" in arguments or "-h" in arguments:
        print(TRAIN_HELP.format(experiments=", ".join(options("experiment")), groups=_groups()))
        return 0
    print_only = "--cfg" in arguments
    described = [argument for argument in arguments if argument != "--cfg"]
    config = existing_run(described) or composed(described)
    if print_only:
        print(settings_text(config), end="")
        return 0

    return run_training(config, "train", arguments)


def run_training(config: Config, verb: str, arguments: list[str]) -> int:
    """`trained`, with an exit status."""
    trained(config, verb, arguments)
    return 0


def trained(config: Config, verb: str, arguments: list[str]) -> bool:
    """Train; the run's folder has in exit.json how it ended, and in run.json by which command it was started.

    Returns:
        Whether the run has finished; else it was asked to stop.

    Raises:
        ConfigError: a run resumes by its config.yaml, which does not hold a tracker's secret; or see `run.train`.
        data.DataError, RunFailed: see `run.train`.
    """
    for name, value in setting_values(config.tracker, "tracker."):
        if value == HIDDEN:
            raise ConfigError(f"{name} is a secret, which config.yaml leaves out: give it again, as {name}=….")
    # Only now: a mistake in the configuration should not have to wait for these imports.
    with heavy_imports():
        from powertrain.train.run import train
        from powertrain.train.stop import Stop

    def end(number: int, frame: object) -> None:
        Stop.early = number  # an exception is lost when it meets Python in a destructor
        sys.exit(128 + number)

    # Outside the loop, which saves first, a signal raises SystemExit, which exit.json then records.
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP
            signal.signal(number, end)
    return train(config, ["powertrain", verb, *arguments]).reason == "finished"


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
    """No process that this one starts imports modules of its working directory: that is the user's."""
    os.environ["PYTHONSAFEPATH"] = "1"


def leave(verb: Callable[[], int]) -> NoReturn:
    """Run a verb that trains, and exit with its status. A rank leaves without freeing its process group.

    A process group of PyTorch's that is freed joins its thread, which may be waiting for the interpreter to free a
    tensor: now and then that is a deadlock (seen with gloo, at the end of a run). And after an error on one rank, it
    would wait for the others' collectives.
    """
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ or "LOCAL_RANK" in os.environ
    if launched and sys.platform == "linux":
        # A launcher that is killed, or gets SIGTERM with a single process, would leave it training.
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
