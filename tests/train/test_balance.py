import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.granitemoe.modeling_granitemoe import load_balancing_loss_func

from powertrain.data.loader import IGNORE_INDEX
from powertrain.train.balance import Balance
from powertrain.train.config import BalanceConfig, Config, ModelConfig
from powertrain.train.loss import LanguageModelLoss, Outputs

LAYERS, EXPERTS, TOP_K, TOKENS = 3, 5, 2, 40


def alone(tensor: Tensor) -> Tensor:
    """The reduce of a single rank."""
    return tensor


def make(scope: str, pool: str = "layer", layers: int = LAYERS, experts: int = EXPERTS, reduce=alone) -> Balance:
    model = ModelConfig(num_hidden_layers=layers, num_local_experts=experts)
    return Balance(Config(model=model, balance=BalanceConfig(scope=scope, pool=pool)), reduce)


def draw(seed: int, tokens: int = TOKENS) -> Tensor:
    """Router logits (layers, tokens, experts) that prefer some experts."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(LAYERS, tokens, EXPERTS, generator=generator)
    return (logits + torch.randn(LAYERS, 1, EXPERTS, generator=generator)).requires_grad_()


def statistics(logits: Tensor, top_k: int = TOP_K) -> Outputs:
    """What the loss module would return for these router logits, written down anew."""
    chosen = torch.zeros_like(logits).scatter_(-1, logits.argsort(dim=-1, descending=True)[..., :top_k], 1.0)
    exponentials = logits.exp()
    return Outputs(
        torch.zeros(()),
        torch.tensor(logits.shape[1]),
        chosen.sum(1).long(),
        (exponentials / exponentials.sum(-1, keepdim=True)).sum(1),
        exponentials.sum(-1).log().square().sum(1),
    )


def by_hand(logits: Tensor, frequency: Tensor) -> Tensor:
    """Σ_layers E·Σ_e f_e·P_e with P over all these tokens, term by term."""
    total = torch.zeros(())
    for layer in range(logits.shape[0]):
        for expert in range(logits.shape[2]):
            mean = torch.softmax(logits[layer], dim=-1)[:, expert].mean()
            total = total + logits.shape[2] * frequency[layer, expert] * mean
    return total


def share_of(assignments: Tensor) -> Tensor:
    return assignments / assignments.sum(-1, keepdim=True)


def outputs_of(assignments: list[list[int]], probabilities: list[list[float]], z: list[float]) -> Outputs:
    zero = torch.zeros(())
    return Outputs(zero, zero, torch.tensor(assignments), torch.tensor(probabilities), torch.tensor(z))


def test_numbers_worked_out_on_paper() -> None:
    # Two layers, two experts, top-1, four tokens of a batch of eight.
    outputs = outputs_of([[3, 1], [2, 2]], [[2.5, 1.5], [1.0, 3.0]], [6.0, 2.0])
    # layer: 2·(3/4·2.5 + 1/4·1.5)/8 + 2·(1/2·1 + 1/2·3)/8 = 0.5625 + 0.5
    balance, z = make("micro", layers=2, experts=2).losses(outputs, batch_tokens=8)
    assert balance.item() == pytest.approx(1.0625)
    assert z.item() == pytest.approx(1.0)  # (6 + 2)/8
    # all: f = (5/8, 3/8) for both: 2·(5/8·3.5 + 3/8·4.5)/8
    balance, _ = make("micro", "all", layers=2, experts=2).losses(outputs, batch_tokens=8)
    assert balance.item() == pytest.approx(0.96875)


@pytest.mark.parametrize("scope", ["lagged", "accumulated", "dp", "micro"])
@pytest.mark.parametrize("pool", ["layer", "all"])
def test_a_balanced_layer_contributes_one(scope: str, pool: str) -> None:
    uniform = outputs_of([[8, 8, 8, 8, 8]] * 3, [[4.0] * 5] * 3, [0.0] * 3)
    balance = make(scope, pool)
    for _ in range(2):
        assert balance.losses(uniform, batch_tokens=20)[0].item() == pytest.approx(3.0)
        balance.end_step(skipped=False)


@pytest.mark.parametrize("scope", ["accumulated", "dp", "micro"])
def test_formula_of_one_undivided_batch(scope: str) -> None:
    logits = draw(0)
    outputs = statistics(logits)
    balance, z = make(scope).losses(outputs, TOKENS)
    torch.testing.assert_close(balance, by_hand(logits, share_of(outputs.assignments)))
    expected = sum(torch.logsumexp(logits[layer], -1).square().mean() for layer in range(LAYERS))
    torch.testing.assert_close(z, expected)


@pytest.mark.parametrize("layers", [1, 3])
def test_pool_all_of_a_micro_batch_is_transformers_loss(layers: int) -> None:
    logits = draw(1)[:layers]
    theirs = load_balancing_loss_func(tuple(logits), EXPERTS, TOP_K)
    ours, _ = make("micro", "all", layers=layers).losses(statistics(logits), TOKENS)
    torch.testing.assert_close(ours, theirs * layers / TOP_K)
    if layers > 1:
        separate, _ = make("micro", "layer", layers=layers).losses(statistics(logits), TOKENS)
        assert abs(separate - ours) > 0.01


@pytest.mark.parametrize("ranks", [1, 2])
def test_dp_is_lm_engines_loss(ranks: int) -> None:
    """Per layer and micro-batch, with frequencies over the ranks: E · Σ normalised P · normalised f + 0.1 · z, which
    with our coefficients 0.01 and 0.001 is 0.01 of it; `lagged`, which takes f from the batch before, is not."""
    logits = draw(2)
    parts = [part.detach().requires_grad_() for part in logits.split(TOKENS // ranks, dim=1)]  # one a rank
    chosen = [part.argsort(dim=-1, descending=True)[..., :TOP_K] for part in parts]
    theirs = torch.zeros(())
    for part in parts:
        for layer in range(LAYERS):
            frequency = sum(torch.bincount(c[layer].flatten(), minlength=EXPERTS) for c in chosen).float()
            probabilities = torch.softmax(part[layer], dim=-1).sum(0)
            switch = EXPERTS * (F.normalize(probabilities, p=1, dim=0) * F.normalize(frequency, p=1, dim=0)).sum()
            theirs = theirs + (switch + 0.1 * torch.logsumexp(part[layer], dim=-1).square().mean()) / ranks

    def ours(scope: str) -> Tensor:
        total = torch.zeros(())
        for part in parts:
            others = sum(statistics(other).assignments for other in parts) - statistics(part).assignments
            balance = make(scope, reduce=lambda tensor, others=others: tensor + others)
            balance.previous = statistics(draw(3)).assignments
            balance_loss, z_loss = balance.losses(statistics(part), TOKENS)
            total = total + balance_loss + 0.1 * z_loss
        return total

    assert ours("dp").item() == pytest.approx(theirs.item(), rel=1e-7)
    for mine, other in zip(*(torch.autograd.grad(loss, parts) for loss in (ours("dp"), theirs)), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-8)
    assert abs(ours("lagged").item() - theirs.item()) > 1e-3


def test_layers_that_collapse_onto_complementary_experts_hide_in_a_pool() -> None:
    logits = torch.full((2, 8, 2), -20.0)
    logits[0, :, 0] = logits[1, :, 1] = 20.0
    outputs = statistics(logits, top_k=1)
    pooled, _ = make("micro", "all", 2, 2).losses(outputs, 8)
    separate, _ = make("micro", "layer", 2, 2).losses(outputs, 8)
    assert pooled.item() == pytest.approx(2.0)  # as if balanced
    assert separate.item() == pytest.approx(4.0)  # the worst there is


def test_lagged_starts_uniform_and_then_uses_the_previous_batch() -> None:
    balance = make("lagged")
    batches = [draw(seed) for seed in range(3)]
    frequency = torch.full((LAYERS, EXPERTS), 1 / EXPERTS)
    for logits in batches:
        parts = logits.split([10, 25, 5], dim=1)
        total = sum(balance.losses(statistics(part), TOKENS)[0] for part in parts)
        torch.testing.assert_close(total, by_hand(logits, frequency))
        assignments = statistics(logits).assignments
        assert torch.equal(balance.end_step(skipped=False), assignments)
        assert torch.equal(balance.previous, assignments)
        frequency = share_of(assignments)


def test_a_skipped_step_is_forgotten() -> None:
    balance = make("lagged")
    first, broken, third = draw(0), draw(1), draw(2)
    balance.losses(statistics(first), TOKENS)
    balance.end_step(skipped=False)
    kept = balance.previous.clone()
    balance.losses(statistics(broken), TOKENS)
    assert torch.equal(balance.end_step(skipped=True), statistics(broken).assignments)
    assert torch.equal(balance.previous, kept)
    loss, _ = balance.losses(statistics(third), TOKENS)
    torch.testing.assert_close(loss, by_hand(third, share_of(statistics(first).assignments)))
    assert torch.equal(balance.end_step(skipped=False), statistics(third).assignments)


def test_a_step_skipped_first_leaves_the_start_uniform() -> None:
    balance, logits = make("lagged"), draw(0)
    balance.losses(statistics(logits), TOKENS)
    balance.end_step(skipped=True)
    assert not balance.previous.any()
    loss, _ = balance.losses(statistics(logits), TOKENS)
    torch.testing.assert_close(loss, by_hand(logits, torch.full((LAYERS, EXPERTS), 1 / EXPERTS)))


def test_a_restored_previous_goes_on_as_before() -> None:
    one, logits = make("lagged"), draw(0)
    one.losses(statistics(logits), TOKENS)
    one.end_step(skipped=False)
    other = make("lagged")
    other.previous = copy.deepcopy(one.previous)
    following = statistics(draw(1))
    assert torch.equal(one.losses(following, TOKENS)[0], other.losses(following, TOKENS)[0])


@pytest.mark.parametrize("skipped", [False, True])
def test_accumulated_grows_within_a_step_and_resets_after_it(skipped: bool) -> None:
    balance, logits = make("accumulated"), draw(3)
    for _ in range(2):
        seen = torch.zeros(LAYERS, EXPERTS)
        for part in logits.split(10, dim=1):
            outputs = statistics(part)
            seen = seen + outputs.assignments
            loss, _ = balance.losses(outputs, TOKENS)
            torch.testing.assert_close(loss, by_hand(part, share_of(seen)) * 10 / TOKENS)
        assert torch.equal(balance.end_step(skipped), seen.long())


@pytest.mark.parametrize("scope", ["dp", "accumulated", "micro", "lagged"])
def test_two_ranks(scope: str) -> None:
    """Two ranks of two micro-batches each; the fake reduce adds what the other rank counts at that moment."""
    logits = draw(4)
    parts = [[statistics(p) for p in rank.split(10, dim=1)] for rank in logits.split(20, dim=1)]
    incoming: list[list[Tensor]] = [[], []]
    ranks = [make(scope, reduce=lambda t, r=r: t + incoming[r].pop(0)) for r in range(2)]
    previous = statistics(draw(5)).assignments
    collective = scope in ("dp", "accumulated")
    total = torch.zeros(())
    for rank, balance in enumerate(ranks):
        balance.previous = previous
        mine, others = parts[rank], parts[1 - rank]
        if collective:
            incoming[rank] = [o.assignments for o in others]
        for step, outputs in enumerate(mine):
            loss, _ = balance.losses(outputs, TOKENS)
            total = total + loss
            frequency = {
                "micro": outputs.assignments,
                "dp": outputs.assignments + others[step].assignments,
                "accumulated": sum(p[s].assignments for p in parts for s in range(step + 1)),
                "lagged": previous,
            }[scope]
            tokens = slice(20 * rank + 10 * step, 20 * rank + 10 * (step + 1))
            torch.testing.assert_close(loss, by_hand(logits[:, tokens], share_of(frequency)) / 4)
        if not collective:
            incoming[rank] = [sum(o.assignments for o in others)]
        counts = balance.end_step(skipped=False)
        assert torch.equal(counts, statistics(logits).assignments), "the load of the global batch"
        assert not incoming[rank], "every rank reduces the same number of times"
    if scope == "lagged":
        torch.testing.assert_close(total, by_hand(logits, share_of(previous)))


def test_z_of_parts_adds_up_to_z_of_the_batch() -> None:
    logits = draw(6)
    balance = make("micro")
    total = sum(balance.losses(statistics(part), TOKENS)[1] for part in logits.split([1, 30, 9], dim=1))
    expected = sum(torch.logsumexp(logits[layer], -1).square().mean() for layer in range(LAYERS))
    torch.testing.assert_close(total, expected)


@pytest.mark.parametrize("scope", ["lagged", "accumulated", "dp", "micro"])
@pytest.mark.parametrize("pool", ["layer", "all"])
def test_gradient_flows_only_through_probabilities(scope: str, pool: str) -> None:
    logits = draw(7)
    outputs = statistics(logits)
    balance = make(scope, pool)
    balance.previous = statistics(draw(8)).assignments
    loss, _ = balance.losses(outputs, TOKENS)
    frequency = share_of(balance.previous if scope == "lagged" else outputs.assignments)
    if pool == "all":
        frequency = frequency.mean(0, keepdim=True).expand(LAYERS, EXPERTS)
    # d softmax: E/T · p_e (f_e − Σ f·p), by hand
    p = torch.softmax(logits.detach(), dim=-1)
    inner = (frequency[:, None] * p).sum(-1, keepdim=True)
    expected = EXPERTS / TOKENS * p * (frequency[:, None] - inner)
    torch.testing.assert_close(torch.autograd.grad(loss, logits)[0], expected)


def test_a_dense_model_has_neither_loss() -> None:
    empty = torch.zeros(0, 0)
    for scope in ("lagged", "accumulated", "dp", "micro"):
        model = ModelConfig(model_type="granite", num_hidden_layers=3, num_local_experts=8)
        balance = Balance(Config(model=model, balance=BalanceConfig(scope=scope)), alone)
        losses = balance.losses(Outputs(torch.zeros(()), torch.tensor(1), empty, empty, torch.zeros(0)), 8)
        assert [loss.item() for loss in losses] == [0.0, 0.0]
        assert balance.end_step(skipped=False).numel() == 0


# ------------------------------------------------------------------------------------- splits of a real model


def gradients(config: Config, loss: LanguageModelLoss, micro: int) -> dict[str, Tensor]:
    """Of the whole loss of 8 sequences, `micro` at a time; the coefficients are large so that they matter."""
    generator = torch.Generator().manual_seed(0)
    ids, labels = (torch.randint(97, (8, 16), generator=generator) for _ in range(2))
    labels[0] = labels[3, :9] = IGNORE_INDEX
    positions = torch.arange(16).repeat(8, 1)
    positions[:, 6:] -= 6
    targets = (labels != IGNORE_INDEX).sum()
    balance = Balance(config, alone)
    balance.previous = torch.arange(24).reshape(3, 8)
    loss.zero_grad()
    for first in range(0, 8, micro):
        rows = slice(first, first + micro)
        outputs = loss(ids[rows], labels[rows], positions[rows])
        balance_loss, z_loss = balance.losses(outputs, 8 * 16)
        (outputs.cross_entropy / targets + balance_loss + 0.1 * z_loss).backward()
    return {name: parameter.grad.clone() for name, parameter in loss.named_parameters()}


@pytest.mark.parametrize("scope", ["lagged", "accumulated", "micro"])
def test_only_lagged_does_not_depend_on_how_a_batch_is_split(
    small_config: Callable[..., Config], small_loss: Callable[..., LanguageModelLoss], scope: str
) -> None:
    config = small_config(f"balance.scope={scope}")
    loss = small_loss(config)
    whole = gradients(config, loss, 8)
    for micro in (1, 2, 4):
        split = gradients(config, loss, micro)
        errors = {name: ((split[name] - g).norm() / g.norm()).item() for name, g in whole.items()}
        worst = max(errors, key=lambda name: errors[name])
        if scope == "lagged":
            assert errors[worst] < 1e-5, (micro, worst, errors[worst])
        else:
            assert errors[worst] > 1e-3, (micro, worst, errors[worst])


@pytest.mark.parametrize("top_k", [1, 2])
def test_one_expert_a_token_leaves_the_router_without_the_language_models_gradient(
    small_config: Callable[..., Config], small_loss: Callable[..., LanguageModelLoss], top_k: int
) -> None:
    """A softmax over one logit is 1: what `config.doubts` says of num_experts_per_tok=1."""
    loss = small_loss(small_config(f"model.num_experts_per_tok={top_k}"))
    ids = torch.randint(97, (2, 16), generator=torch.Generator().manual_seed(0))
    loss(ids, ids.roll(-1, 1), torch.arange(16).expand(2, 16)).cross_entropy.backward()
    routers = [p.grad.abs().max().item() for name, p in loss.named_parameters() if "router" in name]
    assert len(routers) == 3
    assert all((gradient == 0) == (top_k == 1) for gradient in routers), routers
