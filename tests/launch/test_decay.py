"""`decay --predict`: by planted losses, and by decays of a tiny run."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from conftest import tiny_overrides, train_here
from omegaconf import OmegaConf

from powertrain.launch import branch, decay
from powertrain.launch.decay.predict import Decayed, held_out, predicted, reading_at, trunk_loss, trunk_points
from powertrain.train.compose import composed, load


def curve(n: float) -> float:
    return 3.0 + 40.0 * n**-0.4


TRUNK = [(n, curve(n)) for n in range(10_000, 1_000_001, 10_000)]


def planted(start: int, tokens: int, along: float = 0.03, length: float = 0.015) -> Decayed:
    """A decay whose gain on the trunk is linear in the logs of its start and of its share of the tokens before it."""
    gain = 0.02 + along * math.log(start / 100_000) + length * math.log(tokens / start / 0.1)
    loss = curve(start + tokens) - gain
    return Decayed(start, tokens, loss)


def test_the_trunks_loss_is_that_of_its_evaluations_nearby() -> None:
    for n in (60_000, 100_000, 512_345, 1_000_000, 1_200_000):
        assert trunk_loss(TRUNK, n) == pytest.approx(curve(n), abs=4e-3)
    draw = np.random.default_rng(0)
    noisy = [(n, loss + draw.normal(0, 0.01)) for n, loss in TRUNK]
    errors = [trunk_loss(noisy, n) - curve(n) for n in range(200_000, 900_000, 50_000)]
    assert np.std(errors) < 0.005  # half of one evaluation's
    line = [(n, 5 - math.log(n)) for n, _ in TRUNK]
    assert trunk_loss(line, 2_000_000) == pytest.approx(5 - math.log(2_000_000))


def test_a_planted_law_is_predicted() -> None:
    decays = [planted(100_000, 10_000), planted(200_000, 40_000), planted(400_000, 40_000)]
    for start, tokens in ((800_000, 80_000), (400_000, 100_000), (700_000, 35_000)):
        wanted = planted(start, tokens)
        assert predicted(TRUNK, decays, wanted) == pytest.approx(wanted.loss, abs=3e-3)
    # Of one share, to a token, nothing is known about others: the gain is that of this share.
    same = [planted(100_000, 10_000), planted(200_000, 20_000), planted(300_000, 30_001)]
    for few in (same, same[:2]):
        wanted, longer = planted(800_000, 80_000), planted(800_000, 160_000)
        assert predicted(TRUNK, few, wanted) == pytest.approx(wanted.loss, abs=3e-3)
        assert predicted(TRUNK, few, longer) == pytest.approx(longer.loss + 0.015 * math.log(2), abs=4e-3)
    # Of one start neither.
    here = [planted(100_000, 10_000), planted(100_000, 20_000)]
    wanted, later = planted(100_000, 40_000), planted(200_000, 20_000)
    assert predicted(TRUNK, here, wanted) == pytest.approx(wanted.loss, abs=3e-3)
    assert predicted(TRUNK, here, later) == pytest.approx(later.loss + 0.03 * math.log(2), abs=3e-3)


def test_an_error_is_that_of_a_decay_which_its_prediction_has_not_seen() -> None:
    places = ((100_000, 10_000), (200_000, 40_000), (500_000, 50_000), (600_000, 120_000))
    decays = [planted(*place) for place in places]
    assert held_out(TRUNK, decays[:2]) is None
    told = held_out(TRUNK, [*decays[:3], Decayed(*places[3], decays[3].loss + 0.5)])
    assert told is not None and told[3] == pytest.approx(decays[3].loss, abs=3e-3)
    assert abs(told[1] - decays[1].loss) > 0.1  # the odd one is among those that predict it


def test_a_step_is_where_the_clock_is_then() -> None:
    config = composed(
        [
            "+experiment=quickstart",
            "run.tokens_seen=1000",
            "batch.ramp=[{from_tokens: 10_000, sequences: 32}, {from_tokens: 100_000, sequences: 64}]",
        ]
    )
    n, step = 1000, 0
    while step < 40:  # as training advances
        assert reading_at(config, step) == n
        n, step = n + config.sequences_at(n) * 256, step + 1


# ---------------------------------------------------------------------------------------------------------- the verb


def verb(*arguments: str, of: ModuleType = decay) -> int:
    with pytest.raises(SystemExit) as ended:
        of.main(list(arguments))
    return int(ended.value.code or 0)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def runs(words: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trunk with evaluations, two decays off it, and one of another shape."""
    folder = tmp_path_factory.mktemp("runs")
    settings = ("schedule.decay.tokens=0", "checkpoint.every=3", "checkpoint.keep=9", "evaluation.every=1")
    trunk = train_here(tiny_overrides(words, cache, folder, "run.name=trunk", *settings))
    for at, tokens, shape in ((3, 512, "exponential"), (6, 512, "exponential"), (6, 1024, "linear")):
        asked = ("--at", str(at), "--tokens", str(tokens), "--shape", shape, "--name", f"{shape}-{at}")
        assert verb(str(trunk), *asked) == 0
    return folder


def predict(runs: Path, *arguments: str, at: int = 9, tokens: int = 600) -> int:
    return verb(str(runs / "trunk"), "--predict", "--at", str(at), "--tokens", str(tokens), *arguments)


def test_decays_of_a_run_predict_another(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = contents(runs)
    assert predict(runs) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert contents(runs) == before
    trunk = [json.loads(line) for line in (runs / "trunk/evals.jsonl").read_text().splitlines()]
    # It had come out of its warmup of 700 tokens at 768.
    points = [(line["tokens"], line["loss"]) for line in trunk if line["corpus"] == "overall" and line["tokens"] > 700]
    last = [json.loads((runs / f"exponential-{at}/evals.jsonl").read_text().splitlines()[-1]) for at in (3, 6)]
    decays = [Decayed(at * 256, 512, line["loss"]) for at, line in zip((3, 6), last, strict=True)]
    expected = predicted(points, decays, Decayed(9 * 256, 600))
    assert f"A decay of 600 tokens from step 9 (2.3k tokens) would end at a loss of {expected:.4f}." in told
    assert "With only 2 decays none can be held out, so no error can be given." in told
    assert "Left out: linear-6 has the shape linear, floor 0." in told
    assert "its start is outside the range of the others, by a factor of 1.5." in told  # 2,304 of 1,536 tokens
    # 600 / 2304 of 512 / 1536
    assert "its share of the tokens before it is outside the range of the others, by a factor of 1.3" in told


def test_a_running_average_is_no_evaluation_of_the_trunk(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(runs, tmp_path / "runs")
    for path in (tmp_path / "runs").glob("*-*/run.json"):
        path.write_text(path.read_text().replace(str(runs), str(tmp_path / "runs")))
    for path in (tmp_path / "runs").glob("*/evals.jsonl"):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        both = [*lines, *({**line, "weights": "average", "loss": 9.0} for line in lines)]
        path.write_text("".join(json.dumps(line) + "\n" for line in both))
    said = []
    for folder in (runs, tmp_path / "runs"):
        assert predict(folder) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1]


def test_a_third_decay_shows_the_error(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(runs, tmp_path / "runs")
    for path in (tmp_path / "runs").glob("*-*/run.json"):
        path.write_text(path.read_text().replace(str(runs), str(tmp_path / "runs")))
    third = tmp_path / "runs/linear-6/config.yaml"
    third.write_text(third.read_text().replace("shape: linear", "shape: exponential"))
    assert predict(tmp_path / "runs") == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "Predicted from the others, each of the 3 decays has an error of" in told
    # Whatever is not comparable is named.
    batch = tmp_path / "runs/exponential-3/config.yaml"
    batch.write_text(batch.read_text().replace("sequences: 8\n  micro", "sequences: 16\n  micro"))
    evals = tmp_path / "runs/linear-6/evals.jsonl"
    evals.write_text(evals.read_text().replace('"targets": ', '"targets": 9'))
    (tmp_path / "runs/exponential-6/exit.json").unlink()
    assert predict(tmp_path / "runs") == 2
    said = capsys.readouterr().err
    for reason in ("exponential-3 has another batch", "exponential-6 is not finished", "linear-6 was evaluated on 9"):
        assert reason in said


@pytest.mark.parametrize(
    ("arguments", "settings", "said"),
    [
        (("--shape", "linear"), {}, "Finished decays of the shape linear"),
        (("--shape", "sqrt"), {}, "Finished decays of the shape sqrt"),
        (("--floor", "0.1"), {}, "with floor 0.1 beside"),
        ((), {"at": 1}, "lies in its warmup"),
        ((), {"at": 14}, "the trunk was last evaluated at 3,072"),
        ((), {"tokens": 0}, "--tokens is 0"),
        ((), {"tokens": 256}, "a step of"),
        ((), {"at": 0}, "--at is 0"),
        ((), {"at": -5}, "--at is -5"),
        (("--name", "mine"), {}, "leave --name out"),
        (("optimizer.eps=1",), {}, "leave optimizer.eps=1 out"),
    ],
)
def test_what_cannot_be_predicted_is_refused(
    runs: Path, arguments: tuple[str, ...], settings: dict[str, int], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert predict(runs, *arguments, **settings) == 2
    assert said in capsys.readouterr().err


def test_decays_of_one_step_say_nothing_of_another(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(runs, tmp_path / "runs")
    for path in (tmp_path / "runs").glob("*-*/run.json"):
        path.write_text(path.read_text().replace(str(runs), str(tmp_path / "runs")))
    shutil.rmtree(tmp_path / "runs/exponential-3")
    other = tmp_path / "runs/linear-6/config.yaml"
    other.write_text(other.read_text().replace("shape: linear", "shape: exponential"))
    assert predict(tmp_path / "runs") == 2
    assert "All 2 decays" in capsys.readouterr().err
    assert predict(tmp_path / "runs", at=6) == 0


def test_a_trunk_without_evaluations_is_refused(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(runs / "trunk", tmp_path / "trunk")
    evals = tmp_path / "trunk/evals.jsonl"
    lines = [json.loads(line) for line in evals.read_text().splitlines()]
    of_all = [line for line in lines if line["corpus"] == "overall"]
    of_all[-1]["targets"] += 1  # as after a change of evaluation.sequences
    evals.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert predict(tmp_path) == 2
    said = capsys.readouterr().err
    assert "has 1 evaluations of its trunk with the number of targets of the last one, and " in said
    evals.unlink()
    assert predict(tmp_path) == 2
    assert "has 0 evaluations of its trunk. A prediction" in capsys.readouterr().err


def copied(runs: Path, to: Path, recorded: Path | None = None) -> Path:
    """A copy of `runs`, whose branches name their parent in `recorded`; default: in the copy."""
    shutil.copytree(runs, to)
    for path in to.glob("*-*/run.json"):
        path.write_text(path.read_text().replace(str(runs), str(recorded or to)))
    return to


def test_runs_that_were_moved_together_are_known(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = []
    for folder in (runs, copied(runs, tmp_path / "here", recorded=tmp_path / "gone")):
        assert predict(folder) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1]
    # A branch names its parent's tokenizer, and has it, too.
    branched = tmp_path / "here/exponential-3"
    settings = branched / "config.yaml"
    settings.write_text(settings.read_text().replace(str(runs), str(tmp_path / "gone")))
    trunk = str(tmp_path / "here/trunk")
    assert verb(trunk, "--at", "3", "--tokens", "512", "--name", "exponential-3") == 0
    told = capsys.readouterr().out
    assert f"{tmp_path}/gone/trunk/tokenizer does not exist; the tokenizer is that in {branched}/tokenizer." in told
    assert "The run had finished: nothing is trained or evaluated again." in told
    # What has the parent's name and is still somewhere else is another run.
    assert predict(copied(runs, tmp_path / "there", recorded=runs)) == 2
    assert "trunk: 0; a prediction takes 2" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("tokens", "loss"),
    [("1280", "NaN"), ("1280", "Infinity"), ("1280", "null"), ("-9", "1.0"), ("0", "1.0"), ("9" * 40, "1.0")],
)
def test_an_evaluation_that_no_run_has_is_left_out(
    runs: Path, tmp_path: Path, tokens: str, loss: str, capsys: pytest.CaptureFixture[str]
) -> None:
    there = copied(runs, tmp_path / "runs")
    targets = json.loads((runs / "trunk/evals.jsonl").read_text().splitlines()[-1])["targets"]
    line = f'{{"step": 1, "tokens": {tokens}, "corpus": "overall", "loss": {loss}, "bits_per_byte": null, '
    with open(there / "trunk/evals.jsonl", "a") as file:  # in place of that of step 1, in the warmup
        file.write(f'{line}"targets": {targets}}}\n')
    said = []
    for folder in (runs, there):
        assert predict(folder) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1]


def test_the_loss_of_a_decay_is_that_at_its_end(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And not that of a branch that went on, at its floor or after a second warmup."""
    there = copied(runs, tmp_path / "runs")
    evals = there / "exponential-6/evals.jsonl"
    last = json.loads(evals.read_text().splitlines()[-1])
    assert last["tokens"] == 2048
    with open(evals, "a") as file:
        file.write(json.dumps({**last, "step": 9, "tokens": 2304, "loss": 1.0}) + "\n")
    said = []
    for folder in (runs, there):
        assert predict(folder) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1]
    settings = there / "exponential-6/config.yaml"
    warmed = OmegaConf.load(settings)
    warmed.schedule.rewarmup = {"start": 1024, "tokens": 256}
    OmegaConf.save(warmed, settings)
    assert predict(there) == 2
    assert "exponential-6 has another second warmup" in capsys.readouterr().err


def test_a_trunk_that_was_warmed_up_again_begins_there(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What came before may have been a decay, of which its settings no longer tell."""
    there = copied(runs, tmp_path / "runs")
    settings = there / "trunk/config.yaml"
    warmed = OmegaConf.load(settings)
    warmed.schedule.rewarmup = {"start": 1024, "tokens": 256}
    OmegaConf.save(warmed, settings)
    points, _ = trunk_points(there / "trunk", load(settings))
    assert [tokens for tokens, _ in points] == list(range(1280, 3073, 256))
    assert predict(there, at=3) == 2
    assert "before its second warmup, at 1,024 tokens" in capsys.readouterr().err
    assert predict(there, at=4) == 2
    assert "lies in its warmup" in capsys.readouterr().err


def test_a_name_of_a_run_that_is_no_branch_is_refused(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    there = copied(runs, tmp_path / "runs")
    for name in ("other", "other-1x", "other-2x"):
        shutil.copytree(there / "trunk", there / name)
        settings = OmegaConf.load(there / name / "config.yaml")
        settings.schedule = {"name": "constant", "lr": 0.01, "warmup_tokens": 700}
        OmegaConf.save(settings, there / name / "config.yaml")
    trunk = str(there / "trunk")
    assert verb(trunk, "--at", "6", "--tokens", "512", "--name", "other") == 2
    assert "other holds a run without a decay" in capsys.readouterr().err
    assert verb(trunk, "--at", "6", "--batch", "1x", "2x", "--name", "other", of=branch) == 2
    assert "other-1x holds a run without a decay" in capsys.readouterr().err
