"""Attention on a CPU: blockwise.cpp, built where a compiler is, one autograd function, registered with Transformers.

SDPA computes scores that a token does not see, those of later tokens and of other documents, and multiplies slowly on
some CPUs. Where this cannot be built or does not fit, `auto` is SDPA; their results differ by rounding.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shlex
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from powertrain.data.files import sync

NAME = "blockwise"

_BLOCK = 64  # N of blockwise.cpp
_SOURCE = Path(__file__).with_suffix(".cpp")
_ARCHITECTURES = {"AVX512": "x86-64-v4", "AVX2": "x86-64-v3"}  # PyTorch's names and GCC's


class _Sizes(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in "BLHGD"]


@functools.cache
def _kernel() -> Any:
    """The function of blockwise.cpp, built once and kept; or, as text, why there is none."""
    compiler, has = os.environ.get("CXX") or "g++", torch.backends.cpu.get_cpu_capability()
    if has not in _ARCHITECTURES:
        return "this CPU has no AVX2"
    flags = ["-std=c++17", "-O3", f"-march={_ARCHITECTURES[has]}", "-fPIC", "-fopenmp"]
    key = hashlib.sha256("\n".join([compiler, *flags, torch.__version__, _SOURCE.read_text(encoding="utf-8")]).encode())
    try:
        built = Path("~/.cache/powertrain").expanduser() / f"blockwise-{key.hexdigest()[:16]}.so"
        if not built.exists():
            built.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=built.parent) as folder:  # of the same disk, for replace
                # Linked in a step of its own, without -fopenmp, so that it takes PyTorch's threads, not another pool.
                part, whole = f"{folder}/blockwise.o", f"{folder}/blockwise.so"
                library = [f"-L{Path(torch.__file__).parent}/lib", "-ltorch_cpu"]
                for arguments in (
                    [*flags, "-c", str(_SOURCE), "-o", part],
                    ["-shared", part, *library, "-o", whole],
                ):
                    command = [*shlex.split(compiler), *arguments]
                    subprocess.run(command, check=True, capture_output=True, encoding="utf-8", errors="replace")
                sync(Path(whole))  # a library cut short, as on a full disk, would end every later start by a signal
                os.replace(whole, built)  # other ranks build it, too
        function = ctypes.CDLL(str(built)).attention
    except subprocess.CalledProcessError as error:
        return f"{compiler} could not build it: {error.stderr.strip()[-200:] or error}"
    except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: no home folder; ValueError: a quote in CXX
        return f"it could not be built or loaded: {error}"
    function.argtypes = [ctypes.c_bool, ctypes.c_bool, ctypes.POINTER(ctypes.c_void_p), _Sizes, ctypes.c_float]
    return function


def refusal(device: torch.device | str, dropout: float) -> str | None:
    """Why a model on `device` cannot have it, or None where it can."""
    if torch.device(device).type != "cpu":
        return f"it is for a CPU, and the device is {torch.device(device).type}"
    if dropout:
        return f"it has no dropout, and model.attention_dropout is {dropout}"
    return kernel if isinstance(kernel := _kernel(), str) else None


class _Blockwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, position_ids: Tensor, scaling: float) -> Tensor:
        batch, length, heads, _ = query.shape
        out, lse = torch.empty_like(query), torch.empty(batch, heads, length + -length % _BLOCK)
        _call(False, scaling, query, key, value, position_ids, out, lse)
        ctx.save_for_backward(query, key, value, position_ids, out, lse)
        ctx.scaling = scaling
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # once: activation checkpointing refuses a second time
        grads = [torch.empty_like(tensor) for tensor in saved[:3]]
        _call(True, ctx.scaling, *saved, grad.contiguous(), *grads)
        return *grads, None, None


def _call(backwards: bool, scaling: float, query: Tensor, key: Tensor, *rest: Tensor) -> None:
    tensors = (query, key, *rest)
    pointers = (ctypes.c_void_p * len(tensors))(*(tensor.data_ptr() for tensor in tensors))
    batch, length, heads, size = query.shape
    sizes = _Sizes(batch, length, heads, key.shape[2], size)
    _kernel()(query.dtype == torch.bfloat16, backwards, pointers, sizes, scaling)


@torch.compiler.disable
def blockwise_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    position_ids: Tensor,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """(B, S, heads, head size) for query, key and value (B, heads, S, head size).

    SDPA for a mask, as of padding, for keys of a cache, in float64, and where `refusal` has a reason.
    """
    if attention_mask is None and key.shape[2] == query.shape[2]:
        positions = position_ids.expand(len(query), -1)
        if query.dtype in (torch.float32, torch.bfloat16) and refusal(query.device, dropout) is None:
            rows = (tensor.transpose(1, 2).contiguous() for tensor in (query, key, value))
            return _Blockwise.apply(*rows, positions.contiguous(), scaling), None
        document = (positions.diff(dim=1, prepend=positions[:, :1]) != 1).cumsum(1)
        attention_mask = (document[:, :, None] == document[:, None]).tril()[:, None]
    return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)


def _mask(*, q_length: int, kv_length: int, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor | None:
    """Transformers' mask; None where `blockwise_attention` goes by the positions."""
    if attention_mask is None and q_length == kv_length:
        return None
    mask: Tensor | None = sdpa_mask(q_length=q_length, kv_length=kv_length, attention_mask=attention_mask, **kwargs)
    return mask


AttentionInterface.register(NAME, blockwise_attention)
AttentionMaskInterface.register(NAME, _mask)
