"""What is around a run is other people's: their folders, locales, users, repositories and terminals."""

from __future__ import annotations

import ast
import datetime
import functools
import importlib
import json
import os
import pwd
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import CONFIGS, ROOT

from powertrain.data import DataError, expand
from powertrain.train import hardware
from powertrain.train.cli import guard, run_training
from powertrain.train.compose import composed, composed_sweep, load
from powertrain.train.config import Config, RunConfig, setting_values
from powertrain.train.errors import ConfigError, RunFailed
from powertrain.train.model import blockwise
from powertrain.train.redact import settings_text
from powertrain.train.run import Outcome, train

QUICK = "+experiment=quickstart"


# ------------------------------------------------------------------------------------------------ folders and starts


@pytest.mark.slow
def test_a_wheel_works_in_a_folder_full_of_names_that_are_ours(words: Path, tmp_path: Path) -> None:
    source, target, folder = tmp_path / "source", tmp_path / "target", tmp_path / "theirs"
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout.split(b"\0")
    for name in map(os.fsdecode, filter(None, tracked)):
        if not name.startswith(("tests/", "docs/")):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, source / name, follow_symlinks=False)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--target", str(target), str(source)], check=True)
    trap = f"open({str(folder / 'ran.txt')!r}, 'a').write(__name__); raise SystemExit('somebody else was run')"
    for name in ("data", "configs", "schedulers", "launch", "train", "powertrain"):
        (folder / name).mkdir(parents=True)
        (folder / name / "__init__.py").write_text(trap)
    for name in ("train", "utils", "random", "yaml", "torch", "accelerate"):
        (folder / f"{name}.py").write_text(trap)

    def run(script: str) -> str:
        bin_folders = f"{target}/bin:{Path(sys.executable).parent}:{os.environ['PATH']}"
        own = {**os.environ, "PATH": bin_folders, "PYTHONPATH": str(target), "OMP_NUM_THREADS": "1"}
        own.pop("PYTHONSAFEPATH", None)  # of a verb that a test has run in this process
        done = subprocess.run(["bash", "-c", script], cwd=folder, env=own, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    text = f"data.corpora.words.path='{words}/*.txt' data.cache_dir={tmp_path}/cache --config-dir={CONFIGS}"
    run(
        "accelerate launch --config_file $(powertrain path zero1) --num_processes 2 --main_process_port 0 "
        f"$(which powertrain) train +experiment=tiny {text} run.tokens=1280 schedule.decay.tokens=0 checkpoint.every=4"
    )
    start = json.loads((folder / "runs/tiny/run.json").read_text())["starts"][0]
    assert (start["engine"], start["hardware"]["ranks"]) == ("zero1", 2)
    assert start["command"][:3] == ["powertrain", "train", "+experiment=tiny"]
    grid = "sweep.tokens=[1280] sweep.batch=[0.03125] 'sweep.schedules={wsd: {lr: [0.004]}}' sweep.jobs=1"
    launcher = "sweep.launcher='accelerate launch --num_processes 1 --main_process_port 0'"
    assert "1 of 1 trials done" in run(f"powertrain sweep +sweep=words {text} {grid}")
    assert "1 of 1 trials done" in run(f'powertrain sweep +sweep=words {text} {grid} sweep.name=two "{launcher}"')
    made = "runs/tiny"
    for verb in (
        f"prepare +experiment=tiny {text}",
        f"check run {made} --steps 1",
        f"estimate +experiment=tiny cluster.gpu=cpu {text}",
        f"report {made}",
        f"decay {made} --at 4 --tokens 512 threads=1",
        f"export {made} --out exported",
        "generate exported 'a b' --max-new-tokens 2",
        f"evaluate exported --text '{words}/00.txt'",
        "fit --help",
        "bench --help",
        "completion bash",
    ):
        run(f"powertrain {verb}")
    peak = "print(sorted(Shape('one', ['+experiment=quickstart'], 1)._run('peak')))"
    (tmp_path / "peak.py").write_text(f"from powertrain.launch.bench import Shape\n{peak}\n")
    assert run(f"python -P {tmp_path}/peak.py") == "['bfloat16', 'float32']\n"  # a process of bench's
    assert not (folder / "ran.txt").exists()


def test_each_package_has_one_name() -> None:
    """A folder on the path that is a checkout of ours gives no second copy of a module, whose classes are others."""
    own = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}  # of another test
    for name in ("train", "data", "schedulers", "launch", "configs"):
        command = [sys.executable, "-c", f"import {name}"]
        done = subprocess.run(command, cwd=ROOT, env=own, capture_output=True, text=True)
        assert f"This folder is the package powertrain.{name}; import it by that name." in done.stderr
        assert Path(importlib.import_module(f"powertrain.{name}").__file__ or "").samefile(ROOT / name / "__init__.py")


def test_files_for_other_commands_are_found_where_the_package_is(capsys: pytest.CaptureFixture[str]) -> None:
    from powertrain.launch import path

    with pytest.raises(SystemExit):
        path.main(["zero1"])
    assert Path(capsys.readouterr().out.strip()).samefile(ROOT / "launch/accelerate/zero1.yaml")
    with pytest.raises(SystemExit):
        path.main([])
    assert len(capsys.readouterr().out.split()) == 8
    with pytest.raises(SystemExit, match="2"):
        path.main(["zero4"])


def test_what_a_verb_starts_does_not_look_into_the_working_directory(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("PYTHONSAFEPATH", "PYTHONPATH"):
        monkeypatch.setenv(name, "")
    (tmp_path / "random.py").write_text("raise SystemExit(9)")
    command = [sys.executable, "-c", "import random"]
    assert subprocess.run(command, cwd=tmp_path).returncode == 9
    assert guard(lambda: subprocess.run(command, cwd=tmp_path).returncode) == 0


def test_the_command_leaves_the_working_directory_out(tmp_path: Path) -> None:
    """As accelerate gives it to DeepSpeed's ranks."""
    for name in ("launch", "train"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit(9)")
    command = [sys.executable, str(ROOT / "src/powertrain_command.py"), "--version"]
    own = {**os.environ, "PYTHONSAFEPATH": "1", "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, env=own, capture_output=True, text=True, check=True)
    assert done.stdout == f"powertrain {hardware.version('powertrain')}\n"


def test_the_recorded_command_can_be_run_again(monkeypatch: pytest.MonkeyPatch) -> None:
    recorded: list[list[str]] = []

    def recording(config: Config, command: list[str]) -> Outcome:
        recorded.append(command)
        return Outcome("finished", 0)

    monkeypatch.setattr("powertrain.train.run.train", recording)
    monkeypatch.setattr("signal.signal", lambda *arguments: None)
    run_training(Config(), "decay", ["runs/a", "--at", "6"])
    assert recorded == [["powertrain", "decay", "runs/a", "--at", "6"]]


# ------------------------------------------------------------------------------------------------ locales, terminals

SAYS = """
import sys
from powertrain.train import streams
streams.protect()
for _ in range(3):
    print("2 × 3 −", "text " * 20_000)
    print("2 × 3 −", file=sys.stderr)
    sys.stdout.flush()
with open(sys.argv[1], "w", encoding="utf-8") as file:
    file.write("whole")
"""


@pytest.mark.parametrize("redirected", [">&-", "2>&-", "<&- >&- 2>&-", ">/dev/full 2>/dev/full", "| true"])
def test_nothing_that_is_said_ends_what_is_done(tmp_path: Path, redirected: str) -> None:
    script = f'"{sys.executable}" -c "$SAYS" {tmp_path}/file {redirected}; exit ${{PIPESTATUS[0]}}'
    done = subprocess.run(["bash", "-c", script], cwd=ROOT, env={**os.environ, "SAYS": SAYS}, capture_output=True)
    assert done.returncode == 0
    assert (tmp_path / "file").read_text() == "whole"  # and not what goes to a descriptor that was free
    assert b"Traceback" not in done.stderr and b"Exception" not in done.stderr


def test_a_terminal_of_ascii(tmp_path: Path) -> None:
    command = [sys.executable, "-c", SAYS, str(tmp_path / "file")]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONIOENCODING": "ascii"}, capture_output=True)
    assert done.returncode == 0
    assert done.stdout.startswith(b"2 ? 3 ? text")
    assert done.stderr.startswith(rb"2 \xd7 3 \u2212")


def test_files_are_utf_8_whatever_the_locale_says() -> None:
    """The standard library's own warning sees only what a test runs; this sees every call."""
    tracked = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    calls = []
    for name in tracked.split():
        if name.startswith("tests/"):
            continue
        for node in ast.walk(ast.parse((ROOT / name).read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and (called := getattr(node.func, "id", getattr(node.func, "attr", ""))) in (
                *("open", "read_text", "write_text", "fdopen", "TextIOWrapper"),
                *("run", "Popen", "check_output", "NamedTemporaryFile"),
            ):
                given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                modes = [ast.unparse(argument) for argument in node.args] + [given.get("mode", "")]
                binary = ast.unparse(node.func) == "os.open" or any(re.search(r"'[rwax+]*b", mode) for mode in modes)
                text = called in ("read_text", "write_text", "TextIOWrapper") or not binary
                if called in ("run", "Popen", "check_output"):
                    text = given.get("text") == "True"
                if called == "open" and not node.args and not given:
                    text = False  # a method of that name of ours
                if text and "encoding" not in given:
                    calls.append(f"{name}:{node.lineno} {ast.unparse(node)}")
    assert not calls


def test_a_path_that_the_locale_cannot_name_is_a_paragraph(capsys: pytest.CaptureFixture[str]) -> None:
    assert guard(lambda: len("runs/模型".encode("latin-1"))) == 2
    assert "cannot be named in the encoding of this locale, latin-1" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------ users


def test_a_user_without_a_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert expand("~/x") == f"{tmp_path}/x"
    assert composed([QUICK, "run.folder=~/x", "run.init_from=null"]).run_folder == tmp_path / "x/quickstart"
    assert RunConfig(resume="~/a", init_from="~/b").init_from == f"{tmp_path}/b"
    monkeypatch.delenv("HOME")

    def unknown(user: int) -> None:
        raise KeyError(user)

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    # As in a new process: the kernel cannot be kept without a home, which has to leave SDPA and no traceback.
    monkeypatch.setattr(blockwise, "_kernel", functools.cache(blockwise._kernel.__wrapped__))
    for path in ("~/x", "~", "~nobody_of_that_name/x"):
        with pytest.raises(DataError, match="Set HOME, or give an absolute path"):
            expand(path)
    with pytest.raises(DataError, match="is not known"):
        train(composed([QUICK, f"run.folder={tmp_path}", "threads=1"]), ["test"])  # data.cache_dir is in the home
    with pytest.raises(DataError, match="is not known"):
        composed([QUICK, "run.folder=~/x"])


# ------------------------------------------------------------------------------------------------ names

NUMBERS = ["123e456", "98e7654", "1e5", "0x10", "1_000", "007", "1.10", "true", "True", "on", "inf", "nan", "1:30",
           "2024-01-01", ".5", "-1"]  # fmt: skip


SETTINGS = ("run.name", "run.folder", "run.resume", "data.cache_dir", "data.tokenizer.path", "evaluation.data",
            "tracker.project", "sample_prompt", "++data.corpora.a.path")  # fmt: skip


@pytest.mark.parametrize("shift", range(0, len(NUMBERS), 8))
def test_a_name_is_what_was_typed(shift: int, tmp_path: Path) -> None:
    typed = dict(zip(SETTINGS, (NUMBERS + NUMBERS)[shift:], strict=False))
    (tmp_path / "experiment").mkdir()
    option = tmp_path / "experiment" / f"{NUMBERS[shift]}.yaml"  # which is a name, too
    option.write_text("# @package _global_\ndefaults: [quickstart]\nrun: {seed: 7}\n")
    overrides = [f"{setting}={text}" for setting, text in typed.items()]
    config = composed([f"--config-dir={tmp_path}", f"+experiment={option.stem}", "++data.corpora.a.source=text",
                       *overrides])  # fmt: skip
    assert config.run.seed == 7
    (tmp_path / "config.yaml").write_text(settings_text(config))
    for found in (config, load(tmp_path / "config.yaml"), load(tmp_path / "config.yaml", {}, overrides[:8])):
        values = dict(setting_values(found))
        assert found.data.corpora["a"].path == typed["++data.corpora.a.path"]
        assert {name: values[name] for name in SETTINGS[:8]} == {name: typed[name] for name in SETTINGS[:8]}


def test_names_in_a_sweep_and_null() -> None:
    _, sweep = composed_sweep(["+sweep=tiny", "sweep.name=1e5", "sweep.ledger=007"])
    assert (sweep["name"], sweep["ledger"]) == ("1e5", "007")
    assert composed([QUICK, "run.name=null"]).run.name == "null"


def test_a_text_that_can_be_absent_is_absent() -> None:
    config = composed([QUICK, "run.init_from=null", "data.tokenizer.path=null", "sample_prompt=null"])
    assert (config.run.init_from, config.data.tokenizer.path, config.sample_prompt) == (None, None, None)


@pytest.mark.parametrize("value", ["1e5", "007", "true", "[1e5]"])
def test_a_text_without_quotes_in_a_file_is_refused(value: str, tmp_path: Path) -> None:
    name = "tracker.log_with" if value.startswith("[") else "run.name"
    group, _, setting = name.partition(".")
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(
        f"# @package _global_\ndefaults: [quickstart]\n{group}: {{{setting}: {value}}}\n"
    )
    with pytest.raises(ConfigError, match=rf"{name} takes text, but YAML reads .* put the value in quotes"):
        composed([f"--config-dir={tmp_path}", "+experiment=mine"])


# ------------------------------------------------------------------------------------------------ versions, commits


def test_a_version_has_the_build_that_its_wheel_does_not_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda package: "2.13.0")
    monkeypatch.setattr(torch, "__version__", "2.13.0+cu130")
    assert hardware.version("torch") == "2.13.0+cu130"
    assert hardware.version("not imported") == "2.13.0"


def test_the_commit_is_of_our_own_repository(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    file = tmp_path / ".venv/site-packages/train/hardware.py"
    file.parent.mkdir(parents=True)
    file.touch()
    subprocess.run([*git, "init", "--quiet"], check=True)
    subprocess.run([*git, "commit", "--quiet", "--allow-empty", "--message=theirs"], check=True)
    monkeypatch.setattr(hardware, "__file__", str(file))
    assert hardware.commit() is None
    subprocess.run([*git, "add", str(file)], check=True)
    subprocess.run([*git, "commit", "--quiet", "--message=with a copy of ours"], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout
    assert hardware.commit() == head.strip()
    file.write_text("changed")
    assert hardware.commit() == f"{head.strip()}+"


# ------------------------------------------------------------------------------------------------ launchers


@pytest.mark.parametrize("variables", [{"WORLD_SIZE": "2", "RANK": "0"}, {"WORLD_SIZE": "two"}, {"WORLD_SIZE": "8"}])
def test_a_launchers_variables_without_a_launcher(
    variables: dict[str, str], monkeypatch: pytest.MonkeyPatch, run: Callable[..., Path]
) -> None:
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=f"WORLD_SIZE is '{variables['WORLD_SIZE']}' in the environment"):
        run()


def test_a_start_waits_so_long_and_work_longer() -> None:
    from powertrain.train.engine import _joining

    def join(ranks: int) -> None:
        store = torch.distributed.TCPStore("127.0.0.1", 0, ranks, True, wait_for_workers=False)
        limit = datetime.timedelta(seconds=0.5)
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=ranks, timeout=limit)

    told = r"2 ranks did not come together within 0.5 s .*GLOO_SOCKET_IFNAME"
    with pytest.raises(RunFailed, match=told), _joining(2, 0.5):
        join(2)
    try:
        with _joining(1, 0.5):
            join(1)
        group = torch.distributed.distributed_c10d._get_default_group()._get_backend(torch.device("cpu"))
        assert group.options._timeout == datetime.timedelta(days=1)
    finally:
        torch.distributed.destroy_process_group()


def test_a_rank_tells_of_its_own_error_and_not_of_everybodys(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*notes: str) -> int:
        error = ConfigError("weights.safetensors is not a safetensors file.")
        for note in notes:
            error.add_note(note)
        raise error

    monkeypatch.setenv("LOCAL_RANK", "1")
    assert guard(fails) == 2
    assert capsys.readouterr().err == ""
    assert guard(lambda: fails("rank 1:")) == 2
    assert capsys.readouterr().err == "powertrain: rank 1: weights.safetensors is not a safetensors file.\n"
