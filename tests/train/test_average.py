"""The running average of the weights: what it is, that it is saved and resumed, and that training does not notice."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import assert_same_run, cut_at, launch, tiny_overrides, train_here, without_timing
from safetensors.torch import load_file

from powertrain.launch.export import main as export
from powertrain.train import checkpoint
from powertrain.train.average import newest_weight
from powertrain.train.compose import composed
from powertrain.train.errors import ConfigError
from powertrain.train.track import read_lines, weights_of

# A batch that grows, and a checkpoint of every step.
SETTINGS = (
    "run.tokens=3840",
    "batch.ramp=[{from_tokens: 1536, sequences: 16}]",
    "checkpoint.every=1",
    "checkpoint.keep=40",
    "evaluation.every=4",
    "schedule.decay.tokens=0",
)
LAST = 11  # six steps of 256 tokens, and five of 512 that go past the budget's end
WINDOW = 0.4


def no_page(folders: object) -> str:
    return "not drawn"


@pytest.fixture(scope="module")
def averaged(words: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("powertrain.train.report.runs_page", no_page)
        folder = tmp_path_factory.mktemp("averaged")
        name = f"run.name=averaged average.window={WINDOW}".split()
        return train_here(tiny_overrides(words, cache, folder, *name, *SETTINGS))


def stored(run: Path, step: int, what: str, name: str, size: int) -> torch.Tensor:
    return checkpoint.Stored(run / f"checkpoints/step-{step:08d}", what).read(name, 0, size).double()


def sizes(run: Path) -> dict[str, int]:
    found = load_file(run / "checkpoints/step-00000001/weights.safetensors")
    return {name: tensor.numel() for name, tensor in found.items()}


def by_hand(run: Path, name: str, size: int, window: float, last: int, first: int = 1) -> torch.Tensor:
    """The average of the weights after steps `first` … `last`, those of the first also standing for all before."""
    ends = {0: 0} | {
        line["step"]: line["tokens"] + round(line["batch"] * 4096) for line in read_lines(run / "metrics.jsonl")
    }
    c = 2 / window - 1
    shares = {step: (ends[step] / ends[last]) ** c - (ends[step - 1] / ends[last]) ** c for step in range(1, last + 1)}
    return sum(share * stored(run, max(first, step), "weights", name, size) for step, share in shares.items())  # type: ignore[return-value]


@pytest.mark.parametrize("window", [0.01, 0.1, 0.5, 1.0])
def test_a_step_counts_by_its_place_among_the_tokens(window: float) -> None:
    """Σ over steps against the integral; the mean age is half a window, as that of a plain mean over a window."""
    sizes = np.random.default_rng(0).integers(1, 20, 4000)  # batches of any size
    ends = np.cumsum(sizes)
    weights = np.zeros(len(sizes))
    for step, (new, tokens) in enumerate(zip(sizes, ends, strict=True)):
        weights *= 1 - newest_weight(window, int(new), int(tokens))
        weights[step] += newest_weight(window, int(new), int(tokens))
    assert weights.sum() == pytest.approx(1, abs=1e-12)
    c = 2 / window - 1
    expected = (ends / ends[-1]) ** c - ((ends - sizes) / ends[-1]) ** c
    np.testing.assert_allclose(weights, expected, rtol=1e-9, atol=1e-15)
    age = (weights * (ends[-1] - ends + sizes / 2)).sum() / ends[-1]
    assert age == pytest.approx(window / 2, rel=0.01)
    if window == 1:
        np.testing.assert_allclose(weights, sizes / ends[-1], rtol=1e-9)
    # Over about as many steps as a plain mean of the last tokens.
    alike = np.full(2000, 3)
    weights = np.array([(n / 6000) ** c - ((n - 3) / 6000) ** c for n in np.cumsum(alike)])
    assert 1 / (weights**2).sum() == pytest.approx(window * 2000, rel=0.12)


def test_the_average_in_each_checkpoint_is_that_of_the_weights_so_far(averaged: Path) -> None:
    for name, size in sizes(averaged).items():
        for step in (1, 2, 7, LAST):
            average = stored(averaged, step, "average", name, size)
            torch.testing.assert_close(average, by_hand(averaged, name, size, WINDOW, step), rtol=1e-5, atol=1e-7)
    name, size = next(iter(sizes(averaged).items()))
    assert not torch.equal(stored(averaged, LAST, "average", name, size), stored(averaged, LAST, "weights", name, size))


def test_the_run_is_the_same_without_it_to_the_last_bit(averaged: Path, run: Callable[..., Path]) -> None:
    alone = run("run.name=alone", *SETTINGS)
    lines, others = (without_timing(read_lines(folder / "metrics.jsonl")) for folder in (alone, averaged))
    assert len(lines) == LAST and lines == others
    lines, others = (read_lines(folder / "evals.jsonl") for folder in (alone, averaged))
    assert {weights_of(line) for line in lines} == {"raw"}
    assert lines == [line for line in others if line["weights"] == "raw"]
    steps = sorted((line["step"], line["corpus"]) for line in others if line["weights"] == "average")
    assert steps == sorted((line["step"], line["corpus"]) for line in lines)
    for name in ("weights", "exp_avg", "exp_avg_sq"):
        files = [folder / f"checkpoints/step-{LAST:08d}/{name}.safetensors" for folder in (alone, averaged)]
        assert files[0].read_bytes() == files[1].read_bytes()
    assert (alone / "model/model.safetensors").read_bytes() == (averaged / "model/model.safetensors").read_bytes()
    assert not (alone / "model-average").exists()


def test_the_exported_average_has_the_loss_that_was_measured(
    averaged: Path, run: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    begun = run("run.name=from-it", f"run.init_from={averaged / 'model-average'}", "evaluation.every=100")
    (first,) = (line for line in read_lines(begun / "evals.jsonl") if (line["step"], line["corpus"]) == (0, "overall"))
    last = {
        line["weights"]: line["loss"]
        for line in read_lines(averaged / "evals.jsonl")
        if (line["step"], line["corpus"]) == (LAST, "overall")
    }
    assert first["loss"] == pytest.approx(last["average"], rel=1e-6) != pytest.approx(last["raw"], rel=1e-4)
    for model, weights, other in (("model", "raw", "average"), ("model-average", "average", "raw")):
        card = (averaged / model / "README.md").read_text(encoding="utf-8")
        assert f"overall | {last[weights]:.4f} nats" in card and f"{last[other]:.4f}" not in card
        assert ("running average over a window of 0.4 of the tokens seen" in card) == (weights == "average")

    for arguments in (["--average"], ["--average", "--step", str(LAST)]):
        with pytest.raises(SystemExit) as ended:
            export([str(averaged), *arguments, "--out", str(tmp_path / "again")])
        assert not ended.value.code
        for name in ("model.safetensors", "README.md"):
            assert (tmp_path / "again" / name).read_bytes() == (averaged / "model-average" / name).read_bytes()
    with pytest.raises(SystemExit) as ended:
        export([str(begun), "--average"])
    assert ended.value.code == 2 and "has no running average" in capsys.readouterr().err


def test_a_run_that_was_stopped_resumes_its_average(averaged: Path, run: Callable[..., Path], tmp_path: Path) -> None:
    cut = cut_at(averaged, 5, "cut")
    cut.rename(tmp_path / "averaged")
    resumed = run("run.name=averaged", f"average.window={WINDOW}", *SETTINGS)
    assert_same_run(averaged, resumed, LAST)
    assert read_lines(resumed / "evals.jsonl") == read_lines(averaged / "evals.jsonl")
    assert (resumed / f"checkpoints/step-{LAST:08d}/average.safetensors").exists()


def test_a_stop_between_both_evaluations_repeats_them(averaged: Path, run: Callable[..., Path], tmp_path: Path) -> None:
    whole = read_lines(averaged / "evals.jsonl")
    cut_at(averaged, LAST, "stopped").rename(tmp_path / "averaged")
    lines = (tmp_path / "averaged/evals.jsonl").read_text().splitlines(keepends=True)
    assert json.loads(lines[-1])["weights"] == "average" and json.loads(lines[-3])["weights"] == "raw"
    (tmp_path / "averaged/evals.jsonl").write_text("".join(lines[:-2]))
    resumed = run("run.name=averaged", f"average.window={WINDOW}", *SETTINGS)
    assert read_lines(resumed / "evals.jsonl") == whole


def test_it_can_be_turned_on_changed_and_off(run: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    folder = run("run.name=turned", *SETTINGS, "run.tokens=1024")
    run("run.name=turned", *SETTINGS, "run.tokens=1536", "average.window=0.2")
    assert "A running average (average.window 0.2) begins with the weights as they are here." in capsys.readouterr().out
    for name, size in sizes(folder).items():  # the weights of step 4 stand for those before
        expected = by_hand(folder, name, size, 0.2, 6, first=4)
        torch.testing.assert_close(stored(folder, 6, "average", name, size), expected, rtol=1e-5, atol=1e-7)
    run("run.name=turned", *SETTINGS, "run.tokens=2048", "average.window=0.9")
    assert "continues with average.window 0.9; it was 0.2" in capsys.readouterr().out
    k = 1 - (1 - 512 / 2048) ** (2 / 0.9 - 1)
    name, size = next(iter(sizes(folder).items()))
    before, weights = stored(folder, 6, "average", name, size), stored(folder, 7, "weights", name, size)
    torch.testing.assert_close(stored(folder, 7, "average", name, size), before + k * (weights - before))
    run("run.name=turned", *SETTINGS, "run.tokens=2560")
    assert "The running average ends here" in capsys.readouterr().out
    assert not (folder / "checkpoints/step-00000008/average.safetensors").exists()
    assert (folder / "model-average").exists()
    changed = json.loads((folder / "run.json").read_text())["starts"][-1]["changed_settings"]
    assert changed["average.window"] == [0.9, None]


def test_a_branch_continues_the_average_of_its_parent(averaged: Path, run: Callable[..., Path]) -> None:
    parent = averaged / "checkpoints/step-00000006"
    branch = run("run.name=branch", f"average.window={WINDOW}", *SETTINGS, f"run.resume={parent}", "run.tokens=2048")
    for name, size in sizes(averaged).items():
        for what in ("weights", "average"):
            assert torch.equal(stored(branch, 7, what, name, size), stored(averaged, 7, what, name, size))


def test_a_part_of_the_average_that_is_missing_shows(averaged: Path) -> None:
    folder = cut_at(averaged, LAST, "damaged") / f"checkpoints/step-{LAST:08d}"
    (folder / "average.safetensors").unlink()
    assert checkpoint.defects(folder) == ["average.safetensors is missing"]
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["files"]["average.safetensors"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert checkpoint.defects(folder) == ["average.safetensors is missing, in manifest.json too"]


def test_the_report_has_both_and_its_result_is_that_of_the_weights(averaged: Path) -> None:
    from powertrain.train import report

    read = report.Run(averaged)
    assert {line["weights"] for line in read.overall} == {"raw"} and len(read.overall) == 4
    table = report.evaluations([read])[0]
    assert "<td>overall</td>" in table and "<td>overall (average)</td>" in table
    assert f"{read.overall[-1]['loss']:.4f}" in report.summary([read])


@pytest.mark.parametrize("window", ["0", "-0.1", "1.5", "nan"])
def test_a_window_that_is_no_share_is_refused(tiny: Callable[..., list[str]], window: str) -> None:
    with pytest.raises(ConfigError, match=r"average.window is .*; it is a share of the tokens seen"):
        composed(tiny(f"average.window={window}"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("engine", "precision"),
    [("ddp", "bf16"), ("zero1", "bf16"), ("zero2", "bf16"), ("zero3", "bf16"), ("zero3_offload", "fp32")],
)
def test_on_every_engine(
    tiny: Callable[..., list[str]], run: Callable[..., Path], tmp_path: Path, engine: str, precision: str
) -> None:
    """Begun by one process, continued by two ranks, ended by one; the losses are those of the same without it."""
    settings = (*SETTINGS, f"precision={precision}", "batch.micro_sequences=2")
    for name, more in (("with", (f"average.window={WINDOW}",)), ("without", ())):
        run(f"run.name={name}", *settings, *more, "run.tokens=1024")
        done = launch(tiny(f"run.name={name}", *settings, *more, "run.tokens=3072"), ranks=2, engine=engine)
        assert done.returncode == 0, done.stdout + done.stderr
        run(f"run.name={name}", *settings, *more)
    averaged, alone = tmp_path / "with", tmp_path / "without"
    lines, others = (without_timing(read_lines(folder / "metrics.jsonl")) for folder in (alone, averaged))
    assert len(lines) == LAST and lines == others
    lines, others = (read_lines(folder / "evals.jsonl") for folder in (alone, averaged))
    assert lines == [line for line in others if line["weights"] == "raw"]
    for name, size in sizes(averaged).items():
        for step in (4, 5, 8, LAST):
            average = stored(averaged, step, "average", name, size)
            torch.testing.assert_close(average, by_hand(averaged, name, size, WINDOW, step), rtol=1e-5, atol=1e-7)
    # What two ranks measured of the average is what one process measures of its export.
    with pytest.raises(SystemExit) as ended:
        export([str(averaged), "--average", "--step", "8"])
    assert not ended.value.code
    init_from = f"run.init_from={averaged / 'model-8-average'}"
    begun = run("run.name=from-it", f"precision={precision}", init_from, "evaluation.every=100")
    losses = {(line["step"], line["weights"], line["corpus"]): line["loss"] for line in others}
    (first,) = (line for line in read_lines(begun / "evals.jsonl") if (line["step"], line["corpus"]) == (0, "overall"))
    measured, raw = losses[8, "average", "overall"], losses[8, "raw", "overall"]
    assert first["loss"] == pytest.approx(measured, rel=1e-4) and abs(measured - raw) > 1e-3 * raw
    found = json.loads((averaged / "checkpoints/step-00000008/state.json").read_text())
    assert (found["engine"]["ranks"], found["average"]) == (2, WINDOW)
