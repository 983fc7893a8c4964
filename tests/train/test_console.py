"""What a person sees of a run."""

from __future__ import annotations

import io
from types import SimpleNamespace
from typing import Any

import pytest

from powertrain.train import console
from powertrain.train.compose import composed
from powertrain.train.console import Progressing, duration, human
from powertrain.train.state import State


def watched(
    terminal: bool, steps: int, monkeypatch: pytest.MonkeyPatch, change: tuple[str, ...] = (), **metrics: Any
) -> str:
    """What is shown of a run of `steps` steps of 4096 tokens at 2048 tokens a second."""
    out = io.StringIO()
    monkeypatch.setattr(
        console, "_Console", lambda stderr: console.Console(file=out, force_terminal=terminal, width=100)
    )
    tokens = steps * 4096
    decay = "schedule.decay.tokens=0"
    config = composed(["+experiment=quickstart", f"run.tokens={tokens}", decay, "schedule.warmup_tokens=0", *change])
    state = State(tokens=0)
    with Progressing(config, SimpleNamespace(is_main=True), state) as progress:  # type: ignore[arg-type]
        for _ in range(steps):
            state.advance(16, 256, False)
            record = {"lm_loss": 4.25, "lr": 0.01, "phase": "trunk", "at_cap": False, "tokens_per_second": 2048.0}
            progress.step({**record, "mfu": None, **metrics}, state)
        progress.log("a line above the bar")
    return out.getvalue()


def test_a_file_gets_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = watched(False, 400, monkeypatch, expert_load={"max_over_mean": 1.234}).splitlines()
    assert 15 <= len(lines) <= 22
    assert "\x1b" not in "".join(lines)
    # 399 steps of 2 s are left; the cap of the quickstart is 0.02.
    assert lines[0] == (
        "step       1  4.1k tokens (0%, 13 min left)  lm_loss 4.250  lr 1.00e-02 (trunk, 50% of the cap)  "
        "2.05k tokens/s  busiest expert 1.23 × mean"
    )
    assert lines[-2].startswith("step     400  1.64M tokens (100%, 0 s left)")


def test_a_file_gets_a_line_of_a_long_run_by_time(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter(range(0, 10**6, 100))
    monkeypatch.setattr(console.time, "monotonic", lambda: next(seconds))
    monkeypatch.setattr(console, "LINE_SHARE", 1.0)
    assert len(watched(False, 60, monkeypatch).splitlines()) == 12  # each 600 s, the last step, and what was said


def test_a_terminal_gets_a_bar_and_what_a_device_does(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = watched(True, 3, monkeypatch, mfu=0.412, at_cap=True)
    assert "MFU 41%" in shown
    assert "lr 1.00e-02 (at the cap)" in shown
    assert "step 3  12.3k of 12.3k tokens" in shown
    assert "expert" not in shown  # a dense model has none


def test_a_smooth_cap_is_not_reached_and_its_critical_batch_is_passed(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = watched(False, 1, monkeypatch, ("schedule.cap=smooth",), at_cap=True)
    assert "lr 1.00e-02 (trunk, 50% of the cap, above the critical batch)" in shown


def test_collapsed_routing_is_said_once_and_when_it_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    step = 0

    def load(self: Progressing, record: dict[str, Any], state: State) -> None:
        nonlocal step
        step += 1
        # 8 in a row are a warmup's; 20 are told of, once, and 20 without end it.
        collapsed = 3 * (step in range(5, 13) or step in range(20, 60))
        original(self, {**record, "expert_load": {"max_over_mean": 4.0, "collapsed": collapsed}}, state)

    original = Progressing.step
    monkeypatch.setattr(Progressing, "step", load)
    monkeypatch.setattr(console, "LINE_SHARE", 1.0)
    said = watched(False, 100, monkeypatch).splitlines()
    warnings = [line for line in said if "Warning" in line or "no longer" in line]
    assert warnings[0].startswith("Warning: routing has collapsed, at step 39 in 3 of 4 layers")
    assert "(the busiest 4.00 × mean)" in warnings[0]
    assert warnings[1] == "Routing is no longer collapsed in any layer, at step 79."
    assert warnings[2].startswith("Warning: in 48 of 100 steps the routing of a layer was collapsed")
    assert len(warnings) == 3


@pytest.mark.parametrize(
    ("change", "costs"),
    [((), "2.56 nats and, with tied"), (("model.tie_word_embeddings=false",), "2.56 nats (docs")],
)
def test_a_first_loss_above_a_uniform_guess_is_explained(
    monkeypatch: pytest.MonkeyPatch, change: tuple[str, ...], costs: str
) -> None:
    """ln 4096 = 8.3178; σ√H/m = 0.1·√128/0.5 = 2.2627, and half its square 2.56."""
    said = watched(False, 2, monkeypatch, change, lm_loss=11.38)
    assert said.count("The loss begins at 11.38, above the 8.32 = ln 4096") == 1
    assert f"standard deviation of 2.26 costs {costs}" in said
    assert "begins" not in watched(False, 2, monkeypatch, change, lm_loss=8.4)


@pytest.mark.parametrize(
    "seconds, text",
    [
        (0.4, "0 s"),
        (89, "89 s"),
        (600, "10 min"),
        (3700, "1 h 02 min"),
        (7199, "2 h 00 min"),
        (86400 * 40, "40.0 days"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize("count, text", [(999, "999"), (1234567, "1.23M"), (3e12, "3T")])
def test_counts(count: float, text: str) -> None:
    assert human(count) == text
