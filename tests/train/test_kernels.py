"""Our kernels against the plain reference in float64: values and gradients, on inputs and routing that are shared."""

import errno
import itertools
import json
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call
from transformers import GraniteMoeConfig
from transformers.models.granitemoe.modeling_granitemoe import GraniteMoeExperts

from powertrain.train.config import Config
from powertrain.train.errors import ConfigError
from powertrain.train.loss import LanguageModelLoss
from powertrain.train.model import blockwise, experts, granite
from powertrain.train.track import read_lines

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


SMALL, LARGE = (32, 24, 8), (1536, 512, 40)  # hidden, intermediate, experts


@pytest.mark.parametrize(
    ("device", "capability", "dtype", "sizes", "refused", "auto"),
    [
        ("cpu", (9, 0), torch.float32, SMALL, False, "sorted"),
        ("cpu", (9, 0), torch.float32, (30, 24, 8), True, "sorted"),
        ("cuda", (7, 5), torch.bfloat16, LARGE, False, "sorted"),
        ("cuda", (7, 5), torch.bfloat16, (30, 23, 8), False, "sorted"),
        ("cuda", (8, 0), torch.bfloat16, LARGE, False, "grouped_mm"),
        ("cuda", (8, 6), torch.bfloat16, (1536, 512, 1024), False, "grouped_mm"),
        ("cuda", (9, 0), torch.bfloat16, LARGE, False, "grouped_mm"),
        ("cuda", (9, 0), torch.float32, LARGE, False, "sorted"),  # a loop that is not documented
        ("cuda", (9, 0), torch.bfloat16, (32, 20, 8), True, "sorted"),
        ("cuda", (9, 0), torch.bfloat16, (36, 24, 8), True, "sorted"),
        ("cuda", (9, 0), torch.float32, (36, 20, 8), False, "sorted"),
        ("cuda", (9, 0), torch.bfloat16, (1536, 512, 1023), False, "grouped_mm"),
        ("cuda", (9, 0), torch.bfloat16, (1536, 512, 1024), True, "sorted"),
        ("cuda", (10, 0), torch.bfloat16, (1536, 512, 1024), True, "sorted"),
        ("cuda", (12, 0), torch.bfloat16, (1536, 512, 1024), False, "grouped_mm"),
    ],
)
def test_what_a_card_takes(
    device: str,
    capability: tuple[int, int],
    dtype: torch.dtype,
    sizes: tuple[int, int, int],
    refused: bool,
    auto: str,
) -> None:
    assert (granite.grouped_mm_refusal(device, capability, dtype, sizes) is not None) == refused
    assert granite.experts_implementation("auto", device, capability, dtype, sizes) == auto
    assert granite.experts_implementation("grouped_mm", device, capability, dtype, sizes) == "grouped_mm"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pytorch_refuses_the_sizes_that_we_say(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its checks on a CPU, which are a GPU's too: a size is refused, forward or backward, or taken."""
    found = {}
    for hidden, intermediate in itertools.product((16, 18, 20), (16, 18, 20)):
        monkeypatch.setitem(ROUTINGS, "these", (40, hidden, intermediate, 3, 2, "random"))
        try:
            check_experts("grouped_mm", "these", dtype, "cpu")
            found[hidden, intermediate] = False
        except RuntimeError as error:
            assert "multiple of 16 bytes" in str(error)
            found[hidden, intermediate] = True
    assert found == {
        (hidden, intermediate): granite.grouped_mm_refusal("cpu", (0, 0), dtype, (hidden, intermediate, 3)) is not None
        for hidden, intermediate in found
    }
    assert set(found.values()) == {False, True}


def test_grouped_products_that_would_fail_are_refused_before_training(small_config: Callable[..., Config]) -> None:
    sizes = ("model.experts_implementation=grouped_mm", "model.intermediate_size=28")
    granite.check_kernels(small_config(*sizes, "precision=fp32"), "cpu")
    for device in ("cpu", "cuda"):
        with pytest.raises(ConfigError, match=r"takes multiples of 8, and model.intermediate_size is 28\. .* `auto`"):
            granite.check_kernels(small_config(*sizes, "precision=bf16"), device)
    granite.check_kernels(small_config("model.intermediate_size=28", "precision=bf16"), "cuda")  # auto


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


# name → (sequences, length, heads, key/value heads, head size, factor on the scores)
ATTENTIONS = {
    "whole blocks": (2, 192, 2, 2, 16, 1),
    "a remainder": (2, 150, 3, 3, 8, 1),
    "shorter than a block": (3, 17, 2, 2, 4, 1),
    "shared keys": (2, 130, 6, 2, 24, 1),
    "one key head": (1, 65, 4, 1, 64, 1),
    "a single token": (2, 1, 2, 2, 8, 1),
    "odd head size": (1, 70, 1, 1, 13, 1),
    "large scores": (2, 200, 2, 2, 16, 8),
}


def documents(sequences: int, length: int) -> Tensor:
    """Positions of tokens in documents of random lengths, from one token to several blocks."""
    rows = []
    for _ in range(sequences):
        row: list[int] = []
        while len(row) < length:
            row += range(int(torch.randint(1, 8, ())) ** int(torch.randint(1, 4, ())))
        rows.append(row[:length])
    return torch.tensor(rows)


def attention_inputs(name: str, dtype: torch.dtype) -> tuple[list[Tensor], Tensor, Tensor]:
    """Query, key and value (B, heads, S, head size), laid out as a model's; positions; the output's gradient."""
    sequences, length, heads, shared, size, factor = ATTENTIONS[name]
    torch.manual_seed(0)
    counts = (heads, shared, shared)
    inputs = [torch.randn(sequences, length, n, size, dtype=torch.float64).transpose(1, 2) for n in counts]
    inputs[0] *= factor
    grad = torch.randn(sequences, length, heads, size, dtype=torch.float64).to(dtype)
    return [tensor.to(dtype) for tensor in inputs], documents(sequences, length), grad


def by_blocks(positions: Tensor) -> Callable[..., Tensor]:
    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        module: Any = SimpleNamespace(num_key_value_groups=query.shape[1] // key.shape[1])
        return blockwise.blockwise_attention(module, query, key, value, None, scaling=0.3, position_ids=positions)[0]

    return attention


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("name", ATTENTIONS)
def test_blockwise_attention_equals_a_softmax_over_what_a_token_sees(name: str, dtype: torch.dtype) -> None:
    """In float64 it is SDPA with a mask of the documents."""
    inputs, positions, grad = attention_inputs(name, dtype)
    assert blockwise.refusal("cpu", 0.0) is None
    index = torch.arange(positions.shape[1])
    seen = ((index - positions)[:, :, None] <= index) & (index <= index[:, None])

    def plain(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        key, value = (tensor.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for tensor in (key, value))
        scores = (0.3 * query @ key.mT).masked_fill(~seen[:, None], -torch.inf)
        return (torch.softmax(scores, -1) @ value).transpose(1, 2)

    got = values_and_gradients(by_blocks(positions), inputs, grad)
    expected = values_and_gradients(plain, [tensor.double() for tensor in inputs], grad.double())
    bound = 4 * BOUNDS[dtype] if name == "large scores" else BOUNDS[dtype]  # an error of scores of up to 50
    for what, ours, theirs in zip(("output", "query", "key", "value"), got, expected, strict=True):
        assert ours.dtype == dtype
        assert relative(ours, theirs) < bound, what


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["whole blocks", "shared keys"])
def test_blockwise_attention_does_not_depend_on_threads_or_other_documents(name: str, dtype: torch.dtype) -> None:
    inputs, positions, grad = attention_inputs(name, dtype)
    before, results = torch.get_num_threads(), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(values_and_gradients(by_blocks(positions), inputs, grad))
    torch.set_num_threads(before)
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))
    begin = int((positions[0] == 0).nonzero()[-1])  # of the first sequence's last document, which changes
    changed = [tensor.clone() for tensor in (*inputs, grad.transpose(1, 2))]
    for tensor in changed:
        tensor[0, :, begin:] += 1
    again = values_and_gradients(by_blocks(positions), changed[:3], changed[3].transpose(1, 2))
    again[0], results[0][0] = again[0].transpose(1, 2), results[0][0].transpose(1, 2)
    for one, two in zip(results[0], again, strict=True):
        assert torch.equal(one[0, :, :begin], two[0, :, :begin])
        assert not torch.equal(one[0, :, begin:], two[0, :, begin:])
        assert torch.equal(one[1:], two[1:])


def test_what_is_no_number_shows() -> None:
    inputs, positions, _ = attention_inputs("a remainder", torch.bfloat16)
    inputs[0][1, 2, 100] = torch.nan
    wrong = by_blocks(positions)(*inputs).isnan()
    assert wrong[1, 100, 2].all()
    assert wrong.sum() == wrong[1, 100, 2].numel()


def test_blockwise_attention_leaves_padding_and_caches_to_sdpa(
    small_config: Callable[..., Config], small_loss: Callable[..., LanguageModelLoss]
) -> None:
    ids = torch.randint(97, (2, 9), generator=torch.Generator().manual_seed(0))
    padded = torch.ones_like(ids)
    padded[0, :4] = 0
    found = []
    for name in ("sdpa", "blockwise"):
        model = small_loss(small_config(f"model.attn_implementation={name}")).model.eval()
        model.generation_config.eos_token_id = None
        with torch.no_grad():
            generated = model.generate(ids, attention_mask=padded, max_new_tokens=6, do_sample=False, pad_token_id=0)
            whole = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)
            found.append((generated, whole, model(ids, attention_mask=padded).logits))
    (generated, whole, logits), (ours, our_whole, our_logits) = found
    assert torch.equal(ours, generated)
    assert torch.equal(our_whole, whole)
    torch.testing.assert_close(our_logits[padded.bool()], logits[padded.bool()], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("full", [False, True])
def test_a_library_that_is_not_whole_is_not_kept(full: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A disk may say that it is full only when what was written has to be on it."""
    compiler = tmp_path / "compiler"  # writes -o
    writing = 'for last; do :; done; echo "no library" > "$last"'
    compiler.write_text(f"#!/bin/sh\n{writing if full else 'exit 1'}\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("CXX", f"nice {compiler}")  # a command, as `ccache g++`

    def no_space(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", no_space)
    monkeypatch.setattr(blockwise, "_kernel", blockwise._kernel.__wrapped__)
    why = blockwise.refusal("cpu", 0.0)
    assert why is not None and ("No space left" if full else "exit status 1") in why
    assert not list((tmp_path / ".cache/powertrain").iterdir())


def test_without_a_compiler_a_run_takes_sdpa_and_says_so(
    run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ("run.tokens=1536", "evaluation.every=0")
    built = run(*small, "run.name=built")
    assert "not blockwise" not in capsys.readouterr().out
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(blockwise, "_kernel", blockwise._kernel.__wrapped__)
    without = run(*small, "run.name=without")
    assert "Attention is SDPA, not blockwise" in " ".join(capsys.readouterr().out.split())
    names = [json.loads((folder / "run.json").read_text())["starts"][-1]["hardware"] for folder in (built, without)]
    assert [each["kernels"][0] for each in names] == ["blockwise", "sdpa"]
    losses = [[line["lm_loss"] for line in read_lines(folder / "metrics.jsonl")] for folder in (built, without)]
    torch.testing.assert_close(torch.tensor(losses[1]), torch.tensor(losses[0]), rtol=1e-4, atol=0)
