import itertools
import math
import pickle
import subprocess
import sys
from decimal import Decimal, localcontext

import pytest

from powertrain import schedulers
from powertrain.schedulers import WITH_DECAY, WSD, Constant, Cosine, Decay, Power, Rewarmup, Schedule, build

B = 1_000_000_000
INFINITE_OR_NAN = [math.inf, -math.inf, math.nan]


def exact(value):
    """The decimal number that a person wrote, not the nearest double."""
    return Decimal(str(value))


def shape_by_hand(shape, x):
    if shape == "exponential":
        return ((1 - x).exp() - 1) / (Decimal(1).exp() - 1)
    if shape == "linear":
        return 1 - x
    if shape == "sqrt":
        return 1 - x.sqrt()
    # cosine: (1 + cos(pi x)) / 2 = sin(pi (1 - x) / 2)**2, by the sine's series
    angle = Decimal("3.14159265358979323846264338327950288419716939937510582097494459") * (1 - x) / 2
    sine = sum((-1) ** k * angle ** (2 * k + 1) / math.factorial(2 * k + 1) for k in range(30))
    return sine**2


def power_by_hand(n, beta, a, b, cap, c=1):
    """Equation 7."""
    if n == 0:
        return exact(cap)
    return min(exact(cap), exact(beta) ** exact(c) * exact(a) * Decimal(n) ** exact(b))


def equation_8_by_hand(n, trunk, warmup, start=None, length=None, shape="exponential", floor=0):
    """Equation 8, from a trunk that is a function of n."""
    if n < warmup:
        return Decimal(n) / warmup * trunk(warmup)
    if start is None or n <= start:
        return trunk(n)
    x = min(Decimal(n - start) / length, Decimal(1))
    return (exact(floor) + (1 - exact(floor)) * shape_by_hand(shape, x)) * trunk(start)


def release_by_hand(beta, a, b, cap, c=1):
    return (exact(beta) ** exact(c) * exact(a) / exact(cap)) ** (-1 / exact(b))


@pytest.fixture(autouse=True)
def sixty_digits():
    with localcontext() as context:
        context.prec = 60
        yield


def around(*points):
    return sorted({max(0, point + d) for point in points for d in (-1, 0, 1)})


def close(value, reference):
    """Within 1e-12 of the reference, relative; a reference of zero is met exactly."""
    assert isinstance(value, float)
    assert abs(Decimal(value) - reference) <= Decimal("1e-12") * abs(reference), (value, reference)


# ---------------------------------------------------------------- Power, equations 7 and 8

CASES = {
    "the paper's 1T run, leaving the cap at 26B": (1024, dict(), B, 900 * B, 100 * B),
    "released inside warmup": (1, dict(), B, 15 * B, B),
    "small": (8, dict(), 100_000, 10_000_000, 1_000_000),
    "still capped when the decay starts": (8, dict(), 100_000, 1_500_000, 300_000),
    "no warmup": (0.25, dict(a=0.3, b=-0.6, max_lr=0.01), 0, 1_000_000, 777_777),
    "the decay starts as warmup ends": (512, dict(), B, B, 3 * B),
    "the batch under a root": (128, dict(batch_exponent=0.5), 100_000, 2 * B, B),
    "a batch that is no power of two": (48.375, dict(a=4.6, b=-0.503), 12_345, 9_876_543, 1_234_567),
}


@pytest.mark.parametrize("shape", ["exponential", "linear", "cosine", "sqrt"])
@pytest.mark.parametrize("floor", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("case", CASES)
def test_power_is_equations_7_and_8_at_every_boundary(case, shape, floor):
    beta, fields, warmup, start, length = CASES[case]
    decay = Decay(start=start, tokens=length, shape=shape, floor=floor)
    schedule = Power(**fields, warmup_tokens=warmup, decay=decay)
    a, b = fields.get("a", 4), fields.get("b", -0.51)
    cap, c = fields.get("max_lr", 0.02), fields.get("batch_exponent", 1)
    release = int(release_by_hand(beta, a, b, cap, c))
    points = [
        0,
        1,
        warmup,
        warmup // 3,
        release,
        start,
        start + length // 3,
        start + length,
        2 * (start + length),
    ]
    for n in around(*points):
        reference = equation_8_by_hand(
            n, lambda m: power_by_hand(m, beta, a, b, cap, c), warmup, start, length, shape, floor
        )
        close(schedule(tokens=n, batch=beta), reference)


def test_power_without_decay_never_ends():
    schedule = Power()
    assert schedule.decay is None
    for n in (0, 1, B - 1, B, B + 1, 26 * B, 10**13, 10**15):
        close(
            schedule(tokens=n, batch=1024),
            equation_8_by_hand(n, lambda m: power_by_hand(m, 1024, 4, -0.51, 0.02), B),
        )


def test_power_starts_at_the_cap_without_warmup_and_at_zero_with_one():
    assert Power(warmup_tokens=0)(tokens=0, batch=1) == 0.02
    assert Power(warmup_tokens=1)(tokens=0, batch=1) == 0.0


@pytest.mark.parametrize("beta", [1, 8, 1024])
def test_power_is_continuous_and_monotonic_across_its_boundaries(beta):
    warmup, start, length = B, 900 * B, 100 * B
    schedule = Power(warmup_tokens=warmup, decay=Decay(start=start, tokens=length))
    for boundary in (warmup, start):
        before, at, after = (schedule(tokens=boundary + d, batch=beta) for d in (-1, 0, 1))
        assert before == pytest.approx(at, rel=2 / warmup)
        assert after == pytest.approx(at, rel=2 / warmup)
    rising = [schedule(tokens=n, batch=beta) for n in range(0, warmup + 1, warmup // 50)]
    assert all(low < high for low, high in itertools.pairwise(rising))
    falling = [schedule(tokens=n, batch=beta) for n in range(warmup, start + length + 1, B // 2)]
    assert all(high >= low for high, low in itertools.pairwise(falling))
    released = [schedule(tokens=n, batch=beta) for n in range(27 * B, start + length + 1, B)]
    assert all(high > low for high, low in itertools.pairwise(released))


def test_the_decay_reaches_its_floor_exactly_and_stays():
    for shape in schedulers.decay.SHAPES:
        for floor in (0.0, 0.1, 0.3):
            decay = Decay(start=7, tokens=13, shape=shape, floor=floor)
            assert decay.factor(7) == 1.0
            assert 1.0 > decay.factor(8) > decay.factor(19) > floor
            assert decay.factor(20) == decay.factor(21) == decay.factor(10**15) == floor


@pytest.mark.parametrize(
    "shape, at_a_quarter",
    [
        ("exponential", (math.exp(0.75) - 1) / (math.e - 1)),
        ("linear", 0.75),
        ("cosine", (2 + math.sqrt(2)) / 4),
        ("sqrt", 0.5),
    ],
)
def test_decay_shapes(shape, at_a_quarter):
    assert Decay(start=0, tokens=100, shape=shape).factor(25) == pytest.approx(at_a_quarter, rel=1e-14)
    half = Decay(start=0, tokens=100, shape=shape, floor=0.5)
    assert half.factor(25) == pytest.approx(0.5 + 0.5 * at_a_quarter, rel=1e-14)


def test_the_current_batch_counts_in_warmup_trunk_and_decay():
    warmup, start, length = 10_000_000, 100_000_000, 50_000_000
    schedule = Power(warmup_tokens=warmup, decay=Decay(start=start, tokens=length))
    for n in (warmup // 2, 60_000_000, start + length // 2):
        assert schedule(tokens=n, batch=16) == pytest.approx(2 * schedule(tokens=n, batch=8), rel=1e-14)
    # The batch of this step also decides whether the decay starts from the cap.
    assert schedule.at_cap(start + 1, 8) is False
    assert schedule.at_cap(start + 1, 1024) is True
    n = start + length // 2
    close(schedule(tokens=n, batch=1024), shape_by_hand("exponential", Decimal("0.5")) * exact(0.02))


def test_a_ramp_of_the_batch_through_all_phases():
    warmup, start, length = 1_000_000, 6_000_000, 3_000_000
    schedule = Power(warmup_tokens=warmup, decay=Decay(start=start, tokens=length))
    n, phases = 0, set()
    while n <= start + length:
        sequences = 8 if n < 500_000 else 16 if n < 3_000_000 else 64 if n < 7_000_000 else 96
        reference = equation_8_by_hand(
            n, lambda m, beta=sequences: power_by_hand(m, beta, 4, -0.51, 0.02), warmup, start, length
        )
        close(schedule(tokens=n, batch=sequences), reference)
        phases.add((schedule.phase(n), sequences))
        n += sequences * 4096
    assert phases == {
        ("warmup", 8), ("warmup", 16), ("trunk", 16), ("trunk", 64), ("decay", 64), ("decay", 96),
    }  # fmt: skip


def test_batch_exponent():
    flat = Power(batch_exponent=0.0, a=0.5, warmup_tokens=0)
    assert flat(tokens=10**6, batch=1) == flat(tokens=10**6, batch=512)
    root = Power(batch_exponent=0.5, a=0.5, warmup_tokens=0)
    assert root(tokens=10**6, batch=64) == pytest.approx(8 * root(tokens=10**6, batch=1), rel=1e-14)


# ---------------------------------------------------------------- the paper's numbers


@pytest.mark.parametrize(
    "tokens, beta, observed",
    [(2 * B, 128, 0.0128), (256 * B, 128, 0.0008), (128 * B, 16, 0.0002), (128 * B, 512, 0.0064)],
)
def test_published_optima_lie_within_one_grid_step_of_equation_5(tokens, beta, observed):
    law = Power(a=4.6, b=-0.51, max_lr=1.0, warmup_tokens=0)
    assert 0.5 < law(tokens=tokens, batch=beta) / observed < 2


def test_the_example_in_the_text():
    law = Power(a=4.6, b=-0.51, max_lr=1.0, warmup_tokens=0)
    assert round(law(tokens=10**13, batch=1024), 4) == 0.0011


@pytest.mark.parametrize("beta, published", [(1024, 26e9), (8, 1.9e6), (1, 32e3)])
def test_cap_release(beta, published):
    schedule = Power(warmup_tokens=0)
    release = schedule.cap_release(beta)
    assert release == pytest.approx(published, rel=0.02)
    close(release, release_by_hand(beta, 4, -0.51, 0.02))
    last = int(release)
    assert schedule.at_cap(last, beta) is True
    assert schedule(tokens=last, batch=beta) == 0.02
    assert schedule.at_cap(last + 1, beta) is False
    assert schedule(tokens=last + 1, batch=beta) < 0.02


def test_at_cap_goes_by_the_end_of_warmup_and_the_start_of_the_decay():
    release = int(Power().cap_release(8))
    capped = Power(warmup_tokens=release, decay=Decay(start=release, tokens=release))
    assert [capped.at_cap(n, 8) for n in (0, release - 1, release, release + 1, 3 * release)] == [True] * 5
    free = Power(warmup_tokens=release + 1, decay=Decay(start=release + 1, tokens=release))
    assert [free.at_cap(n, 8) for n in (0, release - 1, release, release + 1, 3 * release)] == [False] * 5


@pytest.mark.parametrize(("n", "beta"), [(1, 1024), (10**7, 8), (26 * 10**9, 1024), (10**13, 4096)])
@pytest.mark.parametrize("exponent", [1.0, 0.5])
def test_a_smooth_cap_is_the_harmonic_sum_and_half_of_it_at_the_critical_batch(n, beta, exponent):
    fields = {"a": 4.0, "b": -0.51, "max_lr": 0.02, "warmup_tokens": 0, "batch_exponent": exponent}
    smooth, hard = Power(cap="smooth", **fields), Power(**fields)
    power = Decimal(4) * Decimal(beta) ** Decimal(exponent) * Decimal(n) ** Decimal("-0.51")
    close(smooth(tokens=n, batch=beta), 1 / (1 / Decimal("0.02") + 1 / power))
    critical = smooth.critical_batch(n)
    assert critical == hard.critical_batch(n)
    close(critical, (Decimal("0.02") / 4 * Decimal(n) ** Decimal("0.51")) ** (1 / Decimal(exponent)))
    assert smooth(tokens=n, batch=critical) == pytest.approx(0.01, rel=1e-12)
    assert hard(tokens=n, batch=critical) == pytest.approx(0.02, rel=1e-12)
    for schedule in (smooth, hard):
        assert schedule.at_cap(n, 1.001 * critical) and not schedule.at_cap(n, 0.999 * critical)
        assert schedule.cap_release(critical) == pytest.approx(n, rel=1e-9)


def test_a_smooth_cap_holds_at_the_ends_of_the_numbers():
    assert Power(cap="smooth", warmup_tokens=0)(tokens=0, batch=8) == 0.02
    assert Power(cap="smooth").critical_batch(0) == 0
    assert Power(cap="smooth", b=-300.0, warmup_tokens=0)(tokens=10**12, batch=8) == 0
    assert Power(batch_exponent=-1000.0, warmup_tokens=0)(tokens=10**9, batch=0.1) == 0.02  # beyond what a double holds
    # A gain beyond a float is no number times nothing, but the cap.
    assert Power(a=1e300, b=-300.0, cap="smooth", warmup_tokens=0)(tokens=500, batch=1e300) == 0.02
    assert Power(batch_exponent=0.0).critical_batch(10**12) == math.inf
    assert Power(batch_exponent=0.0).critical_batch(10) == 0
    with pytest.raises(ValueError, match="no cap 'soft'"):
        Power(cap="soft")
    with pytest.raises(ValueError, match="0 or more"):
        Power().critical_batch(-1)


def test_cap_release_with_a_batch_exponent_and_beyond_doubles():
    close(Power(batch_exponent=0.5).cap_release(128), release_by_hand(128, 4, -0.51, 0.02, 0.5))
    assert Power(b=-0.001).cap_release(1024) == math.inf


# ---------------------------------------------------------------- WSD, Cosine, Constant


@pytest.mark.parametrize("shape", ["exponential", "linear", "cosine", "sqrt"])
@pytest.mark.parametrize("floor", [0.0, 0.25])
def test_wsd_is_equation_2(shape, floor):
    warmup, start, length = 1_000, 90_000_000, 10_000_001
    schedule = WSD(lr=0.0064, warmup_tokens=warmup, decay=Decay(start=start, tokens=length, shape=shape, floor=floor))
    for n in around(0, warmup, warmup // 2, start, start + length // 2, start + length, 10**12):
        reference = equation_8_by_hand(n, lambda m: exact(0.0064), warmup, start, length, shape, floor)
        close(schedule(tokens=n, batch=77), reference)


def test_a_wsd_trunk_and_constant_are_the_same_rates():
    trunk, constant = WSD(lr=0.01, warmup_tokens=1_000), Constant(lr=0.01, warmup_tokens=1_000)
    for n, rate in ((0, 0.0), (250, 0.0025), (999, 0.00999), (1_000, 0.01), (1_001, 0.01), (10**15, 0.01)):
        assert trunk(tokens=n, batch=1) == constant(tokens=n, batch=1) == pytest.approx(rate, rel=1e-15)
    assert Constant(lr=0.3, warmup_tokens=0)(tokens=0, batch=1) == 0.3


def test_cosine():
    warmup, total = 10_000, 1_000_000_000
    schedule = Cosine(lr=0.01, warmup_tokens=warmup, total_tokens=total)
    assert schedule.floor == 0.1
    for n in around(0, warmup, warmup // 2, warmup + (total - warmup) // 3, total, 2 * total):
        reference = equation_8_by_hand(n, lambda m: exact(0.01), warmup, warmup, total - warmup, "cosine", 0.1)
        close(schedule(tokens=n, batch=5), reference)
    # (1 + cos 60°) / 2 = 3/4, whole numbers of tokens
    third = Cosine(lr=1.0, warmup_tokens=100, total_tokens=400, floor=0.0)(tokens=200, batch=1)
    assert third == pytest.approx(0.75, rel=1e-14)
    assert schedule(tokens=total, batch=1) == schedule(tokens=10 * total, batch=1) == 0.01 * 0.1


@pytest.mark.parametrize(
    "schedule",
    [
        WSD(lr=0.01, warmup_tokens=10, decay=Decay(start=20, tokens=10)),
        Constant(lr=0.01, warmup_tokens=10),
        Cosine(lr=0.01, warmup_tokens=10, total_tokens=30),
    ],
)
def test_only_power_looks_at_the_batch(schedule):
    for n in (5, 15, 25, 35):
        assert schedule(tokens=n, batch=1) == schedule(tokens=n, batch=1024)


def test_phases():
    decay = Decay(start=20, tokens=10)
    asked = (0, 9, 10, 20, 21, 30, 31)
    with_decay = ["warmup", "warmup", "trunk", "trunk", "decay", "decay", "decay"]
    without = ["warmup", "warmup"] + ["trunk"] * 5
    for schedule, phases in (
        (Power(warmup_tokens=10, decay=decay), with_decay),
        (WSD(lr=1.0, warmup_tokens=10, decay=decay), with_decay),
        (Power(warmup_tokens=10), without),
        (WSD(lr=1.0, warmup_tokens=10), without),
        (Cosine(lr=1.0, warmup_tokens=10, total_tokens=30), without),
        (Constant(lr=1.0, warmup_tokens=10), without),
    ):
        assert [schedule.phase(n) for n in asked] == phases
    assert Power(warmup_tokens=0).phase(0) == "trunk"


# ---------------------------------------------------------------- what each says of itself

DECAY = Decay(start=40, tokens=20)
ALL = {
    Power(a=1.0, b=-0.5, max_lr=0.25, warmup_tokens=10, decay=DECAY): (0.25, DECAY, (40, 60), {10, 16, 40, 60}),
    Power(a=1.0, b=-0.5, max_lr=0.25, warmup_tokens=10): (0.25, None, None, {10, 16}),
    WSD(lr=0.3, warmup_tokens=10, decay=DECAY): (0.3, DECAY, (40, 60), {10, 40, 60}),
    Cosine(lr=0.3, warmup_tokens=10, total_tokens=70): (0.3, None, (10, 70), {10, 70}),
    Constant(lr=0.3, warmup_tokens=10): (0.3, None, None, {10}),
}


@pytest.mark.parametrize("schedule", ALL, ids=lambda schedule: type(schedule).__name__)
def test_every_schedule_answers(schedule):
    """By hand; 1 · n^-½ is 0.25 at 16 tokens. Between its edges a rate has one formula, and nowhere a higher value."""
    peak, decay, fall, edges = ALL[schedule]
    for asked in (schedule, Rewarmup(schedule=schedule, start=20, tokens=5)):
        again = {20, 25} if isinstance(asked, Rewarmup) else set()
        assert (asked.warmup_tokens, asked.peak, asked.decay, asked.fall) == (10, peak, decay, fall)
        assert set(asked.edges([1])) == edges | again
        assert set(asked.rewarmup or ()) == again
        assert asked.power is (schedule if isinstance(schedule, Power) else None)
        assert [asked.at_cap(n, 1) for n in (0, 15, 17)] == [isinstance(schedule, Power)] * 2 + [False]
        rates = [asked(tokens=n, batch=1) for n in range(100)]
        assert max(rates) == pytest.approx(peak)
        if fall is not None:
            assert rates[fall[0]] > rates[fall[0] + 1] > rates[fall[1] - 1] > rates[fall[1]] == rates[fall[1] + 1]
    assert WITH_DECAY == ("power", "wsd")
    assert {type(each) for each in ALL} | {Rewarmup} == set(Schedule.__args__)


# ---------------------------------------------------------------- refusals

VALID = {
    Power: dict(),
    WSD: dict(lr=0.01, warmup_tokens=10),
    Cosine: dict(lr=0.01, warmup_tokens=10, total_tokens=20),
    Constant: dict(lr=0.01, warmup_tokens=10),
    Decay: dict(start=10, tokens=5),
}
REFUSED = {
    (Power, "a"): [0, -1],
    (Power, "b"): [0, 0.51],
    (Power, "max_lr"): [0, -0.02],
    (Power, "warmup_tokens"): [-1, 0.01],
    (Power, "batch_exponent"): ["1"],
    (WSD, "lr"): [0, -0.02, None],
    (WSD, "warmup_tokens"): [-1, 0.5],
    (Cosine, "lr"): [0, -0.02],
    (Cosine, "warmup_tokens"): [-1],
    (Cosine, "total_tokens"): [0, -5, 20.5],
    (Cosine, "floor"): [-0.1, 1.1],
    (Constant, "lr"): [0, -0.02],
    (Constant, "warmup_tokens"): [-1, "1e9"],
    (Decay, "start"): [-1, 0.9, None],
    (Decay, "tokens"): [0, -1, 0.1],
    (Decay, "floor"): [-0.01, 1.01],
}


@pytest.mark.parametrize(
    "cls, name, value",
    [(cls, name, value) for (cls, name), values in REFUSED.items() for value in values + INFINITE_OR_NAN],
)
def test_a_value_out_of_range_is_refused_by_name(cls, name, value):
    cls(**VALID[cls])
    with pytest.raises(ValueError) as error:
        cls(**{**VALID[cls], name: value})
    message = str(error.value)
    assert message.startswith(f"{cls.__name__}: {name} must be ")
    assert message.endswith(f"it is {value!r}.")


def test_an_unknown_shape_is_refused_with_the_list():
    with pytest.raises(ValueError, match="'step'; the shapes are exponential, linear, cosine, sqrt"):
        Decay(start=10, tokens=5, shape="step")


@pytest.mark.parametrize("cls", [Power, WSD])
def test_a_decay_inside_warmup_is_refused_with_both_values(cls):
    fields = {**VALID[cls], "warmup_tokens": 2_000_000}
    cls(**fields, decay=Decay(start=2_000_000, tokens=5))
    with pytest.raises(ValueError, match=r"starts at 1,999,999 tokens, inside the warmup of 2,000,000"):
        cls(**fields, decay=Decay(start=1_999_999, tokens=5))
    with pytest.raises(ValueError, match=r"decay must be a Decay or None; it is 0\.1"):
        cls(**fields, decay=0.1)


@pytest.mark.parametrize("total", [9, 10])
def test_a_cosine_that_ends_inside_warmup_is_refused(total):
    with pytest.raises(ValueError, match=rf"warmup of 10 tokens is not shorter than total_tokens, {total}\."):
        Cosine(lr=0.01, warmup_tokens=10, total_tokens=total)


@pytest.mark.parametrize("tokens", [-1, math.nan])
@pytest.mark.parametrize("cls", [Power, WSD, Cosine, Constant])
def test_tokens_below_zero_are_refused(cls, tokens):
    schedule = cls(**VALID[cls])
    with pytest.raises(ValueError, match=f"it is {tokens}"):
        schedule(tokens=tokens, batch=1)
    with pytest.raises(ValueError, match=f"it is {tokens}"):
        schedule.phase(tokens)


@pytest.mark.parametrize("batch", [0, -1, math.nan, math.inf])
def test_a_batch_that_is_no_size_is_refused(batch):
    for n in (0, 10, 2 * B):
        with pytest.raises(ValueError, match=f"it is {batch}"):
            Power()(tokens=n, batch=batch)
    with pytest.raises(ValueError, match=f"it is {batch}"):
        Power().cap_release(batch)


# ---------------------------------------------------------------- build


def test_build_makes_each_schedule_from_plain_values():
    assert build("power") == Power()
    assert build("power", a=3.0, decay=None) == Power(a=3.0)
    decay = {"start": 20, "tokens": 5, "shape": "linear", "floor": 0.1}
    assert build("power", warmup_tokens=10, decay=decay) == Power(warmup_tokens=10, decay=Decay(**decay))
    assert build("wsd", lr=0.1, warmup_tokens=10, decay=decay).decay == Decay(**decay)
    assert build("wsd", lr=0.1, warmup_tokens=10, decay=Decay(**decay)).decay == Decay(**decay)
    assert build("cosine", lr=0.1, warmup_tokens=1, total_tokens=9, floor=0.2) == Cosine(
        lr=0.1, warmup_tokens=1, total_tokens=9, floor=0.2
    )
    assert build("constant", lr=0.1, warmup_tokens=1) == Constant(lr=0.1, warmup_tokens=1)


@pytest.mark.parametrize(
    "name, fields, message",
    [
        (
            "powr",
            {},
            "There is no schedule 'powr'. Did you mean 'power'? Allowed: power, wsd, cosine, constant.",
        ),
        ("zzz", {}, "There is no schedule 'zzz'. Allowed: power, wsd, cosine, constant."),
        (
            "power",
            {"warmup_token": 1},
            "The schedule's power has no field 'warmup_token'. Did you mean 'warmup_tokens'? "
            "Allowed: a, b, max_lr, warmup_tokens, batch_exponent, cap, decay.",
        ),
        (
            "wsd",
            {"lr": 0.1, "warmup_tokens": 1, "decay": {"start": 1, "tokens": 1, "shap": "linear"}},
            "The schedule's decay has no field 'shap'. Did you mean 'shape'? Allowed: start, tokens, shape, floor.",
        ),
        (
            "constant",
            {"lr": 0.1, "warmup_tokens": 1, "decay": None},
            "The schedule's constant has no field 'decay'. Allowed: lr, warmup_tokens.",
        ),
        ("wsd", {}, "wsd needs a value for lr, warmup_tokens."),
        ("power", {"decay": {"tokens": 5}}, "decay needs a value for start."),
    ],
)
def test_build_refuses_in_one_readable_paragraph(name, fields, message):
    with pytest.raises(ValueError) as error:
        build(name, **fields)
    assert str(error.value) == message


def test_schedules_are_values():
    schedule = Power(decay=Decay(start=2 * B, tokens=B))
    assert pickle.loads(pickle.dumps(schedule)) == schedule
    assert hash(schedule) == hash(Power(decay=Decay(start=2 * B, tokens=B)))
    with pytest.raises(AttributeError):
        schedule.a = 3.0
    with pytest.raises(TypeError):
        Power(4.0)


def test_the_pure_functions_do_not_need_torch():
    code = "import sys, powertrain.schedulers; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
