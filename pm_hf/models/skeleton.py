"""What can be known of a base model before its weights are read: whether it has the head and the layers asked for."""

from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from transformers import PreTrainedConfig
from transformers.utils import CONFIG_NAME

from pm_hf.config.kinds import STREAM_KINDS
from pm_hf.config.patterns import pattern_problem
from pm_hf.config.schema import LoraSettings, ModelSettings
from pm_hf.errors import InputError
from pm_hf.models.contexts import quiet
from pm_hf.models.loading import TEXT_KIND, head_name, load_skeleton, resolve_base

_checked: dict[str, PreTrainedConfig | None] = {}  # what was found to fit in this process


def check_base(settings: ModelSettings, lora: LoraSettings, kind: str = TEXT_KIND) -> PreTrainedConfig | None:
    """The base model's configuration; InputError where it is no model of this kind, or `lora.target_modules` are not in
    it. None, unchecked, where its weights are needed for that.

    No weight is read. What fits is remembered as long as its config.json stays the same.
    """
    file = Path(resolve_base(settings.base)) / CONFIG_NAME
    stamp = file.stat().st_mtime_ns if file.is_file() else None
    key = repr((settings, lora.target_modules, kind, stamp))
    if key not in _checked:
        _checked[key] = _check(settings, lora, kind)
    return _checked[key]


def _check(settings: ModelSettings, lora: LoraSettings, kind: str) -> PreTrainedConfig | None:
    model = load_skeleton(settings, kind)
    if model is None:
        return None
    if STREAM_KINDS[kind].has_head:
        head_name(model)
    targets = lora.target_modules
    names = [name for name, _ in model.named_modules() if name]
    if isinstance(targets, str) and (problem := pattern_problem(targets, names)):
        raise InputError(f"lora.target_modules: {problem}")
    try:
        with quiet(), torch.device("meta"):
            adapted = get_peft_model(model, LoraConfig(r=1, target_modules=targets))
    except ValueError as error:
        raise InputError(f"lora.target_modules {targets}: {error}") from error
    odd = [name for name, module in adapted.named_modules() if isinstance(module, LoraLayer) and not module.lora_A]
    if odd:
        raise InputError(f"lora.target_modules: {odd[0]} is not a linear layer; only linear layers are supported")
    return model.config
