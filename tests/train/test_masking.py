"""A token attends within its document: exactly, on every attention backend, at any micro-batch.

For experts, equal outputs would be too much to ask (an expert that gets other rows rounds differently), so what is
tested is that gradients across documents are exactly zero.
"""

import itertools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import modeling_flash_attention_utils
from transformers.integrations import flex_attention as flex

from powertrain.data.loader import IGNORE_INDEX
from powertrain.train.config import Config
from powertrain.train.loss import LanguageModelLoss
from powertrain.train.optim import BFloat16Weights

# Lengths of the documents of each row: none or many boundaries, documents of one token first, inside and last.
ROWS = [[6, 1, 5, 4], [16], [1, 1, 13, 1], [8, 8]]
MICRO_BATCHES = [1, 4]


def packed(rows: int) -> dict[str, Tensor]:
    """A batch of the first `rows` rows, as data.loader makes them."""
    generator = torch.Generator().manual_seed(0)
    ids, labels = (torch.randint(97, (rows, 16), generator=generator) for _ in range(2))
    positions = torch.stack([torch.cat([torch.arange(n) for n in lengths]) for lengths in ROWS[:rows]])
    for row, lengths in enumerate(ROWS[:rows]):
        for end in torch.tensor(lengths).cumsum(0)[:-1]:
            labels[row, end - 1] = IGNORE_INDEX
    return {"input_ids": ids, "labels": labels, "position_ids": positions}


def documents(rows: int) -> list[tuple[int, slice]]:
    found = []
    for row, lengths in enumerate(ROWS[:rows]):
        ends = [0, *torch.tensor(lengths).cumsum(0).tolist()]
        found += [(row, slice(start, end)) for start, end in itertools.pairwise(ends)]
    return found


def watch_embeddings(loss: LanguageModelLoss) -> SimpleNamespace:
    """`.output` is the embedding layer's last output, and keeps its gradient."""
    kept = SimpleNamespace(output=None)

    def keep(module: Any, inputs: Any, output: Tensor) -> None:
        if output.requires_grad:
            output.retain_grad()
        kept.output = output

    loss.model.model.embed_tokens.register_forward_hook(keep)
    return kept


def assert_only_within(gradient: Tensor, row: int, document: slice, last: int) -> None:
    """Exactly zero outside the document and after `last`, non-zero at every token of it up to there."""
    gradient = gradient.reshape(-1, 16, gradient.shape[-1])  # FlashAttention is given the batch as one row
    reached = torch.zeros(gradient.shape[:2], dtype=torch.bool, device=gradient.device)
    reached[row, document.start : last + 1] = True
    wrong = (gradient.abs().amax(-1) > 0) != reached
    assert not wrong.any(), f"row {row}, {document}: wrong at (row, token) {wrong.nonzero().tolist()}"


def check_hidden(loss: LanguageModelLoss, rows: int) -> None:
    """The last token of a document depends on the document's inputs, all of them and nothing else."""
    parts, kept = packed(rows), watch_embeddings(loss)
    hidden = loss.model.model(
        input_ids=parts["input_ids"], position_ids=parts["position_ids"], use_cache=False
    ).last_hidden_state
    direction = torch.randn(hidden.shape[-1], generator=torch.Generator().manual_seed(1))
    for row, document in documents(rows):
        last = document.stop - 1
        (gradient,) = torch.autograd.grad((hidden[row, last] * direction).sum(), kept.output, retain_graph=True)
        assert_only_within(gradient, row, document, last)
        middle = (document.start + last) // 2  # nor does it look ahead
        (gradient,) = torch.autograd.grad((hidden[row, middle] * direction).sum(), kept.output, retain_graph=True)
        assert_only_within(gradient, row, document, middle)


def check_loss(module: torch.nn.Module, loss: LanguageModelLoss, rows: int, device: str = "cpu") -> None:
    """The cross-entropy of one document's targets has no gradient in another's inputs."""
    kept = watch_embeddings(loss)
    parts = {name: part.to(device) for name, part in packed(rows).items()}
    for row, document in documents(rows):
        labels = torch.full_like(parts["labels"], IGNORE_INDEX)
        labels[row, document] = parts["labels"][row, document]
        targets = (labels[row] != IGNORE_INDEX).nonzero().flatten()
        if not len(targets):
            continue  # a document of one token that another follows
        outputs = module(**(parts | {"labels": labels}))
        assert outputs.targets == len(targets)
        outputs.cross_entropy.backward()
        assert_only_within(kept.output.grad, row, document, int(targets[-1]))
        module.zero_grad()


@pytest.mark.parametrize("rows", MICRO_BATCHES)
@pytest.mark.parametrize("attention", ["eager", "sdpa", "blockwise"])
@pytest.mark.parametrize("kind", ["granitemoe", "granite"])
def test_no_gradient_crosses_documents(
    small_config: Callable[..., Config],
    small_loss: Callable[..., LanguageModelLoss],
    kind: str,
    attention: str,
    rows: int,
) -> None:
    config = small_config(f"model.model_type={kind}", f"model.attn_implementation={attention}")
    check_hidden(small_loss(config), rows)
    loss = small_loss(config)
    check_loss(loss, loss, rows)


@pytest.mark.parametrize("rows", MICRO_BATCHES)
@pytest.mark.parametrize("kind", ["granitemoe", "granite"])
def test_no_gradient_crosses_documents_in_bfloat16(
    small_config: Callable[..., Config], small_loss: Callable[..., LanguageModelLoss], kind: str, rows: int
) -> None:
    loss = small_loss(small_config(f"model.model_type={kind}"))
    check_loss(BFloat16Weights(loss), loss, rows)


@pytest.mark.parametrize("attention", ["eager", "sdpa", "blockwise"])
@pytest.mark.parametrize("kind", ["granitemoe", "granite"])
def test_a_document_is_computed_as_if_alone(
    small_config: Callable[..., Config], small_loss: Callable[..., LanguageModelLoss], kind: str, attention: str
) -> None:
    loss = small_loss(small_config(f"model.model_type={kind}", f"model.attn_implementation={attention}"))
    parts = packed(4)
    together = loss.model(input_ids=parts["input_ids"], position_ids=parts["position_ids"], use_cache=False).logits
    whole, alone = loss(**parts), 0.0
    for row, document in documents(4):
        piece = {name: part[row : row + 1, document] for name, part in parts.items()}
        logits = loss.model(input_ids=piece["input_ids"]).logits  # Transformers' defaults, for one document
        torch.testing.assert_close(together[row : row + 1, document], logits, rtol=1e-4, atol=1e-5)
        alone += loss(**piece).cross_entropy
    torch.testing.assert_close(whole.cross_entropy, alone, rtol=1e-5, atol=0)


@pytest.fixture
def uncompiled_flex_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """FlexAttention has no backward pass on a CPU, and compiling its forward pass takes half a minute. Here it runs
    as plain PyTorch, with the mask and the scores that it would be compiled from. Gradients: see the GPU test.
    """
    monkeypatch.setattr(
        flex, "compile_friendly_flex_attention", lambda *args, training, **rest: flex.flex_attention(*args, **rest)
    )
    monkeypatch.setattr(torch.nn.attention.flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)


def hidden_states(loss: LanguageModelLoss, parts: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return loss.model.model(
            input_ids=parts["input_ids"], position_ids=parts["position_ids"], use_cache=False
        ).last_hidden_state


@pytest.mark.usefixtures("uncompiled_flex_attention")
@pytest.mark.filterwarnings("ignore:flex_attention called without:UserWarning")
@pytest.mark.parametrize("rows", MICRO_BATCHES)
@pytest.mark.parametrize("attention", ["eager", "sdpa", "blockwise", "flex_attention"])
def test_changing_a_document_changes_no_other(
    small_config: Callable[..., Config],
    small_loss: Callable[..., LanguageModelLoss],
    attention: str,
    rows: int,
) -> None:
    """In a dense model bit for bit."""
    loss = small_loss(small_config("model.model_type=granite", f"model.attn_implementation={attention}"))
    parts = packed(rows)
    before = hidden_states(loss, parts)
    for row, document in documents(rows):
        changed = {name: part.clone() for name, part in parts.items()}
        changed["input_ids"][row, document.start] = (changed["input_ids"][row, document.start] + 1) % 97
        moved = (hidden_states(loss, changed) != before).any(-1)
        expected = torch.zeros_like(moved)
        expected[row, document] = True
        assert torch.equal(moved, expected), (row, document)


@pytest.mark.usefixtures("uncompiled_flex_attention")
@pytest.mark.filterwarnings("ignore:flex_attention called without:UserWarning")
def test_flex_attention_computes_what_sdpa_does(
    small_config: Callable[..., Config], small_loss: Callable[..., LanguageModelLoss]
) -> None:
    results = []
    for attention in ("sdpa", "flex_attention"):
        loss = small_loss(small_config(f"model.attn_implementation={attention}"))
        with torch.no_grad():
            results.append(loss(**packed(4)))
    torch.testing.assert_close(results[1].cross_entropy, results[0].cross_entropy, rtol=1e-5, atol=0)
    assert torch.equal(results[1].assignments, results[0].assignments)


def _flash(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, causal: bool, **_: Any) -> Tensor:
    """flash_attn_func: (batch, length, heads, head size)."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=softmax_scale, enable_gqa=True).transpose(
        1, 2
    )


def _flash_varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, **options: Any
) -> Tensor:
    """flash_attn_varlen_func: (tokens, heads, head size), whose sequences begin at cu_seqlens."""
    assert torch.equal(cu_seqlens_q, cu_seqlens_k)
    pieces = itertools.pairwise(cu_seqlens_q.tolist())
    return torch.cat([_flash(q[None, a:b], k[None, a:b], v[None, a:b], **options)[0] for a, b in pieces])


@pytest.mark.parametrize("rows", MICRO_BATCHES)
@pytest.mark.parametrize("kind", ["granitemoe", "granite"])
def test_no_gradient_crosses_documents_in_flash_attentions_calls(
    monkeypatch: pytest.MonkeyPatch,
    small_config: Callable[..., Config],
    small_loss: Callable[..., LanguageModelLoss],
    kind: str,
    rows: int,
) -> None:
    """FlashAttention takes no mask: it is told where sequences begin, or it does not know. This puts PyTorch's
    attention behind its two functions, so that what Transformers tells them is tested without a GPU.
    """

    def options(is_causal: bool, softmax_scale: float, **_: Any) -> dict[str, Any]:
        return {"causal": is_causal, "softmax_scale": softmax_scale}

    monkeypatch.setattr(
        modeling_flash_attention_utils,
        "lazy_import_flash_attention",
        lambda *args, **kwargs: ((_flash, _flash_varlen, None, None, None), (options, None)),
    )
    loss = small_loss(small_config(f"model.model_type={kind}"))
    expected = loss(**packed(rows)).cross_entropy
    loss = small_loss(small_config(f"model.model_type={kind}"))
    loss.model.config._attn_implementation = "flash_attention_2"  # past the check that the package is there
    check_loss(loss, loss, rows)
    torch.testing.assert_close(loss(**packed(rows)).cross_entropy, expected, rtol=1e-5, atol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", MICRO_BATCHES)
@pytest.mark.parametrize("attention", ["flash_attention_2", "flash_attention_3", "flex_attention", "sdpa"])
@pytest.mark.parametrize("kind", ["granitemoe", "granite"])
def test_no_gradient_crosses_documents_on_a_gpu(
    small_config: Callable[..., Config],
    small_loss: Callable[..., LanguageModelLoss],
    kind: str,
    attention: str,
    rows: int,
) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    if attention.startswith("flash"):
        pytest.importorskip("flash_attn" if attention == "flash_attention_2" else "flash_attn_interface")
    # Heads of 16: FlexAttention's kernel takes no smaller ones.
    heads = ("model.num_attention_heads=2", "model.num_key_value_heads=1")
    config = small_config(f"model.model_type={kind}", f"model.attn_implementation={attention}", *heads)
    loss = small_loss(config).to("cuda")
    check_loss(BFloat16Weights(loss), loss, rows, "cuda")
