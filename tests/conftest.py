"""A small text, and runs on it in this process or in one of their own."""

from __future__ import annotations

import copy
import functools
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from powertrain.train.config import Config
    from powertrain.train.loss import LanguageModelLoss

# One thread a rank: two busy ranks with two threads each slow each other tenfold on two cores.
os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1", WANDB_MODE="offline")

CONFIGS = Path(__file__).parent / "configs"
ROOT = Path(__file__).parent.parent


# Of docs/, the pages whose commands need what README.md's have trained or checked before.
AFTER_README = ("evaluation", "export", "law", "mup", "quickstart", "tracking")
# These take longest, so processes begin with them, or one would end long before the other.
FIRST = ("test_docs", "test_faults", "test_engines")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: FIRST.index(item.path.stem) if item.path.stem in FIRST else len(FIRST))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """A file runs in one process, for what its tests share; the pages of test_docs.py in two.

    `--dist loadgroup` would say so by marks, but xdist 3.8 loses them under pytest 9.2.
    """
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file, _, test = nodeid.partition("::")
            page = test.partition("test_every_command_of_a_page_runs[")[2].rstrip("]")
            return f"{file} {page.startswith('README') or page in AFTER_README}" if page else file

    return ByFile(config, log)


@pytest.fixture(scope="session")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 60 short documents of made-up words, in which some words follow others."""
    folder = tmp_path_factory.mktemp("words")
    draw = random.Random(0)
    vocabulary = ["".join(draw.choices("abcdefgh", k=draw.randint(2, 6))) for _ in range(40)]
    for number in range(60):
        word, text = number % 40, []
        for _ in range(draw.randint(5, 40)):
            text.append(vocabulary[word])
            word = (word * 3 + draw.randint(0, 2)) % 40
        (folder / f"{number:02d}.txt").write_text(" ".join(text) + ".\n")
    return folder


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where prepared corpora are kept for the whole session."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def benchmarks(words: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """PIQA, ARC-Easy (of 2 to 4 choices), BoolQ and HellaSwag of made-up words, as folders DIR/NAME/CONFIG/SPLIT."""
    from datasets import Dataset

    folder, draw = tmp_path_factory.mktemp("benchmarks"), random.Random(1)
    text = " ".join(path.read_text().rstrip(".\n") for path in sorted(words.glob("*.txt"))).split()

    def some(least: int, most: int) -> str:
        length = draw.randint(least, most)
        start = draw.randrange(len(text) - length)
        return " ".join(text[start : start + length])

    def arc(question: int) -> dict[str, Any]:
        labels = "ABCD"[: 2 + question % 3]
        choices = {"text": [some(1, 3) for _ in labels], "label": list(labels)}
        return {"id": str(question), "question": some(3, 6), "choices": choices, "answerKey": draw.choice(labels)}

    rows = {
        "piqa/plain_text": lambda i: {
            "goal": some(2, 5),
            # Longer than the window of 32 tokens, some of them.
            "sol1": some(1, 12),
            "sol2": some(1, 12),
            "label": draw.randint(0, 1),
        },
        "ai2_arc/ARC-Easy": arc,
        "boolq/none": lambda i: {"question": some(2, 4), "answer": bool(draw.randint(0, 1)), "passage": some(3, 9)},
        "hellaswag/none": lambda i: {
            "activity_label": some(1, 1),
            "ctx_a": some(3, 5),
            "ctx_b": some(1, 2),
            "endings": [some(2, 4) for _ in range(4)],
            "label": str(draw.randint(0, 3)),
        },
    }
    for name, row in rows.items():
        Dataset.from_list([row(i) for i in range(24)]).save_to_disk(str(folder / name / "validation"))
    return folder


@pytest.fixture
def few_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """lm-eval knows those of `benchmarks` alone: reading all its descriptions takes longer than a test should."""
    from lm_eval.tasks import TaskManager

    from powertrain.train import tasks

    folders = [
        Path(sys.modules["lm_eval.tasks"].__path__[0]) / name for name in ("piqa", "arc", "super_glue", "hellaswag")
    ]
    manager = TaskManager(include_path=folders, include_defaults=False)
    monkeypatch.setattr(tasks, "_manager", lambda: manager)


def tiny_overrides(words: Path, cache: Path, folder: Path, *more: str) -> list[str]:
    """Of a tiny run on `words` in `folder`."""
    text = [f"data.corpora.words.path={words}/*.txt", f"data.cache_dir={cache}"]
    return [f"--config-dir={CONFIGS}", "+experiment=tiny", *text, f"run.folder={folder}", *more]


def train_here(overrides: list[str]) -> Path:
    """Train in this process; the run's folder."""
    from powertrain.train.compose import composed
    from powertrain.train.run import train

    config = composed(overrides)
    train(config, ["test"])
    return config.run_folder


@pytest.fixture
def tiny(words: Path, cache: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """Overrides for a tiny run in `tmp_path`, with more of them appended."""

    return lambda *more: tiny_overrides(words, cache, tmp_path, *more)


@pytest.fixture
def run(tiny: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Train in this process; returns the run's folder. Its page is not drawn, which takes as long as all the rest."""
    monkeypatch.setattr("powertrain.train.report.runs_page", lambda folders: "not drawn")

    return lambda *more: train_here(tiny(*more))


def launch_command(arguments: list[str], ranks: int, engine: str) -> tuple[list[str], dict[str, str]]:
    """`train.py` on CPU ranks of an engine, as a user launches it, and the environment that it takes."""
    script = [str(ROOT / "train.py"), *arguments]
    launcher = [sys.executable, "-m", "accelerate.commands.launch"]
    if engine == "plain":
        return [sys.executable, *script], {}
    if engine == "launched":  # plain, by a launcher
        return [*launcher, *script], {}
    configuration = ["--config_file", str(ROOT / f"launch/accelerate/{engine}.yaml"), "--num_processes", str(ranks)]
    command = [*launcher, *configuration, "--main_process_port", "0", *script]
    return command, {"ACCELERATE_USE_CPU": "true"} if engine == "ddp" else {}


def launch(
    arguments: list[str], ranks: int = 1, engine: str | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Train in processes of their own, until they end. Several ranks are data parallel unless an engine is named."""
    command, needed = launch_command(arguments, ranks, engine or ("plain" if ranks == 1 else "ddp"))
    environment = {**os.environ, **needed, **environment}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


def start(arguments: list[str], ranks: int = 1, engine: str | None = None, **environment: str) -> subprocess.Popen[str]:
    """The same, without waiting for the end; in a process group of its own."""
    command, needed = launch_command(arguments, ranks, engine or ("plain" if ranks == 1 else "ddp"))
    environment = {**os.environ, **needed, **environment}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, start_new_session=True
    )


def without_timing(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl without what depends on the clock."""
    return [{k: v for k, v in line.items() if k not in ("tokens_per_second", "data_seconds", "mfu")} for line in lines]


def assert_same_run(one: Path, other: Path, step: int = 12) -> None:
    """Metrics without timing, and at `step` every tensor, number and random state of the checkpoint: equal bits."""
    from powertrain.train.track import read_lines

    lines, others = (without_timing(read_lines(folder / "metrics.jsonl")) for folder in (one, other))
    assert others == lines
    folders = [folder / f"checkpoints/step-{step:08d}" for folder in (one, other)]
    files = sorted(path.relative_to(folders[0]).as_posix() for path in folders[0].rglob("*.safetensors"))
    assert files == sorted(path.relative_to(folders[1]).as_posix() for path in folders[1].rglob("*.safetensors"))
    assert len(files) >= 4
    for name in (*files, "state.json"):
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes(), name


def cut_at(whole: Path, step: int, name: str) -> Path:
    """A copy of a run as it was when `step` was its newest checkpoint."""
    from powertrain.train import checkpoint

    folder = whole.with_name(name)
    shutil.copytree(whole, folder)
    for path in checkpoint.available(folder / "checkpoints"):
        if checkpoint.step_of(path) > step:
            shutil.rmtree(path)
    return folder


# A small GraniteMoe whose multipliers all differ from 1, so that a forgotten one shows.
SMALL = (
    "+experiment=quickstart",
    "model.vocab_size=97",
    "model.hidden_size=32",
    "mup.base_hidden_size=8",  # m_width 4
    "model.num_attention_heads=4",  # attention_multiplier 1/8, where 1/sqrt(d) is 0.35
    "model.num_key_value_heads=2",
    "model.intermediate_size=24",
    "model.shared_intermediate_size=40",  # of granitemoeshared alone
    "model.num_hidden_layers=3",
    "data.sequence_length=16",
)


@functools.cache
def _small(*overrides: str) -> Config:
    from powertrain.train.compose import composed

    return composed([*SMALL, *overrides])


@pytest.fixture
def small_config() -> Callable[..., Config]:
    """The small GraniteMoe's configuration with further overrides, as a copy that a test may change."""
    return lambda *overrides: copy.deepcopy(_small(*overrides))


@pytest.fixture
def small_loss() -> Callable[..., LanguageModelLoss]:
    """The initialised model of a configuration in its loss module."""

    def make(config: Config, seed: int = 0) -> LanguageModelLoss:
        from powertrain.train.loss import LanguageModelLoss
        from powertrain.train.model import granite, mup

        model = granite.build(config)
        mup.initialize(model.named_parameters(), mup.table(config), seed)
        return LanguageModelLoss(model)

    return make
