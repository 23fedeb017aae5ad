"""The model of one task: base, frozen running merge, trainable task adapter and the task's own head."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor
from transformers import PreTrainedModel

from pm_hf.adapters.folder import Adapter
from pm_hf.adapters.layout import ADAPTER_CONFIG, PEFT_PREFIX
from pm_hf.config.kinds import STREAM_KINDS
from pm_hf.config.schema import LoraSettings, ModelSettings
from pm_hf.errors import InputError
from pm_hf.files import read_json
from pm_hf.models.contexts import quiet, seeded
from pm_hf.models.loading import TEXT_KIND, head_name, load_base
from pm_hf.models.sharded import SAVED_WRAPPER, plain_name

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
    head_from: Adapter | None = None,
    continue_head: bool = False,
) -> TaskModel:
    """Base + frozen `merged` (without its head) + trainable `task`, both active, and a fresh head of the task's rows.

    kind: a key of STREAM_KINDS; language models have no head. head_from: whose head goes on, by default `merged`'s.
    What the checkpoint lacks (the head's other layers) is frozen at its value, or at the seeded one; with
    `continue_head` the rows of labels that it knows start from its rows (a head shared by all tasks). Trainable are the
    task's LoRA factors and the head's last Linear, nothing else: checked before it is returned.
    """
    if lora.r < 1:
        raise InputError(f"lora.r must be at least 1, found {lora.r}")
    head_from = head_from or merged
    base, saved_modules = load_base(settings, labels, seed, kind)
    head = head_name(base) if STREAM_KINDS[kind].has_head else None
    base_name = base.config.name_or_path
    with seeded(seed + 7919 * (task + 1)):
        if head is not None:
            _fresh_rows(base, head, labels, head_from if continue_head else None)
        config = LoraConfig(
            r=lora.r,
            lora_alpha=lora.alpha,
            lora_dropout=lora.dropout,
            target_modules=lora.target_modules,
            modules_to_save=saved_modules or None,
            task_type=None,
            base_model_name_or_path=base_name,
        )
        try:
            with quiet():
                model = get_peft_model(base, config, adapter_name=TASK_ADAPTER)
        except ValueError as error:
            raise InputError(f"lora.target_modules {lora.target_modules}: {error}") from error
    odd = [n for n, m in model.named_modules() if isinstance(m, LoraLayer) and not m.lora_A]
    if odd:
        raise InputError(f"lora.target_modules: {odd[0]} is not a linear layer; only linear layers are supported")
    if merged is not None:
        _add_merged(model, merged)
    _restore_shared(model, head_from, head)
    _activate(model, merged is not None)
    expected = _freeze(model, head)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    if trainable != expected:
        raise RuntimeError(f"unexpected set of trainable parameters: {sorted(trainable ^ expected)}")
    return TaskModel(model, head)


def task_tensors(model: PeftModel, kind: str = TEXT_KIND) -> tuple[dict[str, Tensor], dict[str, Tensor], dict]:
    """(LoRA factors, saved modules, PEFT configuration) of the task adapter, detached, names as in the file."""
    state = get_peft_model_state_dict(model, adapter_name=TASK_ADAPTER, save_embedding_layers=False)
    plain = {plain_name(name): value.detach().cpu().clone() for name, value in state.items()}
    config = model.peft_config[TASK_ADAPTER].to_dict() | {
        "task_type": STREAM_KINDS[kind].task_type,
        "inference_mode": True,
    }
    factors = {name: value for name, value in plain.items() if "lora_" in name}
    return factors, {name: value for name, value in plain.items() if "lora_" not in name}, config


def _add_merged(model: PeftModel, merged: Adapter) -> None:
    """Load the running merge's LoRA, without its head (its rows are other classes')."""
    keys = {f.name for f in LoraConfig.__dataclass_fields__.values()}
    raw = {key: value for key, value in read_json(merged.path / ADAPTER_CONFIG).items() if key in keys}
    config = LoraConfig(
        **raw | {"task_type": None, "modules_to_save": None, "inference_mode": True, "lora_dropout": 0.0}
    )
    with seeded(0):  # the factors are drawn before they are overwritten
        model.add_adapter(MERGED_ADAPTER, config)
    state = {}
    for module in merged.scaling:
        for factor in "AB":
            name = f"{module}.lora_{factor}.weight"
            state[PEFT_PREFIX + name] = merged.tensor(name)
    result = set_peft_model_state_dict(model, state, adapter_name=MERGED_ADAPTER)
    lost = [name for name in result.missing_keys if f".{MERGED_ADAPTER}." in name]
    if lost or result.unexpected_keys:
        raise InputError(
            f"{merged.path} does not fit the base model: missing {lost[:3]}, unexpected {result.unexpected_keys}"
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
    values = {} if merged is None else {n: merged.tensor(n) for n in merged.saved if n.rpartition(".")[0] != head}
    for full, parameter in model.named_parameters():
        if SAVED_WRAPPER in full and (name := plain_name(full)) in values:
            parameter.data.copy_(values[name])


def _activate(model: PeftModel, with_merged: bool) -> None:
    """Both adapters in every layer; PEFT's own set_adapter refuses two when a head is wrapped."""
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.set_adapter([MERGED_ADAPTER, TASK_ADAPTER] if with_merged else [TASK_ADAPTER])
        elif isinstance(module, ModulesToSaveWrapper):
            module.set_adapter(TASK_ADAPTER)


def _freeze(model: PeftModel, head: str | None) -> set[str]:
    """Leave trainable the task's factors and the head's last Linear; returns their names."""
    expected = set()
    for full, parameter in model.named_parameters():
        factor = re.search(rf"\.lora_[AB]\.{TASK_ADAPTER}\.weight$", full) is not None
        row = f".{SAVED_WRAPPER}.{TASK_ADAPTER}" in full and plain_name(full).rpartition(".")[0] == head
        if factor or row:
            parameter.data = parameter.data.float()
        parameter.requires_grad_(factor or row)
        if factor or row:
            expected.add(full)
    kinds = {"factor" if ".lora_" in name else "head" for name in expected}
    if kinds != {"factor", "head"} - ({"head"} if head is None else set()):
        raise InputError(f"nothing to train: found only {kinds or 'no'} parameters of the task adapter")
    return expected
