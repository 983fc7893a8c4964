import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import GraniteConfig, GraniteForCausalLM, GraniteMoeConfig, GraniteMoeForCausalLM

from powertrain.schedulers import WSD, Power
from powertrain.train import metrics
from powertrain.train.balance import Balance
from powertrain.train.compose import composed
from powertrain.train.config import BalanceConfig, Config
from powertrain.train.errors import ConfigError
from powertrain.train.loss import LanguageModelLoss
from powertrain.train.model import blockwise, granite, mup

B, M = 1_000_000_000, 1_000_000

# Tables 2 and 4 of arXiv 2408.13359: embedding, layers, heads, KV heads, MLP hidden, experts, top-k,
# init std, m_emb, m_res, m_width. PowerLM-3B's m_width is printed as 8, where 2304/256 is 9.
TABLES: dict[str, tuple[float | None, ...]] = {
    "proxy_12m": (128, 32, 2, 2, 320, None, None, 0.02, 1, 1, 0.5),
    "proxy_36m": (256, 32, 4, 4, 640, None, None, 0.02, 1, 1, 1),
    "proxy_121m": (512, 32, 8, 8, 1280, None, None, 0.02, 1, 1, 2),
    "dense_1b": (1536, 40, 24, 24, 4096, None, None, 0.1, 12, 0.22, 6),
    "moe_1b": (1024, 24, 16, 8, 512, 32, 8, 0.1, 12, 0.28, 4),
    "powerlm_3b": (2304, 40, 36, 36, 9216, None, None, 0.1, 12, 0.22, 9),
    "powermoe_3b": (1536, 32, 24, 8, 512, 40, 8, 0.1, 12, 0.22, 6),
}
# Budget, decay, sequences of 4096 a step: tables 3 and 4, and section 4 for the 1B runs' decay.
RUNS: dict[str, tuple[int, int, int]] = {
    "proxy_12m": (2 * B, 200 * M, 128),
    "proxy_36m": (2 * B, 200 * M, 128),
    "proxy_121m": (2 * B, 200 * M, 128),
    "dense_1b": (1000 * B, 100 * B, 1024),
    "moe_1b": (1100 * B, 100 * B, 1024),
    "powerlm_3b": (1250 * B, 250 * B, 1024),
    "powermoe_3b": (3000 * B, 500 * B, 1024),
}
# Total and active parameters as printed, each with the unit of its last digit. The paper rounds some (3.3B is
# 3.299) and cuts others (121M is 121.7).
PRINTED: dict[str, tuple[float, float, float | None, float]] = {
    "proxy_12m": (12 * M, M, None, 0),
    "proxy_36m": (36 * M, M, None, 0),
    "proxy_121m": (121 * M, M, None, 0),
    "dense_1b": (1.2 * B, 0.1 * B, None, 0),
    "moe_1b": (1.3 * B, 0.1 * B, 377 * M, M),
    "powerlm_3b": (3.5 * B, 0.1 * B, None, 0),
    "powermoe_3b": (3.3 * B, 0.1 * B, 800 * M, 10 * M),
}


@pytest.mark.parametrize("name", TABLES)
def test_experiments_hold_the_numbers_of_the_papers_tables(name: str) -> None:
    hidden, layers, heads, kv_heads, mlp, experts, top_k, std, m_emb, m_res, m_width = TABLES[name]
    config = composed([f"+experiment={name}"])
    model = granite.transformers_config(config)
    expected: dict[str, Any] = {
        "vocab_size": 49152,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": mlp,
        "initializer_range": std,
        "embedding_multiplier": m_emb,
        "residual_multiplier": m_res,
        "attention_multiplier": 1 / 64,
        "logits_scaling": m_width,
        "tie_word_embeddings": True,
        "max_position_embeddings": 4096,
    }
    if experts is not None:
        expected |= {"num_local_experts": experts, "num_experts_per_tok": top_k}
    assert {key: getattr(model, key) for key in expected} == expected
    assert isinstance(model, GraniteMoeConfig if experts is not None else GraniteConfig)
    assert not hasattr(model, "num_local_experts") or experts is not None


@pytest.mark.parametrize("name", RUNS)
def test_experiments_train_as_long_as_the_paper_says(name: str) -> None:
    tokens, decay, sequences = RUNS[name]
    config = composed([f"+experiment={name}"])
    assert (config.run.tokens, config.batch.sequences, config.data.sequence_length) == (tokens, sequences, 4096)
    assert config.run.name == name
    schedule = config.make_schedule()
    assert schedule.warmup_tokens == B
    assert isinstance(schedule, Power | WSD) and schedule.decay is not None
    assert (schedule.decay.start, schedule.decay.tokens) == (tokens - decay, decay)
    assert (schedule.decay.shape, schedule.decay.floor) == ("exponential", 0.0)
    if isinstance(schedule, WSD):
        assert name.startswith("proxy") and schedule.lr == 0.0128  # the best of β = 128, T = 2B
    else:
        assert (schedule.a, schedule.b, schedule.max_lr) == (4.0, -0.51, 0.02)


def counts_by_hand(name: str) -> dict[str, int]:
    """From the table alone."""
    hidden, layers, heads, kv_heads, mlp, experts, top_k = (int(n or 0) for n in TABLES[name][:7])
    head = hidden // heads
    attention = hidden * heads * head * 2 + hidden * kv_heads * head * 2
    block = 3 * hidden * mlp
    norms = (2 * layers + 1) * hidden
    embedding = 49152 * hidden
    router = experts * hidden
    return {
        "total": embedding + norms + layers * (attention + router + (experts or 1) * block),
        "embedding": embedding,
        "active": norms + layers * (attention + router + (top_k or 1) * block),
        "router and norms": norms + layers * router,
    }


@pytest.mark.parametrize("name", TABLES)
def test_parameter_counts_are_those_of_the_paper(name: str) -> None:
    counts = metrics.parameters_of(composed([f"+experiment={name}"]))
    by_hand = counts_by_hand(name)
    small = by_hand.pop("router and norms")
    assert counts == by_hand
    total, unit, active, active_unit = PRINTED[name]
    assert abs(counts["total"] - total) < unit
    if active is not None:  # which the paper counts without routers and norms too, or 377M would be 378M
        assert abs(counts["active"] - small - active) < active_unit
    else:
        assert counts["active"] == counts["total"] - counts["embedding"]


def test_quickstart_counts_by_hand() -> None:
    # hidden 128, 4 layers, 2 heads of 64, 8 experts of 128, top-2, vocabulary 4096
    counts = metrics.parameters_of(composed(["+experiment=quickstart"]))
    shared = 4 * (4 * 128 * 128 + 8 * 128) + 9 * 128
    expert = 4 * 3 * 128 * 128
    assert counts == {
        "total": 4096 * 128 + shared + 8 * expert,
        "embedding": 4096 * 128,
        "active": shared + 2 * expert,
    }


def test_an_untied_head_counts_as_embedding(small_config: Callable[..., Config]) -> None:
    tied = metrics.parameters_of(small_config())
    untied = metrics.parameters_of(small_config("model.tie_word_embeddings=false"))
    assert untied["embedding"] == 2 * tied["embedding"] == 2 * 97 * 32
    assert untied["active"] == tied["active"]
    assert untied["total"] == tied["total"] + 97 * 32


@pytest.mark.parametrize("kind", ["granitemoe", "granite"])
def test_multipliers_are_in_transformers_fields(small_config: Callable[..., Config], kind: str) -> None:
    model = granite.transformers_config(small_config(f"model.model_type={kind}", "model.embedding_multiplier=7"))
    assert model.attention_multiplier == 1 / 8  # 1 / head size
    assert model.logits_scaling == 4.0
    assert model.embedding_multiplier == 7.0
    assert model.residual_multiplier == pytest.approx(1.4 / math.sqrt(3), rel=1e-12)
    assert model.tie_word_embeddings
    assert model.num_key_value_heads == 2
    assert model.rope_parameters["rope_theta"] == 10000.0
    assert model.rms_norm_eps == 1e-6
    assert model.max_position_embeddings == 16


def test_settings_that_are_given_replace_the_derived_ones(small_config: Callable[..., Config]) -> None:
    model = granite.transformers_config(
        small_config(
            "model.residual_multiplier=0.3",
            "model.num_key_value_heads=null",
            "model.max_position_embeddings=64",
            "model.tie_word_embeddings=false",
            "model.rope_theta=500",
        )
    )
    assert model.residual_multiplier == 0.3
    assert model.num_key_value_heads == 4
    assert model.max_position_embeddings == 64
    assert not model.tie_word_embeddings
    assert model.rope_parameters["rope_theta"] == 500


def test_aux_coefficient_makes_transformers_loss_ours_at_balance(
    small_config: Callable[..., Config], small_loss: Callable[..., LanguageModelLoss]
) -> None:
    config = small_config("balance.router_aux_loss_coef=0.07", "balance.scope=micro", "model.num_experts_per_tok=4")
    loss = small_loss(config)
    with torch.no_grad():
        for name, parameter in loss.model.named_parameters():
            if "router" in name:
                parameter.zero_()  # uniform probabilities
    ids = torch.randint(97, (2, 16), generator=torch.Generator().manual_seed(0))
    plain, with_aux = (
        loss.model(input_ids=ids, labels=ids, output_router_logits=asked).loss for asked in (False, True)
    )
    outputs = loss(ids, ids, torch.arange(16).expand(2, 16))
    ours, _ = Balance(config, reduce=lambda t: t).losses(outputs, batch_tokens=32)
    torch.testing.assert_close(ours, torch.tensor(3.0))  # one a layer
    torch.testing.assert_close(with_aux - plain, 0.07 * ours, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("kind", ["granitemoe", "granite"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_build(small_config: Callable[..., Config], kind: str, tied: bool, device: str) -> None:
    config = small_config(f"model.model_type={kind}", f"model.tie_word_embeddings={tied}")
    model = granite.build(config, device)
    assert isinstance(model, GraniteMoeForCausalLM if kind == "granitemoe" else GraniteForCausalLM)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert ("lm_head.weight" in dict(model.named_parameters())) != tied
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {(device, torch.float32)}
    assert model.config._attn_implementation == granite.implementations(config, device)["attn_implementation"]
    if kind == "granitemoe":
        assert model.config._experts_implementation == "sorted"
    if device == "cpu":  # buffers are no parameters: nobody initialises them later
        by_hand = torch.tensor([10000.0 ** (-2 * i / 8) for i in range(4)])
        torch.testing.assert_close(model.model.rotary_emb.inv_freq, by_hand)


def test_named_implementations_are_taken(small_config: Callable[..., Config]) -> None:
    config = small_config("model.attn_implementation=eager", "model.experts_implementation=grouped_mm")
    model = granite.build(config, "meta")
    assert model.config._attn_implementation == "eager"
    assert model.config._experts_implementation == "grouped_mm"


@pytest.mark.parametrize(
    ("device", "precision", "installed", "attention", "experts"),
    [
        ("cpu", "bf16", (2, 3), "sdpa", "sorted"),
        ("cpu", "bf16", ("blockwise",), "blockwise", "sorted"),
        ("cpu", "fp32", ("blockwise",), "blockwise", "sorted"),
        ("meta", "fp32", ("blockwise",), "sdpa", "sorted"),
        ("cuda", "bf16", (), "sdpa", "grouped_mm"),
        ("cuda", "fp32", (2, 3), "sdpa", "sorted"),
        ("cuda", "bf16", (2,), "flash_attention_2", "grouped_mm"),
        (torch.device("cuda", 1), "bf16", (2, 3), "flash_attention_3", "grouped_mm"),
    ],
)
def test_auto_goes_by_the_device(
    monkeypatch: pytest.MonkeyPatch,
    small_config: Callable[..., Config],
    device: torch.device | str,
    precision: str,
    installed: tuple[int | str, ...],
    attention: str,
    experts: str,
) -> None:
    monkeypatch.setattr(blockwise, "_kernel", lambda: print if "blockwise" in installed else "there is no compiler")
    monkeypatch.setattr(granite, "is_flash_attn_2_available", lambda: 2 in installed)
    monkeypatch.setattr(granite, "is_flash_attn_3_available", lambda: 3 in installed)
    chosen = granite.implementations(small_config(f"precision={precision}"), device)
    assert chosen == {"attn_implementation": attention, "experts_implementation": experts}
    with_dropout = granite.attention_implementation("auto", device, precision, 0.1)
    assert with_dropout == attention.replace("3", "2").replace("blockwise", "sdpa")


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("model.attn_implementation=flash_attention_2", "needs a GPU and its package: the device is cpu"),
        ("model.attn_implementation=flash_attention_3", "needs a GPU and its package: the device is cpu"),
        ("model.attn_implementation=flex_attention", "no backward pass on a CPU"),
        ("model.attn_implementation=blockwise", "could not be built or loaded: .*no-such-compiler"),
        ("model.experts_implementation=sonicmoe", "model.experts_implementation is sonicmoe: "),
        ("engine.torch_compile=true", "no-such-compiler is not on the path"),
    ],
)
def test_kernels_that_are_not_there_are_refused(
    small_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch, override: str, said: str
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(blockwise, "_kernel", blockwise._kernel.__wrapped__)  # without what is built already
    granite.check_kernels(small_config(), "cpu")
    with pytest.raises(ConfigError, match=said):
        granite.check_kernels(small_config(override), "cpu")


def test_flash_attention_in_float32_is_refused(
    small_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(granite, "is_flash_attn_2_available", lambda: True)
    config = small_config("model.attn_implementation=flash_attention_2", "precision=fp32")
    with pytest.raises(ConfigError, match="no kernels for precision=fp32"):
        granite.check_kernels(config, "cuda")


@pytest.mark.parametrize("implementation", ["sorted", "grouped_mm", "batched_mm"])
def test_expert_implementations_agree(
    small_config: Callable[..., Config], small_loss: Callable[..., LanguageModelLoss], implementation: str
) -> None:
    ids = torch.randint(97, (2, 16), generator=torch.Generator().manual_seed(0))
    results = []
    for name in ("eager", implementation):
        loss = small_loss(small_config(f"model.experts_implementation={name}"))
        outputs = loss(ids, ids, torch.arange(16).expand(2, 16))
        outputs.cross_entropy.backward()
        results.append((outputs, [p.grad for p in loss.parameters()]))
    assert torch.equal(results[0][0].assignments, results[1][0].assignments)
    torch.testing.assert_close(results[0][0].cross_entropy, results[1][0].cross_entropy, rtol=1e-5, atol=0)
    for expected, got in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-5 * expected.abs().max().item())


def test_flops_per_token_by_hand(small_config: Callable[..., Config]) -> None:
    config = small_config("data.sequence_length=128")
    # Products a token meets, as (rows, columns); 2 FLOPs an element forward, 4 backward.
    q_and_out, k_and_v = 2 * 32 * 32, 2 * 32 * 16
    experts, router, head = 2 * 3 * 32 * 24, 8 * 32, 97 * 32
    norms = 7 * 32  # counted like the rest, which is small
    products = 3 * (q_and_out + k_and_v + experts + router) + head + norms
    keys = 128 / 2  # that a token sees on average
    attention = 3 * (2 * 32 * keys + 2 * 32 * keys)  # q·k and the weighted sum, 3 layers
    by_hand = 6 * products + 3 * attention
    assert metrics.flops_per_token(config, metrics.parameters_of(config)) == by_hand
    untied = small_config("data.sequence_length=128", "model.tie_word_embeddings=false")
    assert metrics.flops_per_token(untied, metrics.parameters_of(untied)) == by_hand


def test_a_cpu_has_no_known_peak() -> None:
    assert metrics.peak_flops(torch.device("cpu")) is None


def test_expert_load_of_hand_made_loads() -> None:
    balanced = metrics.expert_load(torch.full((2, 4), 5))
    assert balanced == {"max_over_mean": 1.0, "entropy": pytest.approx(1.0), "layer_entropy": [1, 1], "idle": 0}
    # The worst layer of each: 8 of 8 on one expert is 4 means, entropy 0; 3 + 1 idle experts.
    mixed = metrics.expert_load(torch.tensor([[2, 2, 2, 2], [0, 8, 0, 0], [1, 2, 0, 1]]))
    assert mixed == {"max_over_mean": 4.0, "entropy": pytest.approx(0.0), "layer_entropy": [1, 0, 0.75], "idle": 4}
    # (1/4, 1/2, 0, 1/4): entropy 1.5 ln 2 of 2 ln 2
    one = metrics.expert_load(torch.tensor([[10, 20, 0, 10]]))
    assert one == {"max_over_mean": 2.0, "entropy": pytest.approx(0.75), "layer_entropy": [0.75], "idle": 1}
    alone = metrics.expert_load(torch.tensor([[7], [7]]))
    assert alone == {"max_over_mean": 1.0, "entropy": 1.0, "layer_entropy": [1, 1], "idle": 0}


@pytest.mark.parametrize(
    ("assignments", "top_k", "collapsed"),
    [
        ([[32] * 8, [32] * 8], 2, 0),
        ([[128, 128, 0, 0, 0, 0, 0, 0], [32] * 8], 2, 1),  # top-2 of 8 for 128 tokens, all to the same two
        ([[128, 19, 19, 18, 18, 18, 18, 18]], 2, 1),  # 4.00 × mean: all to one, the second choice balanced
        ([[119, 27, 22, 22, 22, 22, 22]], 2, 1),  # 9 of 128 go past it, where 91 would: 5/7 of them
        ([[118, 28, 22, 22, 22, 22, 22]], 2, 0),  # 10
        ([[64, 64, 64, 64, 0, 0, 0, 0]], 2, 1),  # half are idle, and the rest balanced
        ([[52, 52, 52, 50, 50, 0, 0, 0]], 2, 0),
        ([[7], [7]], 1, 0),  # a single expert, or as many as are chosen: nothing to route
        ([[100_000_007] * 3], 3, 0),
        ([[8, 0], [5, 3]], 1, 1),
        ([[15, 15, 15, 15, 15, 15, 15, 15, 15, 15, 15, 0]], 11, 1),  # every token to the same 11 of 12
    ],
)
def test_layers_that_no_longer_route(assignments: list[list[int]], top_k: int, collapsed: int) -> None:
    assert metrics.collapsed_layers(torch.tensor(assignments), top_k) == collapsed


def test_default_balance_is_the_designs() -> None:
    assert BalanceConfig() == BalanceConfig("lagged", "layer", 0.01, 0.001)


def test_table_shows_the_multipliers_that_the_model_uses(small_config: Callable[..., Config]) -> None:
    rows = mup.table(small_config())
    assert rows["embedding"].forward == "× 12"
    assert rows["head"].forward == "logits ÷ 4"
    assert rows["attention"].forward == "q·k × 0.125"
    assert rows["attention_out"].forward == rows["down"].forward == "block output × 0.8083"
    assert rows["router"].forward == rows["gate_up"].forward == rows["norm"].forward == ""
