"""GraniteMoeShared: an expert beside the router's, which every token meets."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, GraniteMoeSharedConfig, GraniteMoeSharedForCausalLM
from transformers.models.granitemoeshared.modeling_granitemoeshared import GraniteMoeSharedMoE

from powertrain.train import init_from, metrics
from powertrain.train.balance import Balance
from powertrain.train.compose import composed
from powertrain.train.config import MODELS, Config
from powertrain.train.engine import Engine
from powertrain.train.errors import ConfigError
from powertrain.train.loss import LanguageModelLoss
from powertrain.train.model import granite, mup
from powertrain.train.optim import mup_groups
from powertrain.train.track import read_lines

SHARED = "model.model_type=granitemoeshared"  # the small model: hidden 32, 3 layers, 8 experts of 24, top-2, shared 40


def own_class() -> GraniteMoeSharedForCausalLM:
    """The small model, described in Transformers' fields alone, its experts one after the other."""
    model = GraniteMoeSharedForCausalLM(
        GraniteMoeSharedConfig(
            vocab_size=97, hidden_size=32, intermediate_size=24, shared_intermediate_size=40, num_hidden_layers=3,
            num_attention_heads=4, num_key_value_heads=2, num_local_experts=8, num_experts_per_tok=2,
            max_position_embeddings=16, tie_word_embeddings=True, embedding_multiplier=12.0, logits_scaling=4.0,
            residual_multiplier=1.4 / math.sqrt(3), attention_multiplier=1 / 8,
        )
    )  # fmt: skip
    model.set_experts_implementation("eager")
    return model.eval()


def tokens() -> Tensor:
    return torch.randint(97, (2, 16), generator=torch.Generator().manual_seed(0))


# ------------------------------------------------------------------------------------------------ the model


def test_logits_are_those_of_transformers_own_class_in_float64(
    small_config: Callable[..., Config], small_loss: Callable[..., LanguageModelLoss]
) -> None:
    config = small_config(SHARED)
    ours, theirs = small_loss(config).model.eval(), own_class()
    theirs.load_state_dict(ours.state_dict())
    theirs = theirs.double()
    ours.set_experts_implementation("eager")
    with torch.no_grad():
        expected = theirs(input_ids=tokens(), use_cache=False).logits
        exact = ours.double()(input_ids=tokens(), use_cache=False).logits
        logits = small_loss(config)(tokens(), None, torch.arange(16).expand(2, 16))  # as trained: our expert kernel
    assert expected.std() > 0.1
    torch.testing.assert_close(exact, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(logits.double(), expected, rtol=1e-4, atol=1e-5)


def test_the_shared_expert_is_added_for_every_token(
    small_config: Callable[..., Config], small_loss: Callable[..., LanguageModelLoss]
) -> None:
    """The last layer by hand: h + residual · (Σ_k w_k · expert_k(x) + shared(x))."""
    model = small_loss(small_config(SHARED)).model
    layer, seen = model.model.layers[2], {}
    layer.post_attention_layernorm.register_forward_hook(lambda _, args, out: seen.update(h=args[0], x=out))
    layer.register_forward_hook(lambda _, args, out: seen.update(out=out))
    with torch.no_grad():
        model(input_ids=tokens(), use_cache=False)
    h, x = (seen[name].double().view(-1, 32) for name in ("h", "x"))
    weights = {name: value.detach().double() for name, value in layer.named_parameters()}

    def swiglu(row: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        gate, up = (gate_up @ row).chunk(2)
        return down @ (F.silu(gate) * up)

    rows = []
    for row in x:
        logits, chosen = (weights["block_sparse_moe.router.weight"] @ row).topk(2)
        routed = [
            share
            * swiglu(row, *(weights[f"block_sparse_moe.experts.{part}"][e] for part in ("gate_up_proj", "down_proj")))
            for share, e in zip(logits.softmax(0), chosen, strict=True)
        ]
        shared = swiglu(row, weights["shared_mlp.input_linear.weight"], weights["shared_mlp.output_linear.weight"])
        rows.append(routed[0] + routed[1] + shared)
    expected = h + 1.4 / math.sqrt(3) * torch.stack(rows)
    torch.testing.assert_close(seen["out"].double().view(-1, 32), expected, rtol=1e-4, atol=1e-5)


def test_loss_and_gradients_are_those_of_transformers_own_class(
    small_config: Callable[..., Config], small_loss: Callable[..., LanguageModelLoss]
) -> None:
    loss, theirs = small_loss(small_config(SHARED)), own_class()
    theirs.load_state_dict(loss.model.state_dict())
    expected = theirs(input_ids=tokens(), labels=tokens(), use_cache=False, output_router_logits=False).loss
    expected.backward()
    labels = tokens().roll(-1, 1)
    labels[:, -1] = -100
    outputs = loss(tokens(), labels, torch.arange(16).expand(2, 16))
    (outputs.cross_entropy / 30).backward()
    torch.testing.assert_close(outputs.cross_entropy / 30, expected, rtol=1e-5, atol=0)
    reference = dict(theirs.named_parameters())
    for name, parameter in loss.model.named_parameters():
        scale = reference[name].grad.abs().max()
        assert scale > 0
        assert ((parameter.grad - reference[name].grad).abs() <= 1e-5 * scale).all(), name


def test_counts_and_flops_by_hand_and_by_the_model(small_config: Callable[..., Config]) -> None:
    config = small_config(SHARED)
    counts = metrics.parameters_of(config)
    total = sum(parameter.numel() for parameter in own_class().parameters())
    routed = 3 * 8 * 3 * 32 * 24  # layers · experts · (gate, up, down)
    active = total - 97 * 32 - routed * 6 // 8  # of 8 experts a token meets 2, and the shared one
    assert counts == {"total": total, "embedding": 97 * 32, "active": active}
    without = metrics.parameters_of(small_config())
    assert counts["active"] - without["active"] == counts["total"] - without["total"] == 3 * 3 * 32 * 40
    flops = [metrics.flops_per_token(each, metrics.parameters_of(each)) for each in (config, small_config())]
    assert flops[0] - flops[1] == 6 * 3 * 3 * 32 * 40


@pytest.mark.parametrize("family", MODELS)
def test_the_moe_blocks_of_every_family_are_found(small_config: Callable[..., Config], family: str) -> None:
    config = small_config(f"model.model_type={family}")
    model = granite.build(config, "meta")
    blocks = granite.moe_blocks(model)
    assert len(blocks) == (3 if config.model.is_moe else 0)
    assert blocks == [layer.block_sparse_moe for layer in model.model.layers if config.model.is_moe]
    assert config.model.is_moe == ("num_local_experts" in model.config.to_dict())
    assert len(LanguageModelLoss(model).model.model.layers) == 3


def test_zero3_takes_an_moe_block_as_a_leaf_and_the_shared_expert_not(
    small_config: Callable[..., Config], small_loss: Callable[..., LanguageModelLoss]
) -> None:
    deepspeed = pytest.importorskip("deepspeed")
    loss = small_loss(small_config(SHARED))
    Engine._tell_zero3_of_the_model(SimpleNamespace(loss=loss, model=loss.model))  # type: ignore[arg-type]
    leaves = deepspeed.utils.get_z3_leaf_modules(loss)
    assert [type(leaf) for leaf in leaves] == [GraniteMoeSharedMoE] * 3


def test_balance_is_over_the_routers_experts_alone(
    small_config: Callable[..., Config], small_loss: Callable[..., LanguageModelLoss]
) -> None:
    config = small_config(SHARED)
    outputs = small_loss(config)(tokens(), tokens(), torch.arange(16).expand(2, 16))
    assert outputs.assignments.shape == (3, 8)
    assert (outputs.assignments.sum(-1) == 2 * 16 * 2).all()
    balance = Balance(config, lambda counts: counts)
    first, _ = balance.losses(outputs, 32)  # before the first batch f is uniform: one a layer
    torch.testing.assert_close(first, torch.tensor(3.0))


# ------------------------------------------------------------------------------------------------ muP


@pytest.mark.parametrize(("rule", "m_shared"), [("paper", 4.0), ("fan_in", 40 / 8)])
def test_the_rows_of_the_shared_expert_by_hand(small_config: Callable[..., Config], rule: str, m_shared: float) -> None:
    """Input as the dense MLP's gate and up (fan-in: the hidden size), output as its down with a fan-in of its own."""
    config = small_config(SHARED, f"mup.rule={rule}", "model.initializer_range=0.3")
    rows = mup.table(config)
    by_part = {"input_linear": 4.0, "output_linear": m_shared}
    for part, m in by_part.items():
        row = rows[mup.role_of(f"model.layers.1.shared_mlp.{part}.weight")]
        assert (row.std, row.rate_multiplier) == (pytest.approx(0.3 / math.sqrt(m)), pytest.approx(1 / m))
        assert row.weight_decay
    as_dense = mup.table(small_config("model.model_type=granite", f"mup.rule={rule}", "model.intermediate_size=40",
                                      "model.initializer_range=0.3"))  # fmt: skip
    assert rows["gate_up"] == as_dense["gate_up"] and rows["shared_down"] == as_dense["down"]
    assert set(rows) - set(as_dense) == {"shared_down"}
    assert list(mup.table(small_config())) == list(as_dense)  # no group of a part that is not there

    model = granite.build(config)
    mup.initialize(model.named_parameters(), rows, seed=0)
    for part, m in by_part.items():
        weight = getattr(model.model.layers[1].shared_mlp, part).weight
        assert weight.std().item() == pytest.approx(0.3 / math.sqrt(m), rel=5 / math.sqrt(2 * weight.numel()))
    groups = {group["name"]: group for group in mup_groups(model, config.mup)}
    assert groups["shared_down"]["lr"] == pytest.approx(1 / m_shared)
    assert len(groups["gate_up"]["params"]) == 6 and len(groups["shared_down"]["params"]) == 3


# ------------------------------------------------------------------------------------------------ a run


def test_a_run_ends_in_a_folder_that_transformers_loads_and_that_a_run_begins_from(run: Callable[..., Path]) -> None:
    settings = (SHARED, "model.shared_intermediate_size=16")
    folder = run(*settings)
    lines = read_lines(folder / "metrics.jsonl")
    assert lines[-1]["lm_loss"] < lines[0]["lm_loss"] - 0.5
    assert len(lines[0]["expert_load"]["layer_entropy"]) == 2
    assert lines[0]["lr_per_group"].keys() >= {"gate_up", "shared_down"}
    model, report = AutoModelForCausalLM.from_pretrained(folder / "model", output_loading_info=True)
    assert type(model) is GraniteMoeSharedForCausalLM
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert model.config.shared_intermediate_size == 16
    card = (folder / "model/README.md").read_text()
    assert "tags: [granitemoeshared, powertrain]" in card and "4 experts of 24, top-2, a shared expert of 16" in card
    begun = composed(["+experiment=quickstart", "data.sequence_length=32", f"run.init_from={folder}"])
    assert (begun.model.model_type, begun.model.shared_size) == ("granitemoeshared", 16)
    weights = dict(model.named_parameters())
    read = init_from.reader(str(folder), {name: weight.shape for name, weight in weights.items()})
    for name, weight in weights.items():
        assert torch.equal(read(name, 1, weight.numel()), weight.detach().flatten()[1:])


def test_the_quickstart_of_the_small_shared_model() -> None:
    config = composed(["+experiment=quickstart", "model=tiny_shared"])
    assert config.model.shared_size == 128
    # Per token as tiny: two experts of 64 and the shared one of 128 are two of 128.
    tiny = metrics.parameters_of(composed(["+experiment=quickstart"]))
    assert metrics.parameters_of(config)["active"] == tiny["active"]


def test_a_family_and_its_shared_expert_have_to_fit(small_config: Callable[..., Config]) -> None:
    for size, said in ((0, "is 0, which is the width"), (-8, "has to be 0 or greater")):
        with pytest.raises(ConfigError, match=f"model.shared_intermediate_size.*{said}"):
            small_config(SHARED, f"model.shared_intermediate_size={size}")
    assert small_config().model.shared_size == 0  # of no meaning for another family, as the experts for a dense one
    assert not hasattr(granite.transformers_config(small_config()), "shared_intermediate_size")


# ------------------------------------------------------------------------------------------------ published models

# config.json as Transformers 4 wrote it for models of IBM Granite: 3.0-1b-a400m-base, and one with a shared expert.
GRANITE_3_MOE = {
    "architectures": ["GraniteMoeForCausalLM"], "attention_bias": False, "attention_dropout": 0.1,
    "attention_multiplier": 0.015625, "bos_token_id": 0, "embedding_multiplier": 12.0, "eos_token_id": 0,
    "hidden_act": "silu", "hidden_size": 1024, "initializer_range": 0.02, "intermediate_size": 512,
    "logits_scaling": 6.0, "max_position_embeddings": 4096, "model_type": "granitemoe", "num_attention_heads": 16,
    "num_experts_per_tok": 8, "num_hidden_layers": 24, "num_key_value_heads": 8, "num_local_experts": 32,
    "output_router_logits": False, "pad_token_id": 0, "residual_multiplier": 0.22, "rms_norm_eps": 1e-06,
    "rope_scaling": None, "rope_theta": 10000, "router_aux_loss_coef": 0.0, "tie_word_embeddings": True,
    "torch_dtype": "bfloat16", "transformers_version": "4.46.0.dev0", "use_cache": True, "vocab_size": 49155,
}  # fmt: skip
GRANITE_3_SHARED = {
    **GRANITE_3_MOE, "architectures": ["GraniteMoeSharedForCausalLM"], "model_type": "granitemoeshared",
    "shared_intermediate_size": 1024, "rms_norm_eps": 1e-05, "attention_dropout": 0.0, "embedding_multiplier": 12,
    "logits_scaling": 6, "transformers_version": "4.51.0",
}  # fmt: skip


@pytest.mark.parametrize("published", [GRANITE_3_MOE, GRANITE_3_SHARED], ids=lambda config: config["model_type"])
def test_a_published_configuration_is_adopted(
    published: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("powertrain.train.init_from._check_files", lambda *_: None)  # no weights of that size here
    (tmp_path / "config.json").write_text(json.dumps(published))
    model = composed(["+experiment=quickstart", f"run.init_from={tmp_path}"]).model
    for name in ("model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_key_value_heads",
                 "num_local_experts", "num_experts_per_tok", "attention_multiplier", "embedding_multiplier",
                 "residual_multiplier", "logits_scaling", "rms_norm_eps", "rope_theta", "vocab_size"):  # fmt: skip
        assert getattr(model, name) == published[name], name
    assert model.shared_size == published.get("shared_intermediate_size", 0)
    assert (model.attention_dropout, model.initializer_range) == (0.0, 0.1)  # the run's own


@pytest.mark.parametrize(
    ("published", "change", "said"),
    [
        (GRANITE_3_SHARED, {"model_type": "granitemoehybrid"}, "'granitemoehybrid' model"),
        (GRANITE_3_MOE, {"shared_intermediate_size": 1024}, "shared_intermediate_size 1024; of a 'granitemoe' model"),
        (GRANITE_3_SHARED, {"shared_intermediate_size": 0}, "the family without a shared expert"),
        (GRANITE_3_SHARED, {"attention_bias": True}, "attention_bias True"),
        (GRANITE_3_SHARED, {"hidden_act": "gelu"}, "hidden_act gelu"),
        (GRANITE_3_SHARED, {"position_embedding_type": "nope"}, "position_embedding_type nope"),
        (GRANITE_3_SHARED, {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_type yarn"),
        (GRANITE_3_MOE, {"sliding_window": 4096}, "sliding_window 4096"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) and len(value) < 9 else "",
)
def test_a_field_that_is_not_trained_with_is_refused(
    published: dict[str, Any], change: dict[str, Any], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("powertrain.train.init_from._check_files", lambda *_: None)
    (tmp_path / "config.json").write_text(json.dumps(published | change))
    with pytest.raises(ConfigError, match=said):
        composed(["+experiment=quickstart", f"run.init_from={tmp_path}"])
