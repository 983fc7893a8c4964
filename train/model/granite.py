"""From a run's configuration to Transformers' model of its family, and back, on any device, without weights."""

from __future__ import annotations

import dataclasses
import os
import shutil
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import (
    GraniteConfig,
    GraniteForCausalLM,
    GraniteMoeConfig,
    GraniteMoeForCausalLM,
    GraniteMoeSharedConfig,
    GraniteMoeSharedForCausalLM,
)
from transformers.initialization import no_init_weights
from transformers.integrations.sonicmoe import is_sonicmoe_loadable
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

from powertrain.train.config import ModelConfig
from powertrain.train.errors import ConfigError
from powertrain.train.model import blockwise, experts, mup

if TYPE_CHECKING:
    from powertrain.train.config import Config

HFConfig = GraniteConfig | GraniteMoeConfig | GraniteMoeSharedConfig
CausalLM = GraniteForCausalLM | GraniteMoeForCausalLM | GraniteMoeSharedForCausalLM
CLASSES: dict[str, Any] = {
    "granite": GraniteForCausalLM,
    "granitemoe": GraniteMoeForCausalLM,
    "granitemoeshared": GraniteMoeSharedForCausalLM,
}


def transformers_config(config: Config) -> HFConfig:
    """The Transformers configuration of the run's model, muP's multipliers in their fields."""
    model = config.model
    fields: dict[str, Any] = {
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.intermediate_size,
        "num_hidden_layers": model.num_hidden_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_key_value_heads or model.num_attention_heads,
        "max_position_embeddings": model.max_position_embeddings or config.data.sequence_length,
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_theta},
        "rms_norm_eps": model.rms_norm_eps,
        "tie_word_embeddings": model.tie_word_embeddings,
        "attention_dropout": model.attention_dropout,
        "initializer_range": model.initializer_range,
        # Those of the tokenizer are set when the model is exported.
        "bos_token_id": None,
        "eos_token_id": None,
        **mup.multipliers(config),
    }
    if model.is_moe:
        fields |= {
            "num_local_experts": model.num_local_experts,
            "num_experts_per_tok": model.num_experts_per_tok,
            # Transformers' loss pools the layers and is top_k at balance where ours sums them and is one a layer.
            "router_aux_loss_coef": (
                config.balance.router_aux_loss_coef * model.num_hidden_layers / model.num_experts_per_tok
            ),
        }
    if model.shared_size:
        fields["shared_intermediate_size"] = model.shared_size
    hf_config: HFConfig = CLASSES[model.model_type].config_class(**fields)
    return hf_config


def described(hf_config: Any) -> dict[str, Any]:
    """The settings of `model` that a Transformers configuration of one of the families has."""
    names = [field.name for field in dataclasses.fields(ModelConfig)]
    values = {name: getattr(hf_config, name) for name in names if hasattr(hf_config, name)}
    return {**values, "rope_theta": float(hf_config.rope_parameters["rope_theta"])}


def build(config: Config, device: torch.device | str = "cpu") -> CausalLM:
    """The float32 model on `device`, its weights not yet initialised (see `mup.initialize`).

    On the meta device nothing is allocated, which is enough to count parameters.
    """
    hf_config = transformers_config(config)
    model_class = CLASSES[config.model.model_type]
    with torch.device(device), no_init_weights():
        model: CausalLM = model_class._from_config(hf_config, dtype=torch.float32, **implementations(config, device))
    model.tie_weights()  # which is skipped together with the initialisation
    return model


def shape_of(config: Config) -> str:
    """The sizes of the model, for its card."""
    model = config.model
    parts = [
        f"{model.num_hidden_layers} layers",
        f"hidden size {model.hidden_size}",
        f"{model.num_attention_heads} heads",
    ]
    if model.is_moe:
        parts += [f"{model.num_local_experts} experts of {model.intermediate_size}", f"top-{model.num_experts_per_tok}"]
    if model.shared_size:
        parts.append(f"a shared expert of {model.shared_size}")
    return ", ".join(parts)


def moe_blocks(module: nn.Module) -> list[Any]:
    """The blocks with a router and its experts in `module`, in the order of the layers.

    Found by what they have, not by a class's name: a family whose blocks were missed would train without balance, and
    could hang under ZeRO-3.
    """
    return [block for block in module.modules() if hasattr(block, "router") and hasattr(block, "experts")]


def implementations(config: Config, device: torch.device | str) -> dict[str, str]:
    """Transformers' keywords for the kernels of the run's model on `device`."""
    model = config.model
    attention = attention_implementation(model.attn_implementation, device, config.precision, model.attention_dropout)
    chosen = {"attn_implementation": attention}
    if model.is_moe:
        chosen["experts_implementation"] = experts_implementation(
            model.experts_implementation, *_products(config, device)
        )
    return chosen


def kernels(config: Config, device: torch.device | str) -> list[str]:
    """The names of the kernels, for the log and run.json."""
    return [*implementations(config, device).values(), *(["compiled"] if config.engine.torch_compile else [])]


def check_kernels(config: Config, device: torch.device | str) -> None:
    """Check that the named kernels, and the compiler, are available on `device`.

    Raises:
        ConfigError: one is not, or does not fit the configuration.
    """
    chosen = implementations(config, device)
    attention = chosen["attn_implementation"]
    installed = {"flash_attention_2": is_flash_attn_2_available, "flash_attention_3": is_flash_attn_3_available}
    if attention in installed and not (_on_gpu(device) and installed[attention]()):
        raise ConfigError(
            f"model.attn_implementation is {attention}, which needs a GPU and its package: the device is "
            f"{torch.device(device).type}, and the package was {'found' if installed[attention]() else 'not found'}. "
            "Leave the choice to `auto`, or provide both."
        )
    if attention in installed and config.precision != "bf16":
        raise ConfigError(
            f"model.attn_implementation is {attention}, which has no kernels for precision={config.precision}. Train "
            "with precision=bf16, or leave the choice to `auto`."
        )
    if attention == "flash_attention_3" and config.model.attention_dropout:
        raise ConfigError(
            f"model.attention_dropout is {config.model.attention_dropout}, which FlashAttention 3 would ignore. "
            "Name flash_attention_2 or sdpa, or leave the choice to `auto`."
        )
    if attention == "flex_attention" and not _on_gpu(device):
        raise ConfigError(
            "model.attn_implementation is flex_attention, which has no backward pass on a CPU. Leave the choice to "
            "`auto`, or name sdpa."
        )
    if attention == blockwise.NAME and (why := blockwise.refusal(device, config.model.attention_dropout)):
        raise ConfigError(
            f"model.attn_implementation is {attention}, which cannot be used here: {why}. Change that, or leave the "
            "choice to `auto`."
        )
    if chosen.get("experts_implementation") == "sonicmoe":
        try:
            is_sonicmoe_loadable(raise_error=True)
        except ImportError as error:
            raise ConfigError(f"model.experts_implementation is sonicmoe: {error}") from error
    if chosen.get("experts_implementation") == "grouped_mm" and (why := grouped_mm_refusal(*_products(config, device))):
        raise ConfigError(
            f"model.experts_implementation is grouped_mm, {why}. Change that, or leave the choice to `auto`."
        )
    compiler = os.environ.get("CXX", "g++")
    if config.engine.torch_compile and not _on_gpu(device) and shutil.which(compiler) is None:
        raise ConfigError(
            f"engine.torch_compile needs a C++ compiler where there is no GPU, and {compiler} is not on the path. "
            "Install it, name another one in the environment variable CXX, or leave engine.torch_compile at false."
        )


def attention_implementation(name: str, device: torch.device | str, precision: str, dropout: float = 0.0) -> str:
    """`auto`: FlashAttention in bf16 where there is a GPU and the package, ours on a CPU where it can be built, else
    PyTorch's fused attention."""
    if name != "auto":
        return name
    if precision == "bf16" and _on_gpu(device):  # it has no float32 kernels
        if is_flash_attn_3_available() and not dropout:  # which it would ignore
            return "flash_attention_3"
        if is_flash_attn_2_available():
            return "flash_attention_2"
    return "sdpa" if blockwise.refusal(device, dropout) else blockwise.NAME


def experts_implementation(
    name: str, device: str, capability: tuple[int, int], dtype: torch.dtype, sizes: tuple[int, int, int]
) -> str:
    """`auto`: grouped products where PyTorch documents them (bf16, a GPU of compute capability 8.0 and above) and takes
    these sizes, else ours. Arguments as of `grouped_mm_refusal`."""
    if name != "auto":
        return name
    documented = device == "cuda" and dtype == torch.bfloat16 and capability >= (8, 0)
    refused = grouped_mm_refusal(device, capability, dtype, sizes) is not None
    return "grouped_mm" if documented and not refused else experts.NAME


def grouped_mm_refusal(
    device: str, capability: tuple[int, int], dtype: torch.dtype, sizes: tuple[int, int, int]
) -> str | None:
    """Why PyTorch would refuse the experts' grouped products, as a relative clause, or None where it takes them.

    The checks of PyTorch (ATen/native/GroupedMMUtils.h of 2.13, cuda/GroupedBlas.cpp, cuda/GroupMM.cu): rows have
    whole multiples of 16 bytes, and the bf16 kernel of compute capabilities 9 and 10 takes fewer than 1,024 groups.
    Elsewhere, and in float32, it is a loop over the groups that waits for the GPU; below 8.0 the loop is Transformers'
    own, which checks nothing.

    Args:
        device: the type of the device.
        capability: compute capability (major, minor) of the GPU; nothing elsewhere.
        dtype: of the weights and activations.
        sizes: hidden size, intermediate size, number of experts.
    """
    if device == "cuda" and capability < (8, 0):
        return None
    hidden, intermediate, count = sizes
    multiple = 16 // dtype.itemsize
    for name, size in (("model.hidden_size", hidden), ("model.intermediate_size", intermediate)):
        if size % multiple:
            return f"which in {str(dtype).removeprefix('torch.')} takes multiples of {multiple}, and {name} is {size}"
    if device == "cuda" and capability[0] in (9, 10) and dtype == torch.bfloat16 and count >= 1024:
        return f"which takes fewer than 1,024 experts on this GPU, and model.num_local_experts is {count}"
    return None


def _products(
    config: Config, device: torch.device | str
) -> tuple[str, tuple[int, int], torch.dtype, tuple[int, int, int]]:
    """The arguments of `grouped_mm_refusal`; a GPU that is not here, as of an estimate, counts as an H100."""
    capability = torch.cuda.get_device_capability(device) if _on_gpu(device) and torch.cuda.is_available() else (9, 0)
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    sizes = (config.model.hidden_size, config.model.intermediate_size, config.model.num_local_experts)
    return torch.device(device).type, capability, dtype, sizes


def _on_gpu(device: torch.device | str) -> bool:
    return torch.device(device).type == "cuda"
