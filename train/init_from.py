"""Initialising a run from a Hugging Face model of one of the families."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from powertrain.data import expand
from powertrain.train.config import MODELS, Config, ModelConfig
from powertrain.train.errors import ConfigError
from powertrain.train.export import config_in
from powertrain.train.model import granite

_OF_THE_RUN = ("attention_dropout", "initializer_range", "attn_implementation", "experts_implementation")
_ADOPTED = tuple(field.name for field in dataclasses.fields(ModelConfig) if field.name not in _OF_THE_RUN)
_FLOATS = ("F64", "F32", "F16", "BF16")


def adopt(config: Config, model: ModelConfig | None, given: Collection[str] = ()) -> None:
    """Make `config.model` describe the model in `run.init_from`, and take its tokenizer when none is named.

    A run that has begun is described by its checkpoint, and no longer needs the folder. muP's m_width stays
    hidden_size / mup.base_hidden_size, which the folder does not contain: it belongs to the learning rate.

    Args:
        model: that of the run's checkpoint; None when it has not begun.
        given: settings of the model that were given by name; the folder's have to equal them.

    Raises:
        ConfigError: it cannot be read, is of another family, has a part that is not trained here, or is not what was
            asked for.
    """
    assert config.run.init_from is not None
    if model is None:
        folder = model_folder(config.run.init_from)
        model = _described(config.run.init_from, folder)
        if config.data.tokenizer.path is None and (Path(folder) / "tokenizer_config.json").is_file():
            config.data.tokenizer.path = folder
    asked = {name: getattr(config.model, name) for name in _ADOPTED if name in given}
    if differing := [
        f"model.{name} {getattr(model, name)}, not {value}"
        for name, value in asked.items()
        if value is not None and value != getattr(model, name)
    ]:
        raise ConfigError(
            f"run.init_from={config.run.init_from} has {'; '.join(differing)}. A model's sizes and multipliers come "
            "with its weights: leave these settings (or model=…) out, or leave out run.init_from."
        )
    for name in _ADOPTED:
        setattr(config.model, name, getattr(model, name))


def model_folder(init_from: str) -> str:
    """The Hugging Face folder (or name) that `run.init_from` means: of a run's folder, its model.

    Raises:
        ConfigError: there is no such folder, or it is that of a run without a model.
    """
    folder = Path(expand(init_from))
    if not folder.is_dir():
        if folder.is_absolute() or init_from.startswith(".") or init_from.count("/") > 1:
            raise ConfigError(f"run.init_from={init_from} is no folder.")
        return init_from  # a name that the hub knows
    if (folder / "config.json").is_file() or not (folder / "config.yaml").is_file():
        return str(folder)
    if not (folder / "model/config.json").is_file():
        raise ConfigError(
            f"run.init_from={init_from} is the folder of a run that has no model yet: let it finish, or export a "
            f"checkpoint of it (powertrain export {init_from})."
        )
    return str(folder / "model")


def _described(init_from: str, folder: str) -> ModelConfig:
    try:
        theirs = config_in(folder)
        if theirs.model_type not in MODELS:
            raise ConfigError(
                f"run.init_from={init_from} holds a '{theirs.model_type}' model; what is trained here is one of "
                f"{', '.join(MODELS)}."
            )
        head_dim = getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads
        rope = theirs.rope_parameters
        # Fields that Transformers' class does not know, and would ignore: the model would be another one.
        ignored = {name: value for name, value in vars(theirs).items() if name not in theirs.__dataclass_fields__}
        for what, found, supported in (
            ("attention_bias", theirs.attention_bias, False),
            ("mlp_bias", getattr(theirs, "mlp_bias", False), False),
            ("hidden_act", theirs.hidden_act, "silu"),
            ("rope_type", rope["rope_type"], "default"),
            ("head_dim", head_dim, theirs.hidden_size // theirs.num_attention_heads),
            ("quantization_config", getattr(theirs, "quantization_config", None), None),
            ("position_embedding_type", ignored.get("position_embedding_type") or "rope", "rope"),
            ("shared_intermediate_size", ignored.get("shared_intermediate_size") or 0, 0),
            ("sliding_window", ignored.get("sliding_window"), None),
        ):
            if found != supported:
                raise ConfigError(
                    f"run.init_from={init_from} has {what} {found}; of a '{theirs.model_type}' model only {supported} "
                    "can be trained here."
                )
        values = {name: value for name, value in granite.described(theirs).items() if name in _ADOPTED}
        if Path(folder).is_dir():
            _check_files(Path(folder), theirs.num_hidden_layers)
        model: Any = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(ModelConfig), values))
    except ConfigError:
        raise
    except Exception as error:  # whatever is wrong with a file, a value in it or the network
        raise ConfigError(_cannot_be_read(init_from, error)) from error
    assert isinstance(model, ModelConfig)
    return model


def _check_files(folder: Path, num_hidden_layers: int) -> None:
    """Check the weights' files before anything expensive begins.

    Raises:
        FileNotFoundError, TypeError, ValueError: one is missing, of another type, or of another number of layers.
    """
    layers = 0
    index = folder / "model.safetensors.index.json"
    names = (
        set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        if index.is_file()
        else {"model.safetensors"}
    )
    for name in sorted(names):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"there is no {name} in {folder}, and no other format is read")
        with safe_open(folder / name, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118
                if (dtype := file.get_slice(key).get_dtype()) not in _FLOATS:
                    raise TypeError(f"{key} in {name} is {dtype}, not one of {', '.join(_FLOATS)}")
                if numbered := re.search(r"\.layers\.(\d+)\.", key):
                    layers = max(layers, int(numbered[1]) + 1)
    if layers != num_hidden_layers:  # or a model of any size would be built first
        raise ValueError(f"it has num_hidden_layers {num_hidden_layers:,}, and its weights are of {layers:,} layers")


def reader(init_from: str, shapes: Mapping[str, torch.Size]) -> Callable[[str, int, int], torch.Tensor]:
    """A function that reads the elements [start, stop) of a flattened parameter in `run.init_from`, in float32.

    Raises:
        ConfigError: a file cannot be read, or a tensor is missing, has no place in the model, or is of another shape.
    """
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            model_folder(init_from),
            dtype=torch.float32,
            output_loading_info=True,
            use_safetensors=True,
            trust_remote_code=False,
        )
    except ConfigError:
        raise
    except Exception as error:  # whatever is wrong with a file or the network
        raise ConfigError(_cannot_be_read(init_from, error)) from error
    theirs, report = loaded
    for keys, what in (("missing_keys", "lacks"), ("unexpected_keys", "has, beside those of its model,")):
        if report[keys]:
            raise ConfigError(f"run.init_from={init_from} {what} the tensors {sorted(report[keys])}.")
    weights = dict(theirs.named_parameters())
    for name, shape in shapes.items():
        if weights[name].shape != shape:
            found = f"{tuple(weights[name].shape)}, not {tuple(shape)}"
            raise ConfigError(f"run.init_from={init_from}: {name} has the shape {found}.")
    return lambda name, start, stop: weights[name].detach().view(-1)[start:stop]


def _cannot_be_read(init_from: str, error: Exception) -> str:
    message = " ".join(str(error).split())
    return f"run.init_from={init_from} cannot be read: {type(error).__name__}: {message[:1000]}"
