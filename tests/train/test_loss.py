import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from powertrain import train
from powertrain.data.loader import IGNORE_INDEX
from powertrain.train.config import Config
from powertrain.train.loss import LanguageModelLoss, linear_cross_entropy

N, H, V = 23, 12, 41


def inputs(dtype: torch.dtype = torch.float32, scale: float = 2.0, masked: float = 0.3) -> tuple[Tensor, ...]:
    """Hidden states, head and labels, of which a share is masked."""
    generator = torch.Generator().manual_seed(0)
    hidden = (scale * torch.randn(N, H, generator=generator)).to(dtype).requires_grad_()
    weight = torch.randn(V, H, generator=generator).to(dtype).requires_grad_()
    labels = torch.randint(V, (N,), generator=generator)
    labels[torch.rand(N, generator=generator) < masked] = IGNORE_INDEX
    return hidden, weight, labels


def reference(hidden: Tensor, weight: Tensor, labels: Tensor, scaling: float) -> tuple[Tensor, ...]:
    """Sum and gradients by torch's own cross-entropy on whole float64 logits."""
    h, w = (t.detach().double().requires_grad_() for t in (hidden, weight))
    loss = F.cross_entropy(h @ w.T / scaling, labels, ignore_index=-100, reduction="sum")
    return loss.detach(), *torch.autograd.grad(loss, (h, w))


class Watch(TorchDispatchMode):
    """Counts matrix products and measures the largest tensor that an operator makes."""

    def __init__(self) -> None:
        super().__init__()
        self.products, self.largest = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.products += func.__name__.startswith(("mm", "addmm", "bmm"))
        if isinstance(result, Tensor):
            self.largest = max(self.largest, result.numel())
        return result


@pytest.mark.parametrize("chunk", [1, 2, 5, 22, 23, 1000])
@pytest.mark.parametrize("scaling", [1.0, 0.5, 6.0])
def test_value_and_gradients(monkeypatch: pytest.MonkeyPatch, chunk: int, scaling: float) -> None:
    monkeypatch.setattr(train.loss, "_CHUNK_LOGITS", chunk * V)
    monkeypatch.setattr(train.loss, "_CACHED_LOGITS", 2 * V)
    hidden, weight, labels = inputs()
    assert 0 < (labels == IGNORE_INDEX).sum() < N
    value, hidden_grad, weight_grad = reference(hidden, weight, labels, scaling)
    loss = linear_cross_entropy(hidden, weight, labels, scaling)
    (0.37 * loss).backward()  # as when the loop divides by the number of targets
    assert loss.dtype == torch.float32 and loss.shape == ()
    torch.testing.assert_close(loss.double(), value, rtol=1e-6, atol=0)
    torch.testing.assert_close(hidden.grad.double(), 0.37 * hidden_grad, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(weight.grad.double(), 0.37 * weight_grad, rtol=1e-5, atol=1e-5)
    assert not hidden.grad[labels == IGNORE_INDEX].any()


def test_a_chunk_limit_below_one_row_still_works(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train.loss, "_CHUNK_LOGITS", 3)
    hidden, weight, labels = inputs()
    value, *_ = reference(hidden, weight, labels, 2.0)
    torch.testing.assert_close(linear_cross_entropy(hidden, weight, labels, 2.0).double(), value, rtol=1e-6, atol=0)


def test_gradients_are_those_of_autograd_through_the_plain_form() -> None:
    hidden, weight, labels = inputs(masked=0.0)
    plain = -torch.log_softmax(hidden @ weight.T / 3, dim=-1).gather(1, labels[:, None]).sum()
    expected = torch.autograd.grad(plain, (hidden, weight))
    loss = linear_cross_entropy(hidden, weight, labels, 3.0)
    torch.testing.assert_close(loss, plain)
    for got, wanted in zip(torch.autograd.grad(loss, (hidden, weight)), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)


def test_a_small_step_changes_the_loss_by_the_gradient() -> None:
    """Central differences, in which no other implementation takes part."""
    hidden, weight, labels = inputs(scale=0.5)
    grads = torch.autograd.grad(linear_cross_entropy(hidden, weight, labels, 2.0), (hidden, weight))
    generator = torch.Generator().manual_seed(1)
    for index, grad in enumerate(grads):
        direction = torch.randn(grad.shape, generator=generator)
        direction /= direction.norm()
        ends = []
        for step in (0.05, -0.05):
            moved = [hidden.detach(), weight.detach()]
            moved[index] = moved[index] + step * direction
            ends.append(linear_cross_entropy(*moved, labels, 2.0).item())
        assert (ends[0] - ends[1]) / 0.1 == pytest.approx((grad * direction).sum().item(), rel=2e-3, abs=2e-3)


def test_only_what_needs_a_gradient_gets_one() -> None:
    hidden, weight, labels = inputs()
    _, hidden_grad, weight_grad = reference(hidden, weight, labels, 2.0)
    linear_cross_entropy(hidden, weight.detach(), labels, 2.0).backward()
    torch.testing.assert_close(hidden.grad.double(), hidden_grad, rtol=1e-5, atol=1e-6)
    assert weight.grad is None
    linear_cross_entropy(hidden.detach(), weight, labels, 2.0).backward()
    torch.testing.assert_close(weight.grad.double(), weight_grad, rtol=1e-5, atol=1e-6)


def test_all_labels_masked_is_zero_with_zero_gradients() -> None:
    hidden, weight, labels = inputs(masked=2.0)
    loss = linear_cross_entropy(hidden, weight, labels, 4.0)
    loss.backward()
    assert loss.item() == 0.0
    assert torch.equal(hidden.grad, torch.zeros_like(hidden)) and torch.equal(weight.grad, torch.zeros_like(weight))


def test_large_logits_stay_finite() -> None:
    hidden, weight, labels = inputs(scale=1e4)
    value, hidden_grad, _ = reference(hidden, weight, labels, 1.0)
    loss = linear_cross_entropy(hidden, weight, labels, 1.0)
    loss.backward()
    torch.testing.assert_close(loss.double(), value, rtol=1e-5, atol=0)
    torch.testing.assert_close(hidden.grad.double(), hidden_grad, rtol=1e-3, atol=1e-3)
    assert weight.grad.isfinite().all()


@pytest.mark.parametrize("chunk", [4, 1000])
def test_bfloat16(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    """Against float64 on the same bf16 numbers, so that only the arithmetic differs.

    A logit rounded to bf16 is off by at most 2^-9 of itself, and so a row's loss by at most 2·2^-9 of its largest
    logit. A gradient is rounded from logits (that error again), to bf16 before its product, and after it.
    """
    monkeypatch.setattr(train.loss, "_CHUNK_LOGITS", chunk * V)
    scaling = 4.0
    hidden, weight, labels = inputs(torch.bfloat16)
    value, hidden_grad, weight_grad = reference(hidden, weight, labels, scaling)
    loss = linear_cross_entropy(hidden, weight, labels, scaling)
    loss.backward()
    rounded = (hidden @ weight.T).detach().double() / scaling  # bf16 logits; from there on it is float32
    exact = F.cross_entropy(rounded, labels, ignore_index=-100, reduction="sum")
    torch.testing.assert_close(loss.double(), exact, rtol=1e-6, atol=0)
    largest = (hidden.double() @ weight.double().T / scaling).abs().amax(1)[labels != IGNORE_INDEX]
    assert loss.dtype == torch.float32
    assert abs(loss.double() - value) <= 2 * 2**-9 * largest.sum()
    assert hidden.grad.dtype == weight.grad.dtype == torch.bfloat16
    bound = 2 * 2**-9 * largest.max().item() + 3 * 2**-9
    for got, wanted in ((hidden.grad, hidden_grad), (weight.grad, weight_grad)):
        error = (got.double() - wanted).norm() / wanted.norm()
        assert 0 < error < bound < 0.05


def test_whole_logits_never_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train.loss, "_CHUNK_LOGITS", 3 * V)
    hidden, weight, labels = inputs()
    with Watch() as watch:
        linear_cross_entropy(hidden, weight, labels, 1.0).backward()
    assert watch.products >= 3 * 8  # eight chunks
    assert watch.largest <= max(3 * V, V * H) < N * V


def test_without_gradients_logits_are_all_that_is_computed() -> None:
    """Evaluation would otherwise take three matrix products where one is enough."""
    hidden, weight, labels = inputs()
    value, *_ = reference(hidden, weight, labels, 1.0)
    with torch.no_grad(), Watch() as watch:
        loss = linear_cross_entropy(hidden, weight, labels, 1.0)
    torch.testing.assert_close(loss.double(), value, rtol=1e-6, atol=0)
    assert watch.products == 1


# ------------------------------------------------------------------------------------------- the whole module


def batch(config: Config, rows: int = 3) -> dict[str, Tensor]:
    """Rows of documents with masked targets at their ends, the window's end among them."""
    generator = torch.Generator().manual_seed(2)
    shape = (rows, config.data.sequence_length)
    ids, labels = (torch.randint(config.model.vocab_size, shape, generator=generator) for _ in range(2))
    positions = torch.arange(shape[1]).repeat(rows, 1)
    for row, start in enumerate((5, 1, 12)[:rows]):
        positions[row, start:] -= start
        labels[row, start - 1] = IGNORE_INDEX
    labels[:, -1] = IGNORE_INDEX  # Transformers' loss has no target for it
    return {"input_ids": ids, "labels": labels, "position_ids": positions}


def transformers_loss(loss: LanguageModelLoss, parts: dict[str, Tensor]) -> Any:
    """Transformers' own forward with its own loss, which shifts the labels itself."""
    shifted = torch.roll(parts["labels"], 1, dims=1)
    return loss.model(
        input_ids=parts["input_ids"],
        labels=shifted,
        position_ids=parts["position_ids"],
        use_cache=False,
        **({"output_router_logits": False} if hasattr(loss.model.config, "num_local_experts") else {}),
    )


@pytest.mark.parametrize("kind", ["granitemoe", "granite"])
@pytest.mark.parametrize("tied", [True, False])
def test_module_equals_transformers_own_loss(
    monkeypatch: pytest.MonkeyPatch,
    small_config: Callable[..., Config],
    small_loss: Callable[..., LanguageModelLoss],
    kind: str,
    tied: bool,
) -> None:
    monkeypatch.setattr(train.loss, "_CHUNK_LOGITS", 7 * 97)
    config = small_config(f"model.model_type={kind}", f"model.tie_word_embeddings={tied}")
    loss = small_loss(config)
    hf = loss.model.config
    assert 1.0 not in (hf.logits_scaling, hf.embedding_multiplier, hf.residual_multiplier, hf.attention_multiplier)
    assert hf.attention_multiplier != pytest.approx((hf.hidden_size / hf.num_attention_heads) ** -0.5)
    parts = batch(config)
    count = (parts["labels"] != IGNORE_INDEX).sum()

    theirs = transformers_loss(loss, parts).loss * count
    theirs.backward()
    expected = {name: parameter.grad for name, parameter in loss.named_parameters()}
    loss.zero_grad()
    outputs = loss(**parts)
    outputs.cross_entropy.backward()

    torch.testing.assert_close(outputs.cross_entropy, theirs, rtol=1e-5, atol=0)
    assert outputs.targets == count == 3 * 16 - 3 - 3
    assert ("model.lm_head.weight" in expected) != tied
    for name, parameter in loss.named_parameters():
        scale = expected[name].abs().max()
        assert scale > 0
        assert ((parameter.grad - expected[name]).abs() <= 1e-5 * scale).all(), name


def test_router_statistics_equal_those_of_output_router_logits(
    small_config: Callable[..., Config], small_loss: Callable[..., LanguageModelLoss]
) -> None:
    config = small_config()
    loss, parts = small_loss(config), batch(config)
    outputs = loss(**parts)
    logits = loss.model(
        input_ids=parts["input_ids"], position_ids=parts["position_ids"], use_cache=False, output_router_logits=True
    ).router_logits
    assert len(logits) == 3 and logits[0].shape == (3 * 16, 8)
    for layer, rows in enumerate(logits):
        rows = rows.detach().double()
        counts = torch.zeros(8, dtype=torch.int64)
        for row in rows:
            counts[row.argsort(descending=True)[:2]] += 1
        assert torch.equal(outputs.assignments[layer], counts)
        probabilities = rows.exp() / rows.exp().sum(1, keepdim=True)
        torch.testing.assert_close(outputs.probabilities[layer].double(), probabilities.sum(0), rtol=1e-5, atol=1e-5)
        z = rows.exp().sum(1).log().square().sum()
        torch.testing.assert_close(outputs.z[layer].double(), z, rtol=1e-5, atol=0)
    assert not outputs.assignments.is_floating_point() and not outputs.assignments.requires_grad
    assert outputs.assignments.sum(1).tolist() == [3 * 16 * 2] * 3


def test_statistics_are_sums_over_micro_batches(
    small_config: Callable[..., Config], small_loss: Callable[..., LanguageModelLoss]
) -> None:
    config = small_config()
    loss, parts = small_loss(config), batch(config)
    whole = loss(**parts)
    pieces = [loss(**{name: part[row : row + 1] for name, part in parts.items()}) for row in range(3)]
    for field in whole._fields:
        total = sum(getattr(piece, field) for piece in pieces)
        torch.testing.assert_close(total, getattr(whole, field), rtol=1e-5, atol=1e-5)
    assert torch.equal(sum(piece.assignments for piece in pieces), whole.assignments)


def test_a_dense_model_has_no_router_statistics(
    small_config: Callable[..., Config], small_loss: Callable[..., LanguageModelLoss]
) -> None:
    config = small_config("model.model_type=granite")
    outputs = small_loss(config)(**batch(config))
    assert outputs.assignments.shape == outputs.probabilities.shape == (0, 0)
    assert outputs.z.shape == (0,)


def test_recomputation_counts_no_token_twice_and_gives_the_same_gradients(
    small_config: Callable[..., Config], small_loss: Callable[..., LanguageModelLoss]
) -> None:
    config = small_config()
    parts, results = batch(config), []
    for recompute in (False, True):
        loss = small_loss(config).train()
        calls: list[int] = []
        router = loss.model.model.layers[1].block_sparse_moe.router
        router.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        if recompute:
            loss.model.activation_checkpointing_enable({"use_reentrant": False})
        for _ in range(2):  # what the backward pass recomputed must not reach the next forward pass
            outputs = loss(**parts)
            (outputs.cross_entropy + outputs.probabilities.square().sum() + outputs.z.sum()).backward()
        assert len(calls) == (4 if recompute else 2)
        results.append((outputs, {name: p.grad for name, p in loss.named_parameters()}))
    (plain, gradients), (recomputed, recomputed_gradients) = results
    assert torch.equal(plain.assignments, recomputed.assignments)
    torch.testing.assert_close(plain.z, recomputed.z)
    for name, gradient in gradients.items():
        torch.testing.assert_close(recomputed_gradients[name], gradient)


@pytest.mark.parametrize("recompute", [False, True])
def test_nothing_of_a_pass_is_kept_after_it(
    small_config: Callable[..., Config], small_loss: Callable[..., LanguageModelLoss], recompute: bool
) -> None:
    config = small_config()
    loss = small_loss(config).train()
    if recompute:
        loss.model.activation_checkpointing_enable({"use_reentrant": False})
    logits: list[weakref.ref[Tensor]] = []
    for layer in loss.model.model.layers:
        router = layer.block_sparse_moe.router
        router.register_forward_hook(lambda module, inputs, output: logits.append(weakref.ref(output[0])))
    outputs = loss(**batch(config))
    (outputs.cross_entropy + outputs.z.sum()).backward()
    del outputs
    gc.collect()
    assert len(logits) == (6 if recompute else 3)
    assert [ref() for ref in logits if ref() is not None] == []


def test_a_failed_forward_does_not_leak_into_the_next(
    small_config: Callable[..., Config], small_loss: Callable[..., LanguageModelLoss]
) -> None:
    config = small_config()
    loss, parts = small_loss(config), batch(config)
    expected = loss(**parts)
    with pytest.raises(IndexError):
        loss(**(parts | {"input_ids": parts["input_ids"] + 97}))
    assert torch.equal(loss(**parts).assignments, expected.assignments)
