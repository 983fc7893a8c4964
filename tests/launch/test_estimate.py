"""launch.estimate: its arithmetic against closed forms and a real run, and what it refuses."""

from __future__ import annotations

import io
import math
import random
import shlex
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from powertrain.data.tokens import TokenWriter
from powertrain.launch import estimate
from powertrain.launch.estimate import learning_rate, time
from powertrain.train.check import batch_doubts, check_batch
from powertrain.train.compose import composed

TINY = ["+experiment=proxy_tiny", "cluster.gpu=cpu"]


def ran(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    with pytest.raises(SystemExit) as ended:
        estimate.main([*arguments])
    captured = capsys.readouterr()
    # As one line, whatever the width.
    return int(ended.value.code or 0), " ".join((captured.out + captured.err).split())


def test_a_run_that_would_run(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    plot = tmp_path / "rates.png"
    code, said = ran(capsys, *TINY, f"data.cache_dir={tmp_path}", "cluster.peak=1e9", "--plot", str(plot), "--ramp")
    assert code == 0
    assert "480 steps" in said and "plain is the simplest that fits" in said
    assert "cost" not in said  # no price, no line
    assert "batch.sequences=8 'batch.ramp=[]'" in said and "critical" in said
    assert plot.stat().st_size > 1000
    assert not [path for path in tmp_path.iterdir() if path != plot]  # nothing was prepared


def test_everything_wrong_is_said_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    code, said = ran(
        capsys,
        *TINY,
        "model.num_attention_heads=3",
        "schedule.warmup_tokens=999_999_999",
        "precision=fp8",
        "+data.mixture.nowhere=1",
        "run.name=..",
    )
    assert code == 1
    for part in ("num_attention_heads 3", "never leave warmup", "fp8", "'nowhere'", "run.name is '..'", "5 error(s)"):
        assert part in said


def test_values_that_others_are_divided_by(capsys: pytest.CaptureFixture[str]) -> None:
    code, said = ran(capsys, *TINY, "model.num_attention_heads=0", "batch.sequences=0")
    assert code == 1 and "2 error(s)" in said


def test_data_is_looked_at_and_not_made(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with TokenWriter(tmp_path / "corpus", np.dtype("<u2")) as writer:
        writer.add(np.zeros(64 * 100 + 1, np.uint16))
    corpora = f"data.corpora={{a:{{source:tokens,path:{tmp_path}/corpus}},b:{{source:text,path:{tmp_path}/*.txt}}}}"
    code, said = ran(capsys, *TINY, "data=none", corpora)
    assert code == 1 and f"No file matches '{tmp_path}/*.txt'" in said
    only = f"data.corpora={{a:{{source:tokens,path:{tmp_path}/corpus}}}}"
    run = [*TINY, "data=none", only, "run.tokens=64_000", "schedule.warmup_tokens=640"]
    code, said = ran(capsys, *run)
    assert code == 1 and "name the tokenizer" in said
    code, said = ran(capsys, *run, "data.tokenizer.path=someone/on-the-hub")
    assert code == 0 and "a has 6.4k tokens, and the run sees them 10.0 times" in said
    assert "epochs a 10.00 of 6.4k tokens" in said
    (tmp_path / "b.txt").write_text("b" * 6400)
    two = f"data.corpora={{a:{{source:tokens,path:{tmp_path}/corpus}},b:{{source:text,path:{tmp_path}/b.txt}}}}"
    half = ("data.tokenizer.path=someone/on-the-hub", two, "data.mixture={a:3,b:1}", "run.tokens=3_200")
    code, said = ran(capsys, *run, *half, "schedule.warmup_tokens=64")
    assert code == 0 and "epochs a 0.38 of 6.4k tokens; b at least 0.12 of at most 6.4k tokens" in said


def test_vocabulary_batch_and_parts_beyond_the_end(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, said = ran(
        capsys,
        *TINY,
        f"data.cache_dir={tmp_path}",
        "data.tokenizer.vocab_size=600",
        "cluster.gpus=3",
        "batch.ramp=[{from_tokens:300_000,sequences:24}]",
        "model.model_type=granitemoe",
        "model.num_local_experts=4",
        "model.num_experts_per_tok=1",
        "schedule.max_lr=0.0002",
    )
    assert code == 1
    assert "Warning: The batch is above the schedule's critical batch in 100% of the run" in said
    assert "Warning: model.num_experts_per_tok is 1" in said
    assert "has 600 tokens, and model.vocab_size is 512" in said
    assert "does not split into micro-batches of 8 on 3 rank(s)" in said
    assert "batch.ramp has a part from 300,000 tokens on" in said


def test_what_does_not_fit(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, said = ran(capsys, *TINY, f"data.cache_dir={tmp_path}", "cluster.memory=1e6")
    assert code == 1 and "batch.micro_sequences=8 fits 90% of 1.0 MB with none of plain" in said


@pytest.mark.parametrize(
    ("setting", "part"),
    [
        ("cluster.gpus=0", "greater than zero"),
        ("cluster.gpu=H1000", "none of H200"),
        ("cluster.gpsu=4", "gpsu"),
        ("cluster.mfu=40", "at most 1"),
        ("cluster.gpus=many", "gpus"),
        ("--plot", "expected one argument"),
        ("--json", "no option"),
    ],
)
def test_bad_usage(capsys: pytest.CaptureFixture[str], setting: str, part: str) -> None:
    code, said = ran(capsys, *TINY, setting)
    assert code == 2 and part in said


@pytest.mark.parametrize("ramp", ["[]", "[{from_tokens:1000,sequences:16},{from_tokens:40_000,sequences:64}]"])
def test_steps_are_those_of_the_loop(ramp: str) -> None:
    config = composed(["+experiment=proxy_tiny", "run.tokens=100_000", f"batch.ramp={ramp}"])
    tokens = steps = last = 0
    while tokens < config.run.tokens:
        last = tokens
        tokens += config.sequences_at(tokens) * config.data.sequence_length
        steps += 1
    assert time.steps_of(config) == (steps, last)


def test_the_cap_is_released_where_the_rate_leaves_it() -> None:
    config = composed(["+experiment=powermoe_3b"])
    release, schedule = learning_rate.cap_release(config), config.make_schedule()
    assert release == pytest.approx((1024 * 4 / 0.02) ** (1 / 0.51))
    assert schedule(tokens=int(release * 0.999), batch=1024) == 0.02 > schedule(tokens=int(release * 1.01), batch=1024)
    growing = composed(["+experiment=powermoe_3b", "batch.ramp=[{from_tokens:1_000_000_000,sequences:2048}]"])
    assert learning_rate.cap_release(growing) == pytest.approx((2048 * 4 / 0.02) ** (1 / 0.51))


def test_goodput_is_best_at_young_and_dalys_interval() -> None:
    standing, between, restart = 5.0, 50_000.0, 600.0
    best = math.sqrt(2 * standing * between)
    share = {factor: time.goodput(factor * best, standing, between, restart) for factor in (0.8, 1.0, 1.25)}
    assert max(share, key=lambda factor: share[factor]) == 1.0
    # Of each interval 5 s, and of each 50,000 s a restart and half an interval.
    lost = 5 / best + (600 + best / 2) / 50_000
    assert share[1.0] == pytest.approx(1 - lost, abs=2e-3)


def test_a_batch_that_grows_can_bring_the_cap_back() -> None:
    # At a batch of 1 (× 4096 tokens) the cap of 0.02 lets go at 32k tokens; one of 4 brings it back at 60k, until 492k.
    settings = ["+experiment=quickstart", "run.tokens=800_000", "schedule.decay.tokens=50_000"]
    ramp = "batch.ramp=[{from_tokens:60_000,sequences:64}]"
    config = composed([*settings, "batch.sequences=16", ramp, "schedule.warmup_tokens=4096"])
    schedule, release = config.make_schedule(), learning_rate.cap_release(config)
    assert release is not None
    at_cap = [
        n for n in range(4096, 740_000, 4096) if schedule(tokens=n, batch=config.beta(config.sequences_at(n))) == 0.02
    ]
    assert at_cap[-1] <= release < at_cap[-1] + 4096
    assert any(n < 60_000 for n in at_cap) and any(n > 60_000 for n in at_cap)


# ------------------------------------------------------------------------------------ a batch that follows the law


def pasted(settings: list[str], ranks: int) -> list[str]:
    """The settings that --ramp prints of a run."""
    out = io.StringIO()
    learning_rate.ramp_section(Console(file=out, width=100), composed(settings), ranks)
    (line,) = [line for line in out.getvalue().splitlines() if "batch.ramp=" in line]
    return shlex.split(line)


@pytest.mark.parametrize("number", range(8))
def test_the_ramp_to_paste_follows_the_critical_batch(number: int) -> None:
    draw = random.Random(number)
    ranks, micro, length = draw.choice([1, 2, 3, 8]), draw.choice([1, 2, 5]), draw.choice([64, 256, 1000])
    unit = micro * ranks
    most = unit * draw.choice([7, 16, 50])
    tokens = draw.randrange(200, 400) * most * length
    settings = [
        *("+experiment=proxy_tiny", f"data.sequence_length={length}", f"run.tokens={tokens}"),
        *(
            f"batch.sequences={most}",
            f"batch.micro_sequences={micro}",
            f"schedule.cap={draw.choice(['hard', 'smooth'])}",
        ),
        *(f"schedule.a={draw.uniform(0.5, 8)}", f"schedule.b={draw.uniform(-0.6, -0.3)}"),
        *("schedule.decay.tokens=" + str(draw.choice([0, tokens // 5])), "schedule.warmup_tokens=0"),
        f"schedule.batch_exponent={draw.choice([1, 1, 0.5])}",
    ]
    settings += draw.choice([[], [f"run.tokens_seen={tokens // 3}", f"schedule.rewarmup.tokens={tokens // 50}"]])
    # A cap that lets go of the largest batch somewhere from 1/4 of the run on to beyond its end.
    given, at = composed(settings), int(draw.uniform(0.25, 1.5) * tokens)
    power = learning_rate.check_followed(given)
    cap = power.a * given.beta(most) ** power.batch_exponent * at**power.b
    settings.append(f"schedule.max_lr={cap}")
    config = composed([*settings, *pasted(settings, ranks)])  # is taken
    check_batch(config, ranks)
    power = learning_rate.check_followed(config)
    ends = config.end_tokens if power.decay is None else power.decay.start
    begun, clock, sizes = 0, config.run.tokens_seen, []
    while begun < tokens:
        size = config.sequences_at(clock)
        at_critical = [power.critical_batch(clock) / config.beta(each) for each in (size, 2 * size)]
        assert size == unit or at_critical[0] >= 1
        assert 2 * size > most or at_critical[1] < 1 or clock >= ends  # no later than it could
        sizes += [size] if not sizes or sizes[-1] != size else []
        assert clock < ends or sizes[-1] == size
        begun, clock = begun + size * length, clock + size * length
    assert sizes == [sizes[0] * 2**n for n in range(len(sizes))] and sizes[-1] <= most
    assert sizes == [config.batch.sequences, *(phase.sequences for phase in config.batch.ramp)]
    assert not any("1.35 nats" in doubt for doubt in batch_doubts(config))


def test_where_a_ramp_follows_by_hand() -> None:
    # s sequences of 64 tokens are β = s / 64, and the critical batch is 0.02 / 4 · √n: n = (200 β)².
    settings = ["+experiment=proxy_tiny", "batch.sequences=64", "schedule.warmup_tokens=0", "schedule.decay.tokens=0"]
    settings += ["run.tokens=4_000_000", "schedule.b=-0.5"]
    first, *phases = pasted(settings, 1)
    # Of 16 from 2,500 tokens on: after 5 steps of 512; of 32 from 10,000 and of 64 from 40,000.
    assert first == "batch.sequences=8"
    assert phases == [
        "batch.ramp=[{from_tokens:2560,sequences:16},{from_tokens:10752,sequences:32},{from_tokens:41472,sequences:64}]"
    ]
    decays = ["run.tokens=50_000", "schedule.decay.tokens=10_000"]  # from 40,000 on
    _, phases_before = pasted([*settings, *decays], 1)
    assert phases_before == "batch.ramp=[{from_tokens:2560,sequences:16},{from_tokens:10752,sequences:32}]"
    one_step = "batch.ramp=[{from_tokens:1024,sequences:64}]"  # the critical batch is 0 before it
    assert pasted([*settings, "schedule.max_lr=1000"], 2) == ["batch.sequences=16", one_step]
    later = ["run.tokens_seen=40_000", "schedule.rewarmup.tokens=1000"]
    assert pasted([*settings, *later], 1) == ["batch.sequences=64", "batch.ramp=[]"]


@pytest.mark.parametrize(
    ("settings", "ranks", "said"),
    [
        (["batch.micro_sequences=64"], 1, "Twice that is more than the run's batch, 64"),
        (["batch.sequences=48"], 1, "The run's largest, 48, is none of them"),
        (["batch.sequences=1024"], 1, "does not reach 1,024 before"),  # at √n = 200 · 16: 10.24M tokens
        (["run.tokens_seen=400_000_000"], 1, "larger than the run's from its first step on"),
    ],
)
def test_a_ramp_says_why_it_does_not_grow_further(settings: list[str], ranks: int, said: str) -> None:
    out = io.StringIO()
    base = ["+experiment=proxy_tiny", "batch.sequences=64", "schedule.warmup_tokens=0", "run.tokens=4_000_000"]
    config = composed([*base, "schedule.b=-0.5", "schedule.decay.tokens=0", *settings], checked=False)
    learning_rate.ramp_section(Console(file=out, width=1000), config, ranks)
    assert said in out.getvalue()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ([], ["max_lr is never reached", "The warmup takes 50%"]),
        (["schedule.cap=smooth"], ["stays below half of max_lr", "The warmup takes 50%"]),
        (["run.tokens_seen=60_000"], ["max_lr is never reached", "The warmup takes 40%"]),
        (["run.tokens_seen=300_000"], []),  # it lies behind
    ],
)
def test_warnings_about_a_warmup_are_about_what_of_it_lies_ahead(settings: list[str], said: list[str]) -> None:
    base = ["+experiment=proxy_tiny", "run.tokens=600_000", "schedule.warmup_tokens=300_000"]
    found = list(learning_rate.schedule_warnings(composed([*base, *settings], checked=False)))
    assert len(found) == len(said) and all(map(str.__contains__, found, said))


def test_a_ramp_of_what_has_no_critical_batch(capsys: pytest.CaptureFixture[str]) -> None:
    for settings in (["schedule=wsd", "schedule.lr=0.01"], ["schedule.batch_exponent=0"]):
        code, said = ran(capsys, *TINY, "--ramp", *settings, "schedule.warmup_tokens=100")
        assert code == 2 and "has none" in said and "--ramp" in said


def test_the_picture_has_the_batch_and_the_critical_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    config = composed(["+experiment=proxy_tiny", "batch.ramp=[{from_tokens:100_000,sequences:16}]"])
    kept = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, dpi: kept.append(figure))
    learning_rate.draw(config, tmp_path / "rates.png")
    batch, critical = kept[0].axes[1].lines
    tokens = np.array(critical.get_xdata())
    assert (np.array(batch.get_ydata()) == np.where(tokens < 100_000, 0.125, 0.25)).all()
    assert np.array(critical.get_ydata())[1:] == pytest.approx(0.005 * tokens[1:] ** 0.51)
