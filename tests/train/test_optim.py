import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from powertrain.schedulers import Power
from powertrain.schedulers.adapters import PowerLR
from powertrain.train.config import Config, OptimizerConfig
from powertrain.train.engine import Engine
from powertrain.train.loss import LanguageModelLoss
from powertrain.train.model import granite, mup
from powertrain.train.optim import BFloat16Weights, adamw, mup_groups, parameter_groups

# m_width 4; fan-in of down 24/8 = 3.
PAPER = {"embedding": 1, "head": 1, "attention": 1 / 4, "attention_out": 1 / 4, "router": 1 / 4, "gate_up": 1 / 4}
RATES = {
    "paper": {**PAPER, "down": 1 / 4, "norm": 1},
    "fan_in": {**PAPER, "down": 1 / 3, "norm": 1},
}


def groups_of(config: Config, model: nn.Module) -> list[dict[str, Any]]:
    return parameter_groups(model.named_parameters(), mup.table(config), config.optimizer)


@pytest.mark.parametrize("kind", ["granitemoe", "granite"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("rule", ["paper", "fan_in"])
def test_every_parameter_is_in_the_group_of_its_role(
    small_config: Callable[..., Config], kind: str, tied: bool, rule: str
) -> None:
    config = small_config(f"model.model_type={kind}", f"model.tie_word_embeddings={tied}", f"mup.rule={rule}")
    model = granite.build(config, "meta")
    groups = groups_of(config, model)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(grouped) == sorted(names)
    assert len(set(grouped)) == len(grouped)
    for group in groups:
        assert group["params"]
        assert {mup.role_of(names[id(parameter)]) for parameter in group["params"]} == {group["name"]}
    absent = ({"head"} if tied else set()) | ({"router"} if kind == "granite" else set())
    rates = {role: rate for role, rate in RATES[rule].items() if role not in absent}
    assert {group["name"]: group["lr_multiplier"] for group in groups} == pytest.approx(rates)
    assert [group["name"] for group in groups] == list(rates), "the table's order"


@pytest.mark.parametrize(
    ("kind", "tied", "rule", "mode"),
    [
        ("granitemoe", True, "paper", "coupled"),
        ("granitemoe", False, "fan_in", "independent"),
        ("granite", False, "paper", "independent"),
        ("granite", True, "fan_in", "coupled"),
    ],
)
def test_groups_for_another_loop_are_the_engines(
    small_config: Callable[..., Config], kind: str, tied: bool, rule: str, mode: str
) -> None:
    """Of a model that Transformers alone has made: members, multipliers and decays, as of a run's optimizer."""
    config = small_config(
        f"model.model_type={kind}", f"model.tie_word_embeddings={tied}", f"mup.rule={rule}",
        f"optimizer.weight_decay_mode={mode}", "optimizer.weight_decay=0.3",
    )  # fmt: skip
    engine = Engine(config)
    engine.prepare(LanguageModelLoss(granite.build(config)), mup.table(config))
    theirs = AutoModelForCausalLM.from_config(granite.transformers_config(config))
    groups = mup_groups(theirs, config.mup, config.optimizer)
    names = [{id(parameter): name for name, parameter in model.named_parameters()} for model in (theirs, engine.model)]
    ours = [
        {names[i][id(p)]: (group["lr_multiplier"], group["weight_decay"]) for group in of for p in group["params"]}
        for i, of in enumerate((groups, engine.optimizer.param_groups))
    ]
    assert ours[0] == ours[1]
    # AdamW makes a call for each group, so those that are alike are one there.
    assert len(engine.optimizer.param_groups) == len(set(ours[1].values())) < len(groups)
    assert {group["name"]: group["lr_multiplier"] for group in groups} == engine.lr_multipliers
    for mine in groups:
        assert mine["lr"] == pytest.approx(RATES[rule].get(mine["name"], 1))  # by hand
        decay = {"coupled": 0.3, "independent": 0.3 / RATES[rule].get(mine["name"], 1)}[mode]
        assert mine["weight_decay"] == pytest.approx(0 if mine["name"] == "norm" else decay)


def test_groups_for_another_loop_carry_the_rates_of_the_schedule(small_config: Callable[..., Config]) -> None:
    config = small_config()
    groups = mup_groups(granite.build(config), config.mup)
    optimizer = torch.optim.AdamW(groups, lr=1.0)
    scheduler = PowerLR(optimizer, batch_tokens=4096, warmup_tokens=0)
    optimizer.step()
    scheduler.step()
    rate = Power(warmup_tokens=0)(tokens=4096, batch=1)
    assert {g["name"]: g["lr"] for g in optimizer.param_groups} == pytest.approx(
        {g["name"]: rate * RATES["paper"][g["name"]] for g in groups}
    )


def test_a_parameter_without_a_role_is_refused(small_config: Callable[..., Config]) -> None:
    config = small_config()
    with pytest.raises(ValueError, match=r"'model\.extra\.weight'"):
        parameter_groups([("model.extra.weight", nn.Parameter(torch.ones(2)))], mup.table(config), config.optimizer)


@pytest.mark.parametrize("rule", ["paper", "fan_in"])
@pytest.mark.parametrize("mode", ["coupled", "independent"])
def test_one_step_without_a_gradient_shrinks_by_the_weight_decay(
    small_config: Callable[..., Config], mode: str, rule: str
) -> None:
    config = small_config(
        f"optimizer.weight_decay_mode={mode}",
        "optimizer.weight_decay=0.3",
        f"mup.rule={rule}",
        "model.tie_word_embeddings=false",
    )
    model = granite.build(config)
    for parameter in model.parameters():
        nn.init.ones_(parameter)
        parameter.grad = torch.zeros_like(parameter)
    optimizer = adamw(groups_of(config, model), config.optimizer)
    for group in optimizer.param_groups:
        group["lr"] = 0.2 * group["lr_multiplier"]
    optimizer.step()
    for name, parameter in model.named_parameters():
        role = mup.role_of(name)
        rate = RATES[rule][role] if mode == "coupled" else 1
        factor = 1 - 0.2 * 0.3 * rate if role != "norm" else 1.0
        torch.testing.assert_close(parameter.data, torch.full_like(parameter, factor), rtol=1e-6, atol=0)


def test_updates_follow_adamw_by_hand() -> None:
    """Three steps in float64 with the formulas of the paper, gradients of very different sizes among them."""
    config = OptimizerConfig(betas=(0.7, 0.9), eps=1e-10, weight_decay=0.0)
    start = torch.tensor([0.5, -2.0, 1e-3])
    gradients = [torch.tensor([1e-7, 3.0, -40.0]), torch.tensor([-3e-7, 0.0, -4.0]), torch.tensor([2e-7, 1.0, 0.4])]
    parameter = nn.Parameter(start.clone())
    row = {"embedding": mup.Row(1.0, 0.25, True)}
    optimizer = adamw(parameter_groups([("model.embed_tokens.weight", parameter)], row, config), config)
    expected, first, second = start.double(), torch.zeros(3).double(), torch.zeros(3).double()
    for step, gradient in enumerate(gradients, start=1):
        rate = 0.1 / step
        for group in optimizer.param_groups:
            group["lr"] = rate * group["lr_multiplier"]
        parameter.grad = gradient.clone()
        optimizer.step()
        first = 0.7 * first + 0.3 * gradient.double()
        second = 0.9 * second + 0.1 * gradient.double() ** 2
        expected -= 0.25 * rate * (first / (1 - 0.7**step)) / ((second / (1 - 0.9**step)).sqrt() + 1e-10)
    torch.testing.assert_close(parameter.detach().double(), expected, rtol=1e-5, atol=1e-7)


def test_defaults_are_those_of_the_design(small_config: Callable[..., Config]) -> None:
    config = small_config()
    optimizer = adamw(groups_of(config, granite.build(config)), config.optimizer)
    assert (config.optimizer.weight_decay_mode, config.optimizer.max_grad_norm) == ("coupled", 1.0)
    for group in optimizer.param_groups:
        assert (tuple(group["betas"]), group["eps"], group["amsgrad"]) == ((0.9, 0.95), 1e-10, False)
        assert group["weight_decay"] == (0.0 if group["name"] == "norm" else 0.1)
        assert group["lr"] == 0.0  # until the loop writes one


# ------------------------------------------------------------------------------- bf16 weights, float32 masters


def batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids, labels = (torch.randint(97, (2, 16), generator=generator) for _ in range(2))
    return {"input_ids": ids, "labels": labels, "position_ids": torch.arange(16).repeat(2, 1)}


def backward(module: nn.Module, scale: float = 1.0) -> Tensor:
    loss = module(**batch()).cross_entropy
    (loss * scale).backward()
    return loss.detach()


@pytest.mark.parametrize("kind", ["granitemoe", "granite"])
@pytest.mark.parametrize("tied", [True, False])
def test_bfloat16_weights_are_close_to_float32(
    small_config: Callable[..., Config], small_loss: Callable[..., LanguageModelLoss], kind: str, tied: bool
) -> None:
    # Every token goes to both experts: with a choice, one near a tie may fall differently in bf16.
    config = small_config(f"model.model_type={kind}", f"model.tie_word_embeddings={tied}", "model.num_local_experts=2")
    plain, wrapped = small_loss(config), small_loss(config)
    before = {name: p.detach().clone() for name, p in wrapped.named_parameters()}
    seen: dict[str, torch.dtype] = {}
    norm = wrapped.model.model.norm
    norm.register_forward_hook(lambda m, i, o: seen.update(weight=m.weight.dtype, output=o.dtype))
    expected = backward(plain)
    half = BFloat16Weights(wrapped)
    got = backward(half)
    assert seen == {"weight": torch.bfloat16, "output": torch.bfloat16}
    assert got.dtype == torch.float32
    assert got != expected
    torch.testing.assert_close(got, expected, rtol=5e-3, atol=0)

    gradients = {name: p.grad for name, p in plain.named_parameters()}
    for name, parameter in wrapped.named_parameters():
        assert parameter.dtype == parameter.grad.dtype == torch.float32
        assert torch.equal(parameter, before[name]), "the masters are only read"
        cosine = torch.cosine_similarity(parameter.grad.flatten(), gradients[name].flatten(), dim=0)
        assert cosine > 0.99, (name, cosine)
    assert {f"module.{name}" for name in before} == {name for name, _ in half.named_parameters()}


@pytest.mark.parametrize("tied", [True, False])
def test_tied_weights_stay_tied(
    small_config: Callable[..., Config], small_loss: Callable[..., LanguageModelLoss], tied: bool
) -> None:
    loss = small_loss(small_config("model.model_type=granite", f"model.tie_word_embeddings={tied}"))
    half = BFloat16Weights(loss)
    used: list[Tensor] = []
    loss.model.model.embed_tokens.register_forward_hook(
        lambda m, i, o: used.extend((m.weight, loss.model.lm_head.weight))
    )
    backward(half)
    assert (used[0] is used[1]) == tied, "in the bf16 forward pass"
    assert (loss.model.lm_head.weight is loss.model.model.embed_tokens.weight) == tied
    # The look-up's gradient is zero for tokens that were not read; the head's reaches every token.
    unread = [token for token in range(97) if token not in batch()["input_ids"]]
    reached = loss.model.model.embed_tokens.weight.grad[unread].abs().sum(1) > 0
    assert len(unread) > 50 and (reached.all() if tied else not reached.any())


def test_a_change_too_small_for_bfloat16_stays_in_the_master(
    small_config: Callable[..., Config], small_loss: Callable[..., LanguageModelLoss]
) -> None:
    loss = small_loss(small_config("model.model_type=granite"))
    half = BFloat16Weights(loss)
    optimizer = torch.optim.SGD(loss.parameters(), lr=1.0)
    weight = loss.model.model.norm.weight  # ones: bf16's next number is 1 + 2^-7
    for _ in range(16):
        weight.grad = torch.full_like(weight, -(2.0**-10))
        optimizer.step()
    assert torch.equal(weight, torch.full_like(weight, 1 + 2**-6))
    seen = []
    loss.model.model.norm.register_forward_hook(lambda m, i, o: seen.append(m.weight.detach().clone()))
    backward(half)
    assert torch.equal(seen[0], torch.full_like(weight, 1 + 2**-6, dtype=torch.bfloat16)), "made anew in each pass"


def test_gradients_accumulate_in_float32(
    small_config: Callable[..., Config], small_loss: Callable[..., LanguageModelLoss]
) -> None:
    """The second gradient is 2^-12 of the first, and would vanish in bf16's eight bits."""
    loss = small_loss(small_config("model.model_type=granite"))
    half = BFloat16Weights(loss)
    backward(half)
    first = {name: p.grad.clone() for name, p in loss.named_parameters()}
    backward(half, scale=2.0**-12)
    for name, parameter in loss.named_parameters():
        assert torch.equal(first[name], first[name].bfloat16().float()) or "embed" in name  # as large as bf16's are
        torch.testing.assert_close(parameter.grad, first[name] * (1 + 2.0**-12), rtol=2e-7, atol=0)
        assert (parameter.grad != first[name])[first[name] != 0].all(), name


def test_wrapping_changes_nothing_for_whoever_holds_the_model(
    small_config: Callable[..., Config], small_loss: Callable[..., LanguageModelLoss]
) -> None:
    config = small_config()
    loss = small_loss(config)
    expected = loss(**batch()).cross_entropy
    state = copy.deepcopy(loss.state_dict())
    backward(BFloat16Weights(loss))
    assert torch.equal(loss(**batch()).cross_entropy, expected)
    assert all(torch.equal(value, loss.state_dict()[name]) for name, value in state.items())
    assert isinstance(loss.model.model.norm.weight, nn.Parameter)
