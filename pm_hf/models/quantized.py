"""A base whose linear layers are held in 4 or 8 bits by bitsandbytes: asked for, checked, recognised."""

import importlib.util
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate import PartialState
from torch import nn
from transformers import BitsAndBytesConfig

from pm_hf.config.schema import ModelSettings
from pm_hf.errors import InputError

BITS: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "int8": {"load_in_8bit": True},
}


def check_quantization(settings: ModelSettings, config: Mapping[str, Any]) -> None:
    """InputError where `model.quantization` asks for what is not installed, or for weights that are quantized already.

    config: the checkpoint's, by name.
    """
    if settings.quantization is None:
        return
    asked = f"model.quantization {settings.quantization}"
    if importlib.util.find_spec("bitsandbytes") is None:
        raise InputError(f"{asked} needs bitsandbytes, of the extra quantized: pip install 'pm_hf[quantized]'")
    if stored := config.get("quantization_config"):
        method = stored.get("quant_method") if isinstance(stored, Mapping) else None
        raise InputError(
            f"{asked}: the weights of model.base {settings.base} are stored quantized ({method or 'in another way'}); "
            "leave model.quantization out, or name the model that they were made from"
        )


def quantized_loading(settings: ModelSettings, whole: Sequence[str]) -> dict[str, Any]:
    """What from_pretrained is told of `model.quantization`, {} without one.

    whole: modules that stay as they are; without any, transformers' own choice, which are the output embeddings and
    what is tied to them. Between the 4-bit weights it is computed in `dtype`. The weights go where the process computes
    as far as that is known, else to the first GPU or the CPU, as transformers decides.
    """
    if settings.quantization is None:
        return {}
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it tells of a cast at every multiplication
    bits = dict(BITS[settings.quantization])
    if settings.quantization == "nf4":
        bits["bnb_4bit_compute_dtype"] = getattr(torch, settings.dtype)
    told: dict[str, Any] = {
        "quantization_config": BitsAndBytesConfig(**bits, llm_int8_skip_modules=list(whole) or None)
    }
    if PartialState._shared_state:
        told["device_map"] = {"": str(PartialState().device)}
    return told


def is_quantized(model: nn.Module) -> bool:
    """Whether a transformers model's weights are quantized, so that no update can be added to them exactly."""
    return bool(getattr(model, "is_quantized", False))
