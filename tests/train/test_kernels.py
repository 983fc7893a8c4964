"""Our kernels against the plain reference in float64: values and gradients, on inputs and routing that are shared."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from train.model import experts

# Of a whole tensor, relative to its norm; a few unit roundoffs (1e-16, 6e-8, 4e-3), which add up like a random walk.
BOUNDS = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 1e-2}


def relative(got: Tensor, expected: Tensor) -> float:
    size = expected.norm()
    return ((got.double() - expected).norm() / size).item() if size else got.double().norm().item()


def values_and_gradients(function: Callable[..., Tensor], tensors: list[Tensor], grad: Tensor) -> list[Tensor]:
    tensors = [tensor.clone().requires_grad_() for tensor in tensors]
    result = function(*tensors)
    return [result.detach(), *torch.autograd.grad(result, tensors, grad)]


# name → (tokens, hidden, intermediate, experts, top-k, how experts are chosen)
ROUTINGS: dict[str, tuple[int, int, int, int, int, str]] = {
    "even": (64, 16, 8, 4, 2, "random"),
    "odd sizes": (33, 23, 7, 5, 3, "random"),
    "most experts empty": (5, 8, 4, 16, 1, "random"),
    "one expert takes all": (12, 8, 4, 4, 1, "last"),
    "one expert takes many": (700, 8, 4, 4, 1, "last"),
    "many rows": (900, 8, 4, 3, 2, "random"),
    "every expert takes all": (9, 8, 4, 3, 3, "random"),
    "a single token": (1, 64, 32, 5, 4, "random"),
    "a single expert": (6, 8, 4, 1, 1, "random"),
}


def routing(tokens: int, count: int, top_k: int, how: str) -> Tensor:
    if how == "last":
        return torch.full((tokens, top_k), count - 1)
    return torch.stack([torch.randperm(count)[:top_k] for _ in range(tokens)])


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("name", ROUTINGS)
def test_sorted_experts_equal_a_loop_over_tokens(name: str, dtype: torch.dtype) -> None:
    tokens, hidden, intermediate, count, top_k, how = ROUTINGS[name]
    torch.manual_seed(0)
    chosen = routing(tokens, count, top_k, how)
    shapes = [(tokens, hidden), (tokens, top_k), (count, 2 * intermediate, hidden), (count, hidden, intermediate)]
    inputs = [torch.randn(shape, dtype=torch.float64).to(dtype) for shape in shapes]
    grad = torch.randn(tokens, hidden, dtype=torch.float64).to(dtype)

    def ours(rows: Tensor, weights: Tensor, gate_up_proj: Tensor, down_proj: Tensor) -> Tensor:
        replaced: Any = nn.Module()
        replaced.gate_up_proj, replaced.down_proj = gate_up_proj, down_proj
        return experts.sorted_experts(replaced, rows, chosen, weights)

    def plain(rows: Tensor, weights: Tensor, gate_up_proj: Tensor, down_proj: Tensor) -> Tensor:
        outputs = []
        for token in range(tokens):
            terms = []
            for k in range(top_k):
                expert = chosen[token, k]
                gate, up = (gate_up_proj[expert] @ rows[token]).chunk(2)
                terms.append(weights[token, k] * (down_proj[expert] @ (gate * torch.sigmoid(gate) * up)))
            outputs.append(sum(terms))
        return torch.stack(outputs)  # type: ignore[arg-type]

    got = values_and_gradients(ours, inputs, grad)
    expected = values_and_gradients(plain, [tensor.double() for tensor in inputs], grad.double())
    for name_of, ours_, theirs in zip(("output", "tokens", "weights", "gate_up", "down"), got, expected, strict=True):
        assert ours_.dtype == dtype
        assert relative(ours_, theirs) < BOUNDS[dtype], name_of


def test_rows_come_in_few_sizes_with_little_filling() -> None:
    counts = range(1, 1 << 16)
    sizes = [experts._filled(count) for count in counts]
    assert experts._filled(0) == 0
    assert all(0 <= size - count < max(experts.ROWS, count / 16) for size, count in zip(sizes, counts, strict=True))
    assert len(set(sizes)) < 150  # oneDNN keeps 1024 compiled products, and there are five of each size


def test_sorted_experts_do_not_depend_on_threads() -> None:
    torch.manual_seed(0)
    chosen = routing(300, 8, 3, "random")
    inputs = [torch.randn(shape) for shape in ((300, 32), (300, 3), (8, 48, 32), (8, 32, 24))]
    results = []
    for threads in (1, 2):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        results.append(
            values_and_gradients(
                lambda x, w, g, d: experts._SortedExperts.apply(x, chosen, w, g, d), inputs, torch.ones(300, 32)
            )
        )
        torch.set_num_threads(before)
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))
