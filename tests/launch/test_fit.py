"""`fit`: from a ledger, anyone's, to a schedule that trains; and the pages that `report` makes of ledgers and runs."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

sys.path.append(str(Path(__file__).parent.parent / "schedulers"))
from test_law import BATCHES, RATES, TOKENS, around, planted

from powertrain.launch import fit, report
from powertrain.schedulers import Power, law
from powertrain.train.compose import composed
from powertrain.train.model.mup import parametrisation_mismatches


def write(path: Path, lines: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def ledger(tmp_path: Path) -> Path:
    """Someone else's: the five keys that a fit needs, η = 3 · batch · tokens^-0.4 with a little noise."""
    grid = {"batches": BATCHES, "tokens": TOKENS, "rates": RATES}
    return write(tmp_path / "ledger.jsonl", planted(around(-0.4, 1), -0.4, 1, noise=0.001, **grid))


def call(main: Callable[[list[str]], None], *arguments: str, code: int = 0) -> None:
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    assert (ended.value.code or 0) == code


def test_a_fitted_law_is_a_schedule_to_train_with(ledger: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call(fit.main, str(ledger), "--name", "mine")
    said = capsys.readouterr().out
    assert "Held-out regret in nats" in said and "No cap is seen" in said
    names = {"losses_32.png", "best_rates.png", "law.png"}
    assert names == {path.name for path in (ledger.parent / "law").iterdir()}

    config = composed([f"--config-dir={ledger.parent}", "+experiment=quickstart", "schedule=mine"])
    schedule = config.make_schedule()
    assert isinstance(schedule, Power) and schedule.batch_exponent == 1
    assert schedule.b == pytest.approx(-0.4, abs=0.02)
    # Between cap and decay it is the law itself: γ at the middle of the sweep is 0.01 · T₃^-0.4 / T₃^-0.4.
    assert min(schedule.max_lr, schedule.a * TOKENS[3] ** schedule.b) == pytest.approx(0.01, rel=0.05)


def test_the_exponent_of_the_batch_goes_into_the_schedule(tmp_path: Path) -> None:
    grid = {"batches": BATCHES, "tokens": TOKENS, "rates": RATES}
    path = write(tmp_path / "ledger.jsonl", planted(around(-0.3, 0.4), -0.3, 0.4, noise=0.0005, **grid))
    call(fit.main, str(path), "--name", "mine")
    schedule = composed([f"--config-dir={tmp_path}", "+experiment=quickstart", "schedule=mine"]).make_schedule()
    assert isinstance(schedule, Power)
    assert schedule.batch_exponent == pytest.approx(0.4, abs=0.03)
    for batch in (0.5, 2.0):
        law = 0.01 * batch**0.4 * (TOKENS[4] / TOKENS[3]) ** -0.3
        assert schedule.a * batch**schedule.batch_exponent * TOKENS[4] ** schedule.b == pytest.approx(law, rel=0.05)


def test_a_named_form_goes_into_the_schedule_and_the_prediction(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The best learning rates have a hard cap, so held-out regret chooses `hard`."""
    grid = {"batches": BATCHES, "tokens": TOKENS, "rates": RATES}
    path = write(tmp_path / "ledger.jsonl", planted(around(-0.5, 1), -0.5, 1, cap=0.012, noise=0.0005, **grid))
    assert law.fit(json.loads(line) for line in path.read_text().splitlines()).chosen.name == "hard"
    call(fit.main, str(path), "--form", "smooth", "--name", "mine")
    said = capsys.readouterr().out
    assert re.search(r"smooth .*←", said) and "It was named; held-out regret would choose 'hard'" in said
    schedule = composed([f"--config-dir={tmp_path}", "+experiment=quickstart", "schedule=mine"]).make_schedule()
    assert isinstance(schedule, Power) and schedule.cap == "smooth"

    tokens = 2 * TOKENS[-1]
    call(fit.main, str(path), "--form", "smooth", "--predict", "batch=2", f"tokens={tokens}")
    lr = float(re.findall(r"lr ([\d.e-]+),", capsys.readouterr().out)[0])
    assert lr == pytest.approx(1 / (1 / schedule.max_lr + 1 / (2 * schedule.a * tokens**schedule.b)), rel=1e-3)
    call(fit.main, str(path), "--form", "power", code=2)
    assert "a cap is seen (by hard and smooth), so the forms are hard, smooth, plane" in capsys.readouterr().err

    # The plane is named: that it has no cap and another exponent says nothing of the ledger.
    call(fit.main, str(path), "--form", "plane", "--predict", "batch=64", "tokens=1e5")
    said = capsys.readouterr().out
    assert "A cap is seen (by hard and smooth), which the form 'plane' does not have" in said
    assert "sweep did not reach" not in said and "No cap is seen" not in said and "not proportional" not in said


def test_a_law_that_is_the_cap_alone_tells_no_critical_batch(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Far above the critical batch: at a smaller batch and a longer horizon anything up to the cap may be best."""
    grid = {"batches": BATCHES, "tokens": TOKENS, "rates": RATES}
    a = 300 * around(-0.5, 1)
    path = write(tmp_path / "ledger.jsonl", planted(a, -0.5, 1, cap=0.012, noise=0.004, **grid))
    call(fit.main, str(path), "--name", "mine")
    assert re.search(r"hard .*b and γ not seen   η_max 0.01\d* ", capsys.readouterr().out)
    text = (tmp_path / "schedule" / "mine.yaml").read_text()
    assert "a and b are guesses" in text and "intervals" not in text
    call(fit.main, str(path), "--predict", "batch=0.1", "tokens=1e9")
    said = capsys.readouterr().out
    low, high = map(float, re.findall(r"interval ([\d.e-]+) to ([\d.e-]+)", said)[0])
    assert low <= min(0.012, a * 0.1 * 1e9**-0.5) <= high
    assert "the critical batch is not seen" in said


def test_a_size_without_effect_is_told(ledger: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call(fit.main, str(ledger), "--predict", "batch=1", "tokens=1e6", "--parameters", "1e9")
    assert "--parameters has no effect" in capsys.readouterr().out


def test_a_run_of_another_parametrisation_is_told_so(tmp_path: Path, tiny: Callable[..., list[str]]) -> None:
    own = composed(tiny())
    facts = {
        name: {k: list(v) if isinstance(v, tuple) else v for k, v in vars(getattr(own, name)).items()}
        for name in ("model", "mup", "optimizer")
    }
    grid = {"batches": BATCHES, "tokens": TOKENS, "rates": RATES}
    lines = [{**line, "config": facts} for line in planted(around(-0.4, 1), -0.4, 1, **grid)]
    (tmp_path / "law").mkdir()
    call(fit.main, str(write(tmp_path / "law" / "ledger.jsonl", lines)), "--name", "mine")
    text = (tmp_path / "law" / "schedule" / "mine.yaml").read_text()
    assert '"base_hidden_size": 16' in text and '"head size": 16' in text

    config = composed(tiny())
    schedule = OmegaConf.to_container(OmegaConf.create(text))
    assert isinstance(schedule, dict)
    config.schedule = {**schedule, "warmup_tokens": 700}
    assert parametrisation_mismatches(config) == []
    config.model.initializer_range = 0.02
    config.optimizer.weight_decay = 0.3
    config.model.num_attention_heads = 1
    told = parametrisation_mismatches(config)
    assert [t.split(" is ")[0] for t in told] == ["initializer_range", "head size", "weight_decay"]
    # Another width and depth by the same rules are the same parametrisation.
    wider = composed([*tiny("model.hidden_size=64", "model.num_attention_heads=4", "model.num_hidden_layers=8")])
    wider.schedule = config.schedule
    assert parametrisation_mismatches(wider) == []


def test_a_prediction_has_an_interval_the_release_of_the_cap_and_a_warning(
    ledger: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call(fit.main, str(ledger), "--predict", "batch=1", f"tokens={TOKENS[3]}")
    inside = capsys.readouterr().out
    lr, low, high = map(float, re.findall(r"lr ([\d.e-]+), 95% interval ([\d.e-]+) to ([\d.e-]+)", inside)[0])
    assert low <= 0.01 <= high and lr == pytest.approx(0.01, rel=0.05)
    assert "Warning" not in inside

    call(fit.main, str(ledger), "--predict", "batch=1024", "tokens=1e12")
    outside = capsys.readouterr().out
    assert "Warning" in outside and "batch 1,024" in outside
    lr, low, high = map(float, re.findall(r"lr ([\d.e-]+), 95% interval ([\d.e-]+) to ([\d.e-]+)", outside)[0])
    assert math.log(high / low) > 0.01  # far outside, a and b do not determine it as well
    assert lr == pytest.approx(around(-0.4, 1) * 1024 * 1e12**-0.4, rel=0.3)
    release = float(re.findall(r"releases after ([\d.e+]+)", outside)[0])
    patterns = r"a ([\d.e+-]+),", r"b ([\d.e+-]+),", r"max_lr ([\d.e+-]+)"
    a, b, cap = (float(re.findall(pattern, outside)[0]) for pattern in patterns)
    assert 1024 * a * release**b == pytest.approx(cap, rel=0.02)


def test_a_learning_rate_that_the_sweep_does_not_determine_is_not_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grid = {"batches": BATCHES[1:4], "tokens": TOKENS[:3], "rates": RATES}
    path = write(tmp_path / "ledger.jsonl", planted(around(-0.5, 1), -0.5, 1, noise=0.02, **grid))
    call(fit.main, str(path), "--predict", "batch=1e9", "tokens=1e20")
    said = capsys.readouterr().out
    assert re.search(r"lr not known at batch 1e\+09 .*, its 95% interval spans a factor of [\d.e+]+\.", said), said
    assert not re.search(r"^lr \d", said, re.MULTILINE) and "Warning" in said


def test_a_prediction_takes_the_batch_in_sequences(ledger: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """64 sequences of 256 are 4 × 4096 tokens."""
    tokens = f"tokens={TOKENS[3]}"
    call(fit.main, str(ledger), "--predict", "batch=4", tokens)
    expected = capsys.readouterr().out
    call(fit.main, str(ledger), "--predict", "sequences=64", tokens, code=2)
    assert "add sequence_length=" in capsys.readouterr().err  # somebody else's ledger
    call(fit.main, str(ledger), "--predict", "sequences=64", "sequence_length=256", tokens)
    assert capsys.readouterr().out == expected
    lines = [{**json.loads(line), "config": {"sequence_length": 256}} for line in ledger.read_text().splitlines()]
    call(fit.main, str(write(ledger, lines)), "--predict", tokens, "sequences=64")
    assert capsys.readouterr().out == expected
    lines[0]["config"] = {"sequence_length": 512}
    call(fit.main, str(write(ledger, lines)), "--predict", tokens, "sequences=64", code=2)
    assert "holds 256 and 512" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "arguments", "said"),
    [
        (None, [], "There is no ledger"),
        ("", [], "nothing to fit"),
        ('{"lr": 1', [], "line 1, is not JSON"),
        ("[1]\n", [], "not a JSON object"),
        ("", ["--predict", "batch=1", "T=2"], "--predict batch=1024 tokens=1e12"),
        ("", ["--predict", "batch=1", "batch=2", "tokens=2"], "--predict batch=1024 tokens=1e12"),
        ("", ["--predict", "batch=1e300", "tokens=1e300"], "from 1e-9 to 1e24"),
        ("", ["--predict", "batch=1", "tokens=1e-300"], "from 1e-9 to 1e24"),
        ("", ["--predict", "batch=1", "tokens=2", "sequences=3"], "--predict batch=1024 tokens=1e12"),
        ("", ["--predict", "batch=1", "tokens=2", "lr=3"], "--predict batch=1024 tokens=1e12"),
    ],
)
def test_mistakes_are_one_paragraph(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str | None, arguments: list[str], said: str
) -> None:
    path = tmp_path / "ledger.jsonl"
    if text is not None:
        path.write_text(text)
    if "--predict" in arguments:
        write(path, planted(around(-0.4, 1), -0.4, 1, batches=BATCHES, tokens=TOKENS, rates=RATES))
    call(fit.main, str(path), *arguments, code=2)
    assert said in capsys.readouterr().err


def test_a_rate_that_rises_with_the_horizon_makes_no_power_schedule(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grid = {"batches": BATCHES, "tokens": TOKENS, "rates": RATES}
    path = write(tmp_path / "ledger.jsonl", planted(around(0.2, 0.5), 0.2, 0.5, **grid))
    call(fit.main, str(path), "--name", "mine", code=2)
    assert "does not fall" in capsys.readouterr().err
    assert not (tmp_path / "schedule" / "mine.yaml").exists()


# ------------------------------------------------------------------------------------------------------ the pages


def compare_ledger() -> list[dict[str, Any]]:
    """Two horizons: power has one pair of numbers for both, the best rate of wsd differs."""
    losses = {
        (100, "power", (("a", 1.0), ("b", -0.5))): 2.02,
        (200, "power", (("a", 1.0), ("b", -0.5))): 1.51,
        (100, "power", (("a", 2.0), ("b", -0.5))): 2.10,
        (200, "power", (("a", 2.0), ("b", -0.5))): 1.40,
        (100, "wsd", (("lr", 0.1),)): 2.00,
        (200, "wsd", (("lr", 0.1),)): 1.60,
        (100, "wsd", (("lr", 0.2),)): 2.30,
        (200, "wsd", (("lr", 0.2),)): 1.45,
    }
    same = {"model_name": "m", "batch": 1.0, "seed": 0}
    return [
        {**same, "trial": f"{s}{t}{f}", "tokens": t, "schedule": s, **dict(f), "loss": loss}
        for (t, s, f), loss in losses.items()
    ]


def test_one_set_of_numbers_is_held_against_the_best_of_each_row(tmp_path: Path) -> None:
    (text,) = [part for part in report.compared(compare_ledger()) if "<table" in part]
    rows = [re.findall(r"<td>(?:<b>)?(.*?)(?:</b>)?</td>", row) for row in re.findall(r"<tr>.*?</tr>", text)][1:]
    assert rows[0] == ["1", "100", "2.0200 (a 1, b -0.5, edge)", "2.0000 (lr 0.1, edge)", "+0.1000", "+0.0000"]
    assert rows[1] == ["1", "200", "1.4000 (a 2, b -0.5, edge)", "1.4500 (lr 0.2, edge)", "+0.0000", "+0.2000"]
    # power with a = 2 has a mean of 1.75 against 1.765 for a = 1; wsd with 0.1 one of 1.8 against 1.875
    assert rows[2] == ["mean", "", "", "", "+0.0500", "+0.1000"]


def test_a_page_needs_nothing_but_itself(tmp_path: Path, run: Callable[..., Path]) -> None:
    one = run("run.name=one")
    two = run("run.name=two", "run.seed=1")
    call(report.main, str(one))
    page = (one / "report.html").read_bytes()
    call(report.main, str(one), str(two), code=2)  # would replace the page of the first
    assert (one / "report.html").read_bytes() == page
    call(report.main, str(one), str(two), "--out", str(tmp_path / "both.html"))
    for page, names in ((one / "report.html", ["one"]), (tmp_path / "both.html", ["one", "two"])):
        text = page.read_text()
        assert all(f"<td>{name}</td>" in text for name in names)
        assert not re.search(r"<script|<link|<img|@import|src=|href=\"http", text)
        assert text.count("<svg") == text.count("</svg>") == 2 + 3 * len(names)
    for phase in ("warmup", "trunk", "decay"):
        assert f" {phase}</text>" in (one / "report.html").read_text()


def test_the_page_of_a_sweep_shows_every_loss(tmp_path: Path) -> None:
    write(tmp_path / "ledger.jsonl", compare_ledger())
    call(report.main, str(tmp_path))
    text = (tmp_path / "report.html").read_text()
    assert all(f"{line['loss']:.4f}" in text for line in compare_ledger())


def test_the_page_of_one_schedule_has_its_law(ledger: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [json.loads(line) for line in ledger.read_text().splitlines()]
    monkeypatch.setattr(fit, "fit", lambda lines: law.fit(lines, replicates=20))
    call(report.main, str(ledger.parent))
    text = (ledger.parent / "report.html").read_text()
    assert text.count("<svg") == len(list(fit.pictures(law.fit(lines, replicates=20)))) == 3
    assert "held-out regret in nats" in text.lower()
    null = dict.fromkeys(("schedule", "seed", "family", "model_name", "trial"))
    write(ledger, [{**line, **null} for line in lines])
    call(report.main, str(ledger.parent))
    assert (ledger.parent / "report.html").read_text().count("<svg") == 3
    assert "None" not in re.sub(r"<svg.*?</svg>", "", (ledger.parent / "report.html").read_text(), flags=re.S)
    write(ledger, lines[:3])
    call(report.main, str(ledger.parent))
    text = (ledger.parent / "report.html").read_text()
    assert "There is none yet" in text and "<svg" not in text


@pytest.mark.parametrize(
    "line",
    [
        '{"hidden_size": 32, "batch": 1, "lr": 0.1, "loss": 3, "tokens": 1%s}' % ("0" * 400),
        '{"hidden_size": 32, "batch": 1, "lr": 0.1, "loss": 1%s, "tokens": 10}' % ("0" * 400),
        '{"hidden_size": 32, "batch": true, "lr": 0.1, "loss": 3, "tokens": 10}',
        '{"hidden_size": 32, "batch": 1, "lr": [0.1], "loss": "low", "tokens": 10}',
        '{"hidden_size": 32, "batch": 1, "lr": 0.1, "loss": 3, "tokens": -5}',
        '{"hidden_size": 32, "batch": null, "lr": 0.1, "loss": 3, "tokens": 10}',
        '{"hidden_size": 32, "batch": 1, "lr": 0.1, "loss": 3, "tokens": 10, "parameters": "10M"}',
        "[" * 100_000,
        '{"batch": ' * 100_000,
    ],
)
def test_a_line_that_no_ledger_could_have_is_one_paragraph(
    ledger: Path, capsys: pytest.CaptureFixture[str], line: str
) -> None:
    ledger.write_text(ledger.read_text() + line + "\n")
    number = len(ledger.read_text().splitlines())
    for main, path in ((fit.main, ledger), (report.main, ledger.parent)):
        call(main, str(path), code=2)
        said = capsys.readouterr().err
        assert f"ine {number}" in said and len(said) < 400


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call(report.main, str(tmp_path), code=2)
    assert "no folder of a run" in capsys.readouterr().err


def test_a_run_under_the_law_of_another_parametrisation_warns_and_trains(
    tmp_path: Path, run: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    run("run.name=alike", "+schedule.belongs_to={base_hidden_size: 16}")
    assert "Warning" not in capsys.readouterr().out
    run("run.name=unlike", "+schedule.belongs_to={base_hidden_size: 256}")
    assert "another parametrisation (base_hidden_size is 16, the law's 256)" in " ".join(
        capsys.readouterr().out.split()
    )
