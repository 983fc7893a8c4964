"""The page of runs: what it says, and that a browser shows it whole."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from launch.report import main
from train import report
from train.report import runs_page  # here, for the `run` fixture replaces it

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
    from matplotlib import pyplot

    figure, axis = pyplot.subplots()
    report._phases(axis, report.Run(run()), None, named=True)
    spans = {
        text.get_text().strip(): (patch.get_x(), patch.get_width())
        for text, patch in zip(axis.texts, axis.patches, strict=True)
    }
    pyplot.close(figure)
    # 12 steps of 256 tokens: 700 of warmup, a decay over the last 768
    # and at 2304 tokens, where it starts, the factor is still 1.
    assert spans == {"warmup": (256, 512), "trunk": (768, 1792), "decay": (2560, 512)}


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
