"""The page of runs: what it says, and that a browser shows it whole."""

from __future__ import annotations

import json
import math
import random
import re
import shutil
import subprocess
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from powertrain.launch.bench import growth
from powertrain.launch.report import main
from powertrain.train import report
from powertrain.train.report import runs_page  # here, for the `run` fixture replaces it
from powertrain.train.track import read_lines

BROWSER = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chromium-browser"))), None)

# Run by the browser, when the page is laid out: what a reader could not see.
PROBE = """<script>
addEventListener("load", () => {
  const broken = [...document.querySelectorAll("svg, table, h1, h2")].filter(element => {
    const box = element.getBoundingClientRect();
    return box.width < 50 || box.height < 10;
  });
  const texts = [...document.querySelectorAll("svg text")].filter(text => text.getBoundingClientRect().width > 0);
  const found = {broken: broken.length, pictures: document.querySelectorAll("svg").length, texts: texts.length,
                 overflow: document.documentElement.scrollWidth - innerWidth};
  document.body.setAttribute("data-found", JSON.stringify(found));
});
</script>"""


def branched(run: Callable[..., Path]) -> list[Path]:
    """Two runs, the second of which stopped, and went on with more tokens."""
    one = run("run.name=one", "evaluation.every=4")
    two = run("run.name=two", "schedule.max_lr=0.02", "schedule.decay.tokens=0", "evaluation.every=4")
    run("run.name=two", "schedule.max_lr=0.02", "schedule.decay.tokens=0", "evaluation.every=4", "run.tokens=4096")
    return [one, two]


def test_several_runs_are_told_apart(run: Callable[..., Path]) -> None:
    runs = [report.Run(folder) for folder in branched(run)]
    (_, table) = report.differences(runs)
    assert re.findall(r"<td>([\w.]+)</td><td>(\S+?)</td><td>(\S+?)</td>", table) == [
        ("run.tokens", "3072", "4096"),
        ("schedule.max_lr", "0.01", "0.02"),
        ("schedule.decay.tokens", "768", "0"),
    ]
    started = report.starts(runs[1])
    assert started.count("UTC") == 2
    assert "step-00000012" in started
    assert "run.tokens: 3072 → 4096" in started
    table, _ = report.evaluations(runs)
    last = json.loads((runs[0].folder / "evals.jsonl").read_text().splitlines()[-1])
    assert f"<td>overall</td><td>one</td><td>12</td><td>{last['loss']:.4f}</td>" in table
    assert report.differences(runs[:1]) == []


def test_where_a_page_cannot_be_written(
    run: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run()
    (tmp_path / "link").symlink_to("/dev/null")
    for out in (tmp_path, tmp_path / "no" / "page.html", tmp_path / "link"):
        with pytest.raises(SystemExit) as ended:
            main([str(folder), "--out", str(out)])
        assert ended.value.code == 2
        assert f"cannot be written to '{out}'" in capsys.readouterr().err
    assert (tmp_path / "link").is_symlink()


def test_the_phases_of_a_run_are_where_the_schedule_has_them(run: Callable[..., Path]) -> None:
    from matplotlib.figure import Figure

    axis: Any = Figure().subplots()
    report._phases(axis, report.Run(run()), None, named=True)
    spans = {
        text.get_text().strip(): (patch.get_x(), patch.get_width())
        for text, patch in zip(axis.texts, axis.patches, strict=True)
    }
    # 12 steps of 256 tokens: 700 of warmup, a decay over the last 768
    # and at 2304 tokens, where it starts, the factor is still 1.
    assert spans == {"warmup": (256, 512), "trunk": (768, 1792), "decay": (2560, 512)}


# ------------------------------------------------------------------------------------ pages of runs that nobody trained


def recorded(folder: Path, steps: int = 200, **settings: Any) -> Path:
    """A run's folder with records of so many steps of 4096 tokens, an evaluation after each 100, and these settings."""
    growth.recorded(folder, steps)
    config = OmegaConf.load(folder / "config.yaml")
    for name, value in settings.items():
        OmegaConf.update(config, name.replace("__", "."), value, force_add=True)
    OmegaConf.save(config, folder / "config.yaml")
    return folder


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The pictures of a page, not drawn."""
    found: list[Any] = []
    monkeypatch.setattr(report, "picture", lambda figure: found.append(figure) or "(a picture)")
    return found


@pytest.mark.parametrize("count", [1, 10, 11, 60])
def test_no_two_of_many_lines_look_alike(count: int) -> None:
    looks = report.looks(count)
    assert len({look["color"] for look in looks}) == count
    assert all(one["linestyle"] != other["linestyle"] for one, other in pairwise(looks) if count > 10)


def test_every_run_is_in_the_pictures_and_in_the_legends_below(tmp_path: Path, figures: list[Any]) -> None:
    short, long = recorded(tmp_path / "short", 100), recorded(tmp_path / "long", 300)
    runs = [report.Run(long if n else short, f"run-$x$-{n}") for n in range(12)]
    for line in (line for run in runs for line in run.evaluations):
        line["corpus"] = "web"
    parts = "".join(report.overlays(runs) + report.evaluations(runs))
    loss, below, courses = figures
    drawn = [line for line in loss.axes[0].lines if len(line.get_xdata()) > 50]
    assert [line.get_color() for line in drawn] == [look["color"] for look in report.looks(12)]
    assert loss.axes[0].get_legend() is None and courses.axes[0].get_legend() is None
    assert parts.count("run-$x$-7</span>") == 3
    assert [len(line.get_xdata()) for line in below.axes[0].lines][:2] == [100, 300]


def test_the_critical_batch_is_drawn_beside_the_batch(tmp_path: Path, figures: list[Any]) -> None:
    old, new = report.Run(recorded(tmp_path / "old", 100)), report.Run(recorded(tmp_path / "new", 100))
    for step, line in enumerate(new.lines):
        line["critical_batch"] = 0.5 * step
    report.overlays([old])  # of before the metric, with one batch
    assert "batch" not in " ".join(axis.get_ylabel() for axis in figures[1].axes)
    report.overlays([old, new])
    axis = figures[3].axes[1]
    assert "critical batch" in axis.get_ylabel() and axis.get_yscale() == "log"
    of_old, of_new, critical = (list(line.get_ydata()) for line in axis.lines[:3])
    assert of_old == of_new == [1.0] * 100 and critical == [0.5 * step for step in range(100)]
    assert axis.lines[2].get_color() == axis.lines[1].get_color() != axis.lines[0].get_color()


def test_a_run_with_one_evaluation_is_in_the_chart(tmp_path: Path, figures: list[Any]) -> None:
    runs = [report.Run(recorded(tmp_path / f"run-{n}", 100 if n else 300)) for n in range(2)]
    for run in runs:
        for line in run.evaluations:
            line["corpus"] = "web"
    (*_, chart) = report.evaluations(runs)
    assert [len(line.get_xdata()) for line in figures[0].axes[0].lines] == [3, 1]
    assert "web, run-1" in chart


def test_a_change_of_the_mixture_is_marked_and_told(tmp_path: Path, figures: list[Any]) -> None:
    stages = [{"from_tokens": 409_600, "mixture": {"web": 0.25, "code": 0.75}}, {"from_tokens": 10**12, "mixture": {}}]
    run = report.Run(recorded(tmp_path / "run", data__stages=stages))
    loss, _ = report.overlays([run])
    assert "run: another mixture from 409,600 tokens on, web 0.25, code 0.75." in loss
    assert "1,000,000,000,000" not in loss
    for figure in figures:
        for axis in figure.axes:
            assert [line.get_xdata() for line in axis.lines if line.get_linestyle() == "-."] == [[409_600, 409_600]]


def test_settings_that_differ_can_be_read(tmp_path: Path) -> None:
    ramp = [{"from_tokens": 5, "sequences": 16}]
    runs = [report.Run(recorded(tmp_path / "one", batch__ramp=ramp)), report.Run(recorded(tmp_path / "two"))]
    (_, table) = report.differences(runs)
    cells = re.findall(r"<t[dh]>(.*?)</t[dh]>", table)
    assert cells == ["setting", "one", "two", "batch.ramp[0].from_tokens", "5", "", "batch.ramp[0].sequences", "16", ""]
    many = [report.Run(tmp_path / "two", f"run-{n}") for n in range(3)]
    for seed, run in enumerate(many):
        run.config.run.seed = seed
    (_, table) = report.differences(many)
    assert re.findall(r"<t[dh]>(.*?)</t[dh]>", table) == ["run", "run.seed", "run-0", "0", "run-1", "1", "run-2", "2"]


def test_no_record_stops_a_page(tmp_path: Path, figures: list[Any]) -> None:
    """Numbers, texts and whole parts of all records, replaced by what no run writes."""
    values = [
        None,
        True,
        -1,
        1.5,
        math.nan,
        math.inf,
        10**400,
        1e300,
        "",
        "$\\bad$",
        [],
        [1],
        ["a"],
        {},
        {"a": 1},
        2**63,
    ]
    folder, draw = recorded(tmp_path / "run", 100), random.Random(0)
    hardware = {"kernels": ["sdpa"], "device": "cpu", "ranks": 1}
    begun = {"from": None, "changed_settings": {"a": [1, 2]}, "time": "2026", "hardware": hardware, "versions": {}}
    kept = {"starts": [begun, {**begun, "from": "step-00000050"}], "parameters": {"total": 5}}
    lines = {name: read_lines(folder / name) for name in ("metrics.jsonl", "evals.jsonl")}
    state = folder / "checkpoints/step-00000100/state.json"
    state.parent.mkdir(parents=True)

    def spoiled(node: Any) -> Any:
        if draw.random() < 0.1:
            return draw.choice(values)
        if isinstance(node, dict):
            return {name: spoiled(value) for name, value in node.items() if draw.random() > 0.05}
        return [spoiled(value) for value in node] if isinstance(node, list) else node

    for _ in range(6):
        for name, entries in lines.items():
            (folder / name).write_text("".join(json.dumps(spoiled(entry)) + "\n" for entry in entries))
        (folder / "run.json").write_text(json.dumps(spoiled(kept)))
        (folder / "exit.json").write_text(json.dumps(spoiled({"reason": "SIGTERM"})))
        state.write_text(json.dumps(spoiled({"assignments": [[1, 2], [3, 4]]})))
        text = runs_page([folder])
        for figure in figures:
            figure.clear()
        assert "cannot be read and are left out" in text


@pytest.mark.skipif(BROWSER is None, reason="needs a browser")
@pytest.mark.slow
@pytest.mark.parametrize("width", [400, 1400])
def test_a_browser_shows_the_page_whole(run: Callable[..., Path], tmp_path: Path, width: int) -> None:
    folders = branched(run)
    page = tmp_path / "page.html"
    page.write_text(runs_page(folders) + PROBE)
    command = [str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", f"--window-size={width},900"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", page.as_uri()]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
    found = json.loads(re.search('data-found="(.*?)"', shown)[1].replace("&quot;", '"'))  # type: ignore[index]
    assert found["broken"] == 0
    assert found["pictures"] == 2 + 1 + 2 * 3
    assert found["texts"] > 100
    assert found["overflow"] <= 0
