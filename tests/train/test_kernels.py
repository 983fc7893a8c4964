"""Our kernels against the plain reference in float64: values and gradients, on inputs and routing that are shared."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.func import functional_call
from transformers import GraniteMoeConfig
from transformers.models.granitemoe.modeling_granitemoe import GraniteMoeExperts

from powertrain.train.model import experts

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


def check_experts(implementation: str, name: str, dtype: torch.dtype, device: str) -> None:
    tokens, hidden, intermediate, count, top_k, how = ROUTINGS[name]
    torch.manual_seed(0)
    chosen = routing(tokens, count, top_k, how)
    shapes = [(tokens, hidden), (tokens, top_k), (count, 2 * intermediate, hidden), (count, hidden, intermediate)]
    inputs = [torch.randn(shape, dtype=torch.float64).to(dtype) for shape in shapes]
    grad = torch.randn(tokens, hidden, dtype=torch.float64).to(dtype)
    config = GraniteMoeConfig(
        hidden_size=hidden, intermediate_size=intermediate, num_local_experts=count, num_experts_per_tok=top_k
    )
    config._experts_implementation = implementation
    module = GraniteMoeExperts(config).to(device, dtype)

    def kernel(rows: Tensor, weights: Tensor, gate_up_proj: Tensor, down_proj: Tensor) -> Tensor:
        parameters = {"gate_up_proj": gate_up_proj, "down_proj": down_proj}
        return functional_call(module, parameters, (rows, chosen.to(device), weights))

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

    got = values_and_gradients(kernel, [tensor.to(device) for tensor in inputs], grad.to(device))
    expected = values_and_gradients(plain, [tensor.double() for tensor in inputs], grad.double())
    for what, ours, theirs in zip(("output", "tokens", "weights", "gate_up", "down"), got, expected, strict=True):
        assert ours.dtype == dtype
        assert relative(ours.cpu(), theirs) < BOUNDS[dtype], what


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("name", ROUTINGS)
def test_sorted_experts_equal_a_loop_over_tokens(name: str, dtype: torch.dtype) -> None:
    check_experts("sorted", name, dtype, "cpu")


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("name", ROUTINGS)
def test_so_do_those_of_transformers(name: str, implementation: str) -> None:
    if (implementation, name) == ("grouped_mm", "odd sizes"):
        with pytest.raises(RuntimeError, match="multiple of 16 bytes"):  # which it says itself
            check_experts(implementation, name, torch.float32, "cpu")
        return
    check_experts(implementation, name, torch.float32, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("implementation", ["sorted", "grouped_mm", "sonicmoe"])
@pytest.mark.parametrize("name", ROUTINGS)
def test_so_do_all_on_a_gpu(name: str, implementation: str) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    if implementation == "sonicmoe":
        pytest.importorskip("kernels")
    if implementation != "sorted" and name == "odd sizes":
        pytest.skip("its sizes have to be multiples of 16 bytes")
    check_experts(implementation, name, torch.bfloat16, "cuda")


def test_an_expert_that_a_token_does_not_use_is_not_spoiled_by_it() -> None:
    torch.manual_seed(0)
    hidden = torch.randn(6, 8)
    hidden[0] = 1e25  # it overflows in every expert: silu(gate) · up
    weights, chosen = torch.ones(6, 1), torch.tensor([[0], [1], [1], [1], [1], [1]])
    gate_up, down = torch.randn(2, 8, 8).requires_grad_(), torch.randn(2, 8, 4).requires_grad_()
    experts._SortedExperts.apply(hidden, chosen, weights, gate_up, down)[1:].sum().backward()
    assert gate_up.grad is not None and down.grad is not None
    assert gate_up.grad[1].isfinite().all() and down.grad[1].isfinite().all()


def test_rows_come_in_few_sizes_with_little_padding() -> None:
    counts = range(1, 1 << 16)
    sizes = [experts._padded(count) for count in counts]
    assert experts._padded(0) == 0
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
