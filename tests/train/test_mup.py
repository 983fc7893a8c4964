import math
from collections.abc import Callable

import pytest
import torch
from torch import nn

from powertrain.train.config import Config
from powertrain.train.model import granite, mup

# End of the name in Transformers' models -> role, by hand from table 1 of arXiv 2408.13359.
ROLES = {
    "embed_tokens.weight": "embedding",
    "lm_head.weight": "head",
    "q_proj.weight": "attention",
    "k_proj.weight": "attention",
    "v_proj.weight": "attention",
    "o_proj.weight": "attention_out",
    "router.weight": "router",
    "experts.gate_up_proj": "gate_up",
    "mlp.gate_proj.weight": "gate_up",
    "mlp.up_proj.weight": "gate_up",
    "experts.down_proj": "down",
    "mlp.down_proj.weight": "down",
    "layernorm.weight": "norm",
    "model.norm.weight": "norm",
}


def parameters(config: Config, seed: int | None = None, device: str = "cpu") -> dict[str, nn.Parameter]:
    model = granite.build(config, device)
    named = dict(model.named_parameters())
    if seed is not None:
        mup.initialize(named.items(), mup.table(config), seed)
    return named


@pytest.mark.parametrize("kind", ["granitemoe", "granite"])
@pytest.mark.parametrize("tied", [True, False])
def test_every_parameter_has_exactly_one_role(small_config: Callable[..., Config], kind: str, tied: bool) -> None:
    config = small_config(f"model.model_type={kind}", f"model.tie_word_embeddings={tied}", "model.num_hidden_layers=11")
    seen = set()
    for name in parameters(config, device="meta"):
        by_hand = {role for end, role in ROLES.items() if name.endswith(end)}
        assert by_hand == {mup.role_of(name)}, name
        seen |= by_hand
    expected = set(ROLES.values()) - ({"head"} if tied else set()) - ({"router"} if kind == "granite" else set())
    assert seen == expected
    assert seen <= set(mup.table(config))


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.qkv_proj.weight",
        "model.layers.0.self_attn.q_proj.bias",
        "model.layers.x.self_attn.q_proj.weight",
        "module.model.norm.weight",
        "model.norm.weight.extra",
        "model.layers.0.block_sparse_moe.experts.down_proj.weight",
        "lm_head",
        "",
    ],
)
def test_a_name_without_a_role_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="no role") as error:
        mup.role_of(name)
    assert f"'{name}'" in str(error.value)
    with pytest.raises(ValueError, match="no role"):
        mup.initialize([(name, nn.Parameter(torch.zeros(2)))], {}, seed=0)


@pytest.mark.parametrize(("rule", "m_down"), [("paper", 4.0), ("fan_in", 24 / 8)])
def test_table_by_hand(small_config: Callable[..., Config], rule: str, m_down: float) -> None:
    rows = mup.table(small_config(f"mup.rule={rule}", "model.initializer_range=0.3"))
    got = {role: (row.std, row.rate_multiplier, row.weight_decay) for role, row in rows.items()}
    assert got == {
        "embedding": (0.3, 1.0, True),
        "head": (0.3, 1.0, True),
        "attention": (0.15, 0.25, True),
        "attention_out": (0.15, 0.25, True),
        "router": (0.15, 0.25, True),
        "gate_up": (0.15, 0.25, True),
        "down": (pytest.approx(0.3 / math.sqrt(m_down)), pytest.approx(1 / m_down), True),
        "norm": (None, 1.0, False),
    }


@pytest.mark.parametrize("kind", ["granitemoe", "granite"])
def test_the_rules_differ_only_in_down(small_config: Callable[..., Config], kind: str) -> None:
    paper, fan_in = (small_config(f"model.model_type={kind}", f"mup.rule={rule}") for rule in ("paper", "fan_in"))
    assert {r for r, row in mup.table(paper).items() if row != mup.table(fan_in)[r]} == {"down"}
    one, other = parameters(paper, seed=0), parameters(fan_in, seed=0)
    changed = {name for name in one if not torch.equal(one[name], other[name])}
    assert changed == {name for name in one if "down_proj" in name}
    assert changed


def test_the_rules_agree_where_the_fan_in_grows_with_the_width(small_config: Callable[..., Config]) -> None:
    paper, fan_in = (small_config("model.intermediate_size=32", f"mup.rule={rule}") for rule in ("paper", "fan_in"))
    assert mup.table(paper) == mup.table(fan_in)


@pytest.mark.parametrize("kind", ["granitemoe", "granite"])
@pytest.mark.parametrize("rule", ["paper", "fan_in"])
def test_initial_weights_are_normal_with_the_std_of_their_role(
    small_config: Callable[..., Config], kind: str, rule: str
) -> None:
    config = small_config(
        f"model.model_type={kind}",
        f"mup.rule={rule}",
        "model.tie_word_embeddings=false",
        "model.hidden_size=64",
        "model.vocab_size=501",
        "mup.base_hidden_size=16",  # m_width 4; fan-in of down 24/16
    )
    expected = {
        "embedding": 0.1,
        "head": 0.1,
        "attention": 0.05,
        "attention_out": 0.05,
        "router": 0.05,
        "gate_up": 0.05,
        "down": 0.05 if rule == "paper" else 0.1 / math.sqrt(1.5),
    }
    for name, parameter in parameters(config, seed=3).items():
        role = mup.role_of(name)
        if role == "norm":
            assert torch.equal(parameter, torch.ones_like(parameter))
            continue
        scaled = parameter.detach().double().flatten() / expected[role]
        n = scaled.numel()
        assert abs(scaled.std().item() - 1) < 5 / math.sqrt(2 * n), name
        assert abs(scaled.mean().item()) < 5 / math.sqrt(n), name
        within = (scaled.abs() < 1).double().mean().item()  # 68.27% of a normal
        assert abs(within - 0.6827) < 5 * math.sqrt(0.6827 * 0.3173 / n), name


def test_weights_depend_on_seed_and_name_alone(small_config: Callable[..., Config]) -> None:
    config = small_config()
    rows = mup.table(config)
    reference = {name: p.detach().clone() for name, p in parameters(config, seed=7).items()}

    torch.manual_seed(123)
    state = torch.get_rng_state()
    again = parameters(config)
    mup.initialize(reversed(list(again.items())), rows, seed=7)
    assert torch.equal(torch.get_rng_state(), state), "the global generator was used"
    assert all(torch.equal(again[name], value) for name, value in reference.items())

    for name in list(reference)[3::5]:  # alone, and in a tensor that held something else
        parameter = nn.Parameter(torch.full_like(reference[name], 9.0))
        mup.initialize([(name, parameter)], rows, seed=7)
        assert torch.equal(parameter, reference[name])

    deeper = parameters(small_config("model.num_hidden_layers=5"), seed=7)
    assert all(torch.equal(deeper[name], value) for name, value in reference.items())

    other = parameters(config, seed=8)
    assert not any(torch.equal(other[name], value) for name, value in reference.items() if "norm" not in name)


def test_no_two_tensors_share_their_numbers(small_config: Callable[..., Config]) -> None:
    drawn = [p.detach().flatten() for n, p in parameters(small_config(), seed=0).items() if "norm" not in n]
    length = min(len(values) for values in drawn)  # 256 of a router: correlations stay below 5/16 by chance
    matrix = torch.corrcoef(torch.stack([values[:length] for values in drawn])).fill_diagonal_(0)
    assert matrix.abs().max() < 5 / math.sqrt(length)


def test_seeds_are_not_shifted_copies(small_config: Callable[..., Config]) -> None:
    """Seed 1's layer must not be seed 0's next one, nor a run's seed "1" + name clash with "11"."""
    config = small_config("model.num_hidden_layers=12")
    drawn: dict[bytes, tuple[int, str]] = {}
    for seed in (0, 1, 11, 2**40):
        for name, parameter in parameters(config, seed=seed).items():
            if "norm" not in name:
                key = parameter.detach().flatten()[:16].numpy().tobytes()
                assert key not in drawn, (drawn.get(key), seed, name)
                drawn[key] = (seed, name)


@pytest.mark.parametrize(("heads", "base"), [(2, 256), (8, 256), (4, 64)])
def test_the_first_loss_is_what_the_page_says(small_config: Callable[..., Config], heads: int, base: int) -> None:
    """ln V + std² / 2 without the logit of the token itself, which tied embeddings lift and untied ones do not."""
    config = small_config(
        "model.vocab_size=2048", f"model.hidden_size={64 * heads}", f"model.num_attention_heads={heads}",
        f"mup.base_hidden_size={base}", "model.num_key_value_heads=null", "data.sequence_length=64",
    )  # fmt: skip
    model = granite.build(config)
    mup.initialize(model.named_parameters(), mup.table(config), seed=0)
    ids = torch.randint(2048, (4, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits
    std = mup.first_logits_std(config)
    own = logits.gather(-1, ids[..., None])
    others = logits.scatter(-1, ids[..., None], -torch.inf).logsumexp(-1)
    assert logits.scatter(-1, ids[..., None], 0.0).std(-1).mean().item() == pytest.approx(std, rel=0.03)
    assert others.mean().item() == pytest.approx(math.log(2048) + std**2 / 2, abs=0.06)
    assert own.mean().item() > 3 * std  # a token is guessed to follow itself


def test_values_do_not_change_from_one_process_to_another() -> None:
    """A re-run, another rank or machine has to draw what this one drew: values written down once."""
    rows = {"embedding": mup.Row(2.0, 1.0, True)}
    value = mup.initial_value("model.embed_tokens.weight", torch.Size([2, 3]), rows, seed=5)
    drawn = [[-2.5357394, 1.0514811, -1.8259329], [2.4072738, -1.6602646, -2.3217509]]
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, torch.tensor(drawn))


def test_initialize_fills_float32_and_bfloat16_alike(small_config: Callable[..., Config]) -> None:
    rows = mup.table(small_config())
    full, half = (nn.Parameter(torch.empty(97, 32, dtype=dtype)) for dtype in (torch.float32, torch.bfloat16))
    for parameter in (full, half):
        mup.initialize([("model.embed_tokens.weight", parameter)], rows, seed=1)
    assert torch.equal(full.bfloat16(), half)
