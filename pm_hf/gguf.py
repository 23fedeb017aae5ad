"""GGUF checkpoints as ordinary dense models."""

import copy
from typing import Any

import transformers
from transformers import PreTrainedModel

MOST_BYTES = 2 * 2**30  # a model of at most this size is kept for the next load
_kept: dict[str, tuple[PreTrainedModel, dict]] = {}


def load_gguf(auto: Any, path: str, file: str, **settings: Any) -> tuple[PreTrainedModel, dict]:
    """(model, loading info) of auto.from_pretrained(path, gguf_file=file, **settings), all weights unpacked.

    The model is not marked as a quantized one, which the Trainer would refuse. Reading the file takes transformers
    seconds even for a small model, and every task loads it twice: the last one read stays in memory if it is small.
    """
    key = repr((auto.__name__, path, file, sorted(settings.items())))
    if key in _kept:
        return copy.deepcopy(_kept[key])
    packed = getattr(transformers, "GgufConfig", None)  # older versions always unpack
    more = {} if packed is None else {"quantization_config": packed(dequantize=True)}
    model, info = auto.from_pretrained(path, gguf_file=file, output_loading_info=True, **settings, **more)
    if getattr(model, "hf_quantizer", None) is not None:
        model.hf_quantizer.remove_quantization_config(model)
    _kept.clear()
    if model.get_memory_footprint() <= MOST_BYTES:
        _kept[key] = copy.deepcopy((model, info))
    return model, info
