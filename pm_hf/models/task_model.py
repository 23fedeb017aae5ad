"""The model of one task: base, frozen running merge, trainable task adapter and the task's own head."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING, ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel

from pm_hf.adapters.folder import Adapter
from pm_hf.adapters.layout import PEFT_PREFIX, peft_type
from pm_hf.config.kinds import STREAM_KINDS
from pm_hf.config.patterns import pattern_problem
from pm_hf.config.schema import LoraSettings, ModelSettings
from pm_hf.errors import InputError, raise_all
from pm_hf.models.contexts import quiet, seeded
from pm_hf.models.loading import HEAD_NAMES, TEXT_KIND, check_loaded, head_name, head_root, load_base, whole_load
from pm_hf.models.released import fit_vocabulary, put_saved
from pm_hf.models.sharded import SAVED_WRAPPER, plain_name
from pm_hf.models.whole_modules import ALL_LINEAR, check_apart, whole_modules

MERGED_ADAPTER, TASK_ADAPTER = "merged", "task"


@dataclass(frozen=True)
class TaskModel:
    """A PeftModel ready to train one task; `head` is the module name of its last Linear, None for language models."""

    model: PeftModel
    head: str | None


def build_task_model(
    settings: ModelSettings,
    lora: LoraSettings,
    labels: Sequence[str],
    merged: Adapter | None,
    seed: int,
    task: int,
    *,
    kind: str = TEXT_KIND,
    saved_from: Adapter | None = None,
    continue_head: bool = False,
    skeleton: bool = False,
) -> TaskModel:
    """Base + frozen `merged` (without its head) + trainable `task`, both active, and a fresh head of the task's rows.

    kind: a key of STREAM_KINDS; language models have no head. saved_from: whose head goes on and whose other values
    that are held whole (embeddings, norms) take the place of the base's, by default `merged`'s. skeleton: on the meta
    device, without the base's weights: all that is checked is checked, and the model cannot run. Raises InputError for
    what does not fit, and for a skeleton NeedsWeightsError where the configuration alone does not tell.
    What the checkpoint lacks (the head's other layers) is frozen at its value, or at the seeded one; with
    `continue_head` the rows of labels that it knows start from its rows (a head shared by all tasks). Trainable are the
    task's LoRA factors, the head's last Linear and what `lora.modules_to_save` names, nothing else: checked before it
    is returned.
    """
    if lora.r < 1:
        raise InputError(f"lora.r must be at least 1, found {lora.r}")
    saved_from = saved_from or merged
    base, saved_modules = load_base(settings, labels, seed, kind, skeleton=skeleton)
    head = head_name(base) if STREAM_KINDS[kind].has_head else None
    if saved_from is not None:
        if head is not None:
            _check_head(base, head, saved_from)
        fit_vocabulary(base, saved_from)
        put_saved(base, saved_from, None if head is None else head_root(base))
    whole = whole_modules(base, lora.modules_to_save or (), None if head is None else head_root(base))
    base_name, targets = base.config.name_or_path, lora.target_modules or default_targets(base)
    if isinstance(targets, str):
        problem = pattern_problem(targets, tuple(name for name, _ in base.named_modules() if name))
        raise_all([problem] if problem else [], "lora.target_modules")
    check_apart(base, whole, targets)
    for adapter in filter(None, (merged, saved_from)):
        _check_whole(whole, adapter)
    with seeded(seed + 7919 * (task + 1)):
        if head is not None:
            _fresh_rows(base, head, labels, saved_from if continue_head else None)
        config = LoraConfig(
            r=lora.r,
            lora_alpha=lora.alpha,
            lora_dropout=lora.dropout,
            use_rslora=lora.use_rslora,
            init_lora_weights=lora.init_lora_weights,
            target_modules=targets,
            modules_to_save=[*saved_modules, *whole] or None,
            task_type=None,
            base_model_name_or_path=base_name,
        )
        try:
            with quiet():
                model = get_peft_model(base, config, adapter_name=TASK_ADAPTER)
        except ValueError as error:
            raise InputError(f"lora.target_modules {targets}: {error}; {_linear_names(base)}") from error
    odd = [n for n, m in model.named_modules() if isinstance(m, LoraLayer) and not m.lora_A]
    if odd:
        raise InputError(f"lora.target_modules: {odd[0]} is not a linear layer; only linear layers are supported")
    if isinstance(targets, list) and (idle := _idle_targets(model, targets)):
        name = f"{', '.join(idle)} names no layer of {type(base).__name__}"
        raise InputError(f"lora.target_modules: {name}; {_linear_names(base)}")
    if saved_from is not None:
        _check_targets(model, saved_from)
    if merged is not None:
        _add_merged(model, merged, settings)
    _restore_shared(model, saved_from, head)
    _activate(model, merged is not None)
    expected = _freeze(model, head, whole)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    if trainable != expected:
        raise RuntimeError(f"unexpected set of trainable parameters: {sorted(trainable ^ expected)}")
    return TaskModel(model, head)


def default_targets(base: PreTrainedModel) -> list[str] | str | None:
    """What is adapted where the settings are silent: PEFT's choice for the model (None), every linear layer where it
    has none."""
    known = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    return None if base.config.model_type in known else ALL_LINEAR


def _linear_names(base: PreTrainedModel) -> str:
    """The names that linear layers of a model end with, the most frequent ones first, in words."""
    names = [name.rpartition(".")[2] for name, module in base.named_modules() if isinstance(module, nn.Linear)]
    counts = Counter(name for name in names if name not in HEAD_NAMES and not name.isdigit())
    return f"its linear layers are called {', '.join(name for name, _ in counts.most_common(12))}, or {ALL_LINEAR}"


def _idle_targets(model: PeftModel, targets: Sequence[str]) -> list[str]:
    """Names that no module has; PEFT takes a list in which one name of several fits."""
    names = [f".{name}" for name, _ in model.named_modules()]
    return [target for target in targets if not any(name.endswith(f".{target}") for name in names)]


def task_tensors(model: PeftModel, kind: str = TEXT_KIND) -> tuple[dict[str, Tensor], dict[str, Tensor], dict]:
    """(LoRA factors, saved modules, PEFT configuration) of the task adapter, detached, names as in the file.

    Of a skeleton what has no values is zero.
    """
    state = get_peft_model_state_dict(model, adapter_name=TASK_ADAPTER, save_embedding_layers=False)
    plain = {
        plain_name(name): torch.zeros_like(value, device="cpu") if value.is_meta else value.detach().cpu().clone()
        for name, value in state.items()
    }
    config = model.peft_config[TASK_ADAPTER].to_dict() | {
        "task_type": STREAM_KINDS[kind].task_type,
        "inference_mode": True,
    }
    factors = {name: value for name, value in plain.items() if "lora_" in name}
    return factors, {name: value for name, value in plain.items() if "lora_" not in name}, config


def _add_merged(model: PeftModel, merged: Adapter, settings: ModelSettings) -> None:
    """Load the running merge's LoRA; its head has rows of other classes, and what else it holds is in the base."""
    if (kind := peft_type(merged.config)) != "LORA":
        raise InputError(
            f"adapter {merged.path} is of kind {kind}, which a LoRA cannot be trained on top of; write it as a LoRA: "
            f"pm-hf merge {merged.path} --output FOLDER"
        )
    keys = {f.name for f in LoraConfig.__dataclass_fields__.values()}
    raw = {key: value for key, value in merged.config.items() if key in keys}
    raw |= {"task_type": None, "modules_to_save": None, "inference_mode": True, "lora_dropout": 0.0}
    if not any(layout.kind == "embedding" for layout in merged.layouts.values()):
        raw["ensure_weight_tying"] = False  # it concerned modules_to_save
    config = LoraConfig(**raw)
    names = [name for module, layout in merged.layouts.items() for name in layout.stored_names(module)]
    state = {PEFT_PREFIX + name: merged.tensor(name) for name in names}
    with quiet(), whole_load(merged.path, settings):
        with seeded(0):  # the factors are drawn before they are overwritten
            model.add_adapter(MERGED_ADAPTER, config)
        result = set_peft_model_state_dict(model, state, adapter_name=MERGED_ADAPTER)
    lost = [name for name in result.missing_keys if f".{MERGED_ADAPTER}" in name]
    check_loaded(merged.path, settings, lost, result.unexpected_keys)


def _check_head(base: PreTrainedModel, head: str, adapter: Adapter) -> None:
    """InputError where the adapter's head is not of the form of the model's."""
    linear, root = base.get_submodule(head), head_root(base)
    problems = [f"its labels.json names {name}, the model's head is {head}" for name in adapter.labels if name != head]
    problems += [
        f"it adapts {name} of the head by LoRA" for name in adapter.layouts if f"{name}.".startswith(f"{root}.")
    ]
    for name, parameter in linear.named_parameters():
        full = f"{head}.{name}"
        if adapter.labels and full not in adapter.saved:
            problems.append(f"it has labels and no {full}")
        elif full in adapter.saved and (shape := adapter.tensor(full).shape[1:]) != parameter.shape[1:]:
            problems.append(f"its {full} has rows of shape {tuple(shape)}, the model's {tuple(parameter.shape[1:])}")
    for name in adapter.saved:
        if name.startswith(f"{root}.") and name.rpartition(".")[0] != head:
            held, own = adapter.tensor(name).shape, dict(base.named_parameters()).get(name)
            if own is None or own.shape != held:
                expected = "none" if own is None else f"one of shape {tuple(own.shape)}"
                problems.append(f"it holds {name} of shape {tuple(held)}, the model has {expected}")
    raise_all(problems, f"adapter {adapter.path} does not fit the base model")


def _check_targets(model: PeftModel, adapter: Adapter) -> None:
    """InputError where a module is to have a new LoRA that the adapter holds whole: no folder could hold both."""
    targets = [plain_name(name) for name, module in model.named_modules() if isinstance(module, LoraLayer)]
    both = [module for module in targets if any(name.startswith(f"{module}.") for name in adapter.saved)]
    both = [module for module in both if not any(".base_layer." in n for n in adapter.saved if n.startswith(module))]
    if both:
        raise InputError(
            f"lora.target_modules: adapter {adapter.path} holds {both[0]} whole, which cannot be adapted besides; "
            "leave it out of target_modules"
        )


def _check_whole(whole: Sequence[str], adapter: Adapter) -> None:
    """InputError where a module is to be trained whole that the adapter has a LoRA of: no folder could hold both."""
    both = [name for name in adapter.layouts if any(f"{name}.".startswith(f"{module}.") for module in whole)]
    if both:
        raise InputError(
            f"lora.modules_to_save: adapter {adapter.path} adapts {both[0]} by LoRA, which cannot be trained whole "
            "besides; leave it out of modules_to_save"
        )


def _fresh_rows(base: PreTrainedModel, head: str, labels: Sequence[str], running: Adapter | None) -> None:
    """Draw the head's rows anew; those of labels that the running merge has continue from there."""
    linear = base.get_submodule(head)
    linear.reset_parameters()
    linear.weight.data.normal_(0, getattr(base.config, "initializer_range", 0.02))
    if linear.bias is not None:
        linear.bias.data.zero_()
    rows = {} if running is None else {label: row for row, label in enumerate(running.labels.get(head, []))}
    for index, label in enumerate(labels):
        if running is not None and label in rows:
            for name, parameter in linear.named_parameters():
                parameter.data[index] = running.tensor(f"{head}.{name}")[rows[label]]


def _restore_shared(model: PeftModel, merged: Adapter | None, head: str | None) -> None:
    """Parameters that the checkpoint lacks, other than the rows of `head`, continue from the running merge."""
    names = set() if merged is None else {name for name in merged.saved if name.rpartition(".")[0] != head}
    for full, parameter in model.named_parameters():
        if merged is not None and SAVED_WRAPPER in full and (name := plain_name(full)) in names:
            parameter.data.copy_(merged.tensor(name))


def _activate(model: PeftModel, with_merged: bool) -> None:
    """Both adapters in every layer; PEFT's own set_adapter refuses two when a head is wrapped."""
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.set_adapter([MERGED_ADAPTER, TASK_ADAPTER] if with_merged else [TASK_ADAPTER])
        elif isinstance(module, ModulesToSaveWrapper):
            module.set_adapter(TASK_ADAPTER)


def _freeze(model: PeftModel, head: str | None, whole: Sequence[str]) -> set[str]:
    """Leave trainable the task's factors, the head's last Linear and the modules that are trained whole; returns their
    names."""
    kinds: dict[str, str] = {}
    for full, parameter in model.named_parameters():
        if re.search(rf"\.lora_[AB]\.{TASK_ADAPTER}\.weight$", full) is not None:
            kinds[full] = "factor"
        elif f".{SAVED_WRAPPER}.{TASK_ADAPTER}" in full:
            name = plain_name(full)
            if name.rpartition(".")[0] == head:
                kinds[full] = "head"
            elif any(name.startswith(f"{module}.") for module in whole):
                kinds[full] = "whole"
        if full in kinds:
            parameter.data = parameter.data.float()
        parameter.requires_grad_(full in kinds)
    needed = {"factor"} | ({"head"} if head is not None else set()) | ({"whole"} if whole else set())
    if set(kinds.values()) != needed:
        trained = ", ".join(sorted(set(kinds.values()))) or "no"
        raise InputError(f"nothing to train: found only {trained} parameters of the task adapter")
    return set(kinds)
