"""metrics.jsonl and evals.jsonl: whatever stands in them, and however long they are."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from powertrain.train import folder, resume, track
from powertrain.train.config import Config
from powertrain.train.errors import ConfigError
from powertrain.train.export import facts_of
from powertrain.train.state import State
from powertrain.train.track import Tracker, read_lines

BAD = [
    b'{"step": 4, "lm_loss"',  # cut short
    b"",
    b"\x00\x00\x00",
    b"\xff\xfe{}",
    b"[1, 2]",
    b"null",
    b'"step"',
    b"{}",
    b'{"step": "4"}',
    b'{"step": 4.5}',
    b'{"step": NaN}',
    b'{"step": true}',
    b'{"step": null}',
    b'{"step": -1}',
    b'{"step": {}}',
    b'{"step": 1' + b"0" * 400 + b"}",
    b'{"step": 1' + b"0" * 5000 + b"}",
    b'{"step": 4, "corpus": ["a"]}',
    b'{"step": ' + b"[" * 100_000,
]


def line(step: int, corpus: str | None = None) -> bytes:
    return json.dumps({"step": step, "lm_loss": step / 2} | ({"corpus": corpus} if corpus else {})).encode()


def test_lines_that_no_run_writes_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    good = [line(step) for step in range(1, 1 + len(BAD))]
    path.write_bytes(b"\n".join(itertools.chain(*zip(good, BAD, strict=True))) + b"\n" + line(3, "words") + b"\n")
    steps = [*range(1, 4), 3, *range(4, 1 + len(BAD))]
    assert [entry["step"] for entry in track.read_lines(path)] == steps
    spread, said = track.read_spread(path)
    assert spread == track.read_lines(path)
    assert said == f"{len(BAD) - 1} line(s) of metrics.jsonl cannot be read and are left out."  # and a blank one
    assert [entry["step"] for entry in track.read_back(path)] == [3, *reversed(range(1, 1 + len(BAD)))]
    assert track.read_spread(tmp_path / "none") == ([], "")


def test_the_last_line_of_a_step_counts(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "n": 0}\n{"step": 2, "n": 1}\n{"step": 2, "n": 2}\n')
    assert [entry["n"] for entry in track.read_lines(path)] == [0, 2]


def test_what_lies_behind_a_checkpoint_is_cut_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the definition: everything up to the last line that can be read and is of that step or before."""
    path, draw = tmp_path / "metrics.jsonl", random.Random(0)
    bad = [text for text in BAD if len(text) < 100]
    for _ in range(100):
        monkeypatch.setattr(track, "BLOCK", draw.choice([1, 7, 64, 1 << 16]))
        steps = sorted(draw.choices(range(1, 20), k=draw.randint(0, 12)))
        lines = [draw.choice([line(step), line(step), draw.choice(bad)]) + b"\n" for step in steps]
        text = b"".join(lines) + draw.choice([b"", b"", line(19)[:9], line(19)])
        path.write_bytes(text)
        at = draw.randint(0, 20)
        whole = text.splitlines(keepends=True)
        kept = [i for i, each in enumerate(whole) if (e := track._entry(each)) is not None and e["step"] <= at]
        expected = b"".join(whole[: kept[-1] + 1] if kept else [])
        dropped = whole[kept[-1] + 1 if kept else 0 :]
        unreadable = track.cut_after(path, at)
        assert path.read_bytes() == expected + (b"" if not expected or expected.endswith(b"\n") else b"\n")
        torn = [each for each in dropped if each.endswith(b"\n") and each.strip() and track._entry(each) is None]
        assert unreadable == len(torn)


def test_going_on_reads_no_more_than_it_drops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The head of the file is a terabyte that takes no room: nobody could read it."""
    monkeypatch.setattr(track, "PLACES", 50)
    path, head = tmp_path / "metrics.jsonl", 1 << 40
    with open(path, "wb") as file:
        file.truncate(head)
        file.seek(head)
        file.write(b"\n" + b"".join(line(step) + b"\n" for step in range(1, 2001)))
    assert [entry["step"] for entry in itertools.islice(track.read_back(path), 3)] == [2000, 1999, 1998]
    assert track.cut_after(path, 1500) == 0
    assert next(track.read_back(path))["step"] == 1500
    assert path.stat().st_size == head + 1 + sum(len(line(step)) + 1 for step in range(1, 1501))
    lines, said = track.read_spread(path)
    assert lines[-1]["step"] == 1500 and "spread over it" in said


def test_a_report_of_a_long_run_reads_places_that_are_spread_over_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(track, "PLACES", 100)
    monkeypatch.setattr(track, "PLACE_BYTES", 200)
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"".join(line(step) + b"\n" for step in range(1, 20_001)))
    lines, said = track.read_spread(path)
    steps = [entry["step"] for entry in lines]
    assert steps[0] == 1 and steps[-1] == 20_000 and steps == sorted(set(steps))
    assert 500 < len(steps) < 1000
    assert f"{len(steps)} of its lines" in said
    assert max(b - a for a, b in itertools.pairwise(steps)) < 20_000 / 50 * 1.5
    assert all(b <= 1.5 * a + 1 for a, b in itertools.pairwise(steps))  # nowhere sparse over a logarithmic axis


CORPUS = {"step": 12, "tokens": 96, "corpus": "words", "loss": 3.5, "bits_per_byte": 1.25, "targets": 7}
TASK = {"step": 12, "tokens": 96, "corpus": "piqa", "acc": 0.5}
CHANGES: list[tuple[dict[str, Any], int]] = [
    ({}, 3),
    ({"loss": None, "bits_per_byte": None}, 3),  # not finite
    ({"loss": "3.5"}, 0),
    ({"bits_per_byte": []}, 0),
    ({"targets": None}, 0),
    ({"targets": 7.5}, 0),
    ({"corpus": "code"}, 0),  # none of all together
]


@pytest.mark.parametrize(("change", "count"), CHANGES)
def test_a_finished_evaluation_is_told_again_only_when_it_is_whole(
    tmp_path: Path, change: dict[str, Any], count: int
) -> None:
    lines = [{**CORPUS, "step": 6}, CORPUS, {**CORPUS, "corpus": "overall", **change}, TASK]
    (tmp_path / "evals.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines))
    found = track.Tracker.evaluations(SimpleNamespace(folder=tmp_path), 12)  # type: ignore[arg-type]
    assert len(found) == count
    told = facts_of(State(step=12), lines[1:])
    assert told["validation loss, words"].startswith("3.5000 nats a token")
    if count and change:
        assert told["validation loss, overall"] == "nan nats a token (7 targets)"
    assert found == [] or found[-1]["corpus"] == "overall"


def test_the_lines_of_the_average_are_beside_those_of_the_weights(tmp_path: Path) -> None:
    """Also beside those of an earlier version, which do not say what they are of."""
    path = tmp_path / "evals.jsonl"
    average = {"weights": "average", "loss": 3.25}
    overall = {**CORPUS, "corpus": "overall"}
    wanted = [CORPUS, TASK, overall, *({**line, **average} for line in (CORPUS, overall))]
    for lines in (wanted, [wanted[i] for i in (3, 1, 0, 4, 2)], [{**overall, "weights": "raw", "loss": 9.0}, *wanted]):
        path.write_text("".join(json.dumps(each) + "\n" for each in lines))
        found = track.Tracker.evaluations(SimpleNamespace(folder=tmp_path), 12)  # type: ignore[arg-type]
        assert sorted(map(str, found)) == sorted(map(str, wanted))
        assert found[2] == wanted[2] and found[-1] == wanted[-1]
        assert len(track.read_lines(path)) == 5
    told, averaged = (facts_of(State(step=12), wanted, window)["validation loss, words"] for window in (None, 0.1))
    assert told.startswith("3.5000") and averaged.startswith("3.2500")
    path.write_text("".join(json.dumps(each) + "\n" for each in wanted[:-1]))  # none of all together
    assert not track.Tracker.evaluations(SimpleNamespace(folder=tmp_path), 12)  # type: ignore[arg-type]
    path.write_text(json.dumps({**CORPUS, "weights": 1}) + "\n")
    assert not track.read_lines(path)


# ------------------------------------------------------------------------------------- the steps taken before a change


def walked(then: Config, now: Config, tokens: int) -> bool:
    """Whether all steps up to `tokens` were taken with the same batch and rate, one after the other."""
    old, new = then.make_schedule(), now.make_schedule()
    n = 0
    while n < tokens:
        sequences = then.sequences_at(n)
        beta = then.beta(sequences)
        if sequences != now.sequences_at(n) or old(tokens=n, batch=beta) != new(tokens=n, batch=beta):
            return False
        n += sequences * then.data.sequence_length
    return True


def drawn(draw: random.Random, config: Config) -> Config:
    """A run of some 400 steps of 128 tokens under any schedule, ramp, decay and second warmup."""
    from powertrain.train.config import RampConfig

    config.batch.sequences = 8
    starts = sorted(draw.sample([2000, 10_000, 10_100, 20_000], draw.randint(0, 2)))
    config.batch.ramp = [RampConfig(start, draw.choice([8, 16, 24])) for start in starts]
    config.run.tokens = draw.choice([50_000, 60_000])
    decay = {"start": draw.choice([None, 30_000, 30_080]), "tokens": draw.choice([0, 5000, 6000])}
    decay |= {"shape": draw.choice(["linear", "exponential"]), "floor": 0.0}
    power = {"a": draw.choice([0.1, 0.2]), "b": -0.51, "max_lr": draw.choice([0.01, 0.0101]), "batch_exponent": 1.0}
    config.schedule = {
        "power": {"name": "power", **power, "decay": decay},
        "wsd": {"name": "wsd", "lr": draw.choice([0.01, 0.01, 0.011]), "decay": decay},
        "cosine": {"name": "cosine", "lr": 0.01, "total_tokens": draw.choice([None, 60_000]), "floor": 0.1},
        "constant": {"name": "constant", "lr": 0.01},
    }[draw.choice(["power", "power", "wsd", "cosine", "constant"])]
    config.schedule["warmup_tokens"] = draw.choice([0, 1000, 1001])
    config.schedule["rewarmup"] = {"start": draw.choice([12_000, 12_100]), "tokens": draw.choice([0, 0, 2000])}
    return config


def test_a_few_steps_tell_what_all_steps_tell(small_config: Callable[..., Config]) -> None:
    draw, found = random.Random(0), []
    while len(found) < 400:
        seed = draw.random()
        then = drawn(random.Random(seed), small_config())
        now = drawn(random.Random(draw.choice([seed, draw.random()])), small_config())
        for part in draw.sample(["run", "batch", "schedule"], draw.randint(0, 2)):
            setattr(now, part, getattr(then, part))  # so that differences are few
        tokens, length, taken = draw.choice([0, 128, 1024, 5000, 12_000, 31_000, 45_000]), 16, 0
        while taken < tokens:
            taken += then.sequences_at(taken) * length
        try:
            same = walked(then, now, taken)
        except ConfigError:  # a decay inside a warmup
            continue
        found.append(same)
        if same:
            resume.check_steps_taken(then, now, State(tokens=taken), {})
        else:
            with pytest.raises(ConfigError, match="was taken"):
                resume.check_steps_taken(then, now, State(tokens=taken), {})
    assert 100 < sum(found) < 300


def test_a_run_of_ten_billion_steps_is_compared_at_once(small_config: Callable[..., Config]) -> None:
    def counted(config: Config) -> tuple[Config, list[int]]:
        asked: list[int] = []
        schedule = config.make_schedule()

        class Counting:
            warmup_tokens = schedule.warmup_tokens
            phase = schedule.phase
            edges = schedule.edges

            def __call__(self, *, tokens: int, batch: float) -> float:
                asked.append(tokens)
                return schedule(tokens=tokens, batch=batch)

        made: Any = Counting()
        config.make_schedule = lambda: made  # type: ignore[method-assign]
        return config, asked

    long = ("run.tokens=2_000_000_000_000", "schedule.decay.tokens=0", "batch.sequences=8")
    then, asked = counted(small_config(*long))
    now, _ = counted(small_config(*long))
    resume.check_steps_taken(then, now, State(tokens=128 * 10**10), {})
    assert max(asked) == 128 * (10**10 - 1)
    assert len(asked) < 200


# ------------------------------------------------------------------------------------------- records that are changed


@pytest.mark.parametrize("text", ["{}", '{"starts": []}', '{"starts": 5}', '{"starts": [3]}', "[", ""])
def test_the_end_of_a_tracker_is_no_reason_to_end_a_run_whose_record_was_edited(tmp_path: Path, text: str) -> None:
    path = tmp_path / "run.json"
    path.write_text(text)
    folder.add_to_start(path, "trackers_ended", {"wandb": "left"})
    assert path.read_text() == text
    path.write_text('{"starts": [{"from": null}]}')
    folder.add_to_start(path, "trackers_ended", {"wandb": "left"})
    assert json.loads(path.read_text())["starts"] == [{"from": None, "trackers_ended": {"wandb": "left"}}]


def test_a_record_that_is_removed_while_a_run_trains_begins_anew_and_says_so(
    run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    step = Tracker.step

    def without_its_file(tracker: Tracker, record: dict[str, Any]) -> None:
        if record["step"] == 7:
            (tracker.folder / "metrics.jsonl").unlink()
        step(tracker, record)

    monkeypatch.setattr(Tracker, "step", without_its_file)
    folder = run()
    assert [line["step"] for line in read_lines(folder / "metrics.jsonl")] == [7, 8, 9, 10, 11, 12]
    assert capsys.readouterr().out.count("metrics.jsonl has been removed while the run trains") == 1
