"""What the installed transformers calls the layers of a model class, and what earlier versions called them.

transformers is imported only inside `model_names`, which builds the class without weights.
"""

import contextlib
import difflib
import importlib.util
import json
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from pm_hf.adapters.download import base_config_file
from pm_hf.errors import InputError
from pm_hf.files import read_json

# PEFT's task types and the class that a base is loaded with for them; other tasks have the class of the checkpoint
AUTO_CLASSES = {
    "SEQ_CLS": ("AutoModelForSequenceClassification", "AutoModelForImageClassification"),
    "TOKEN_CLS": ("AutoModelForTokenClassification",),
    "QUESTION_ANS": ("AutoModelForQuestionAnswering",),
    "CAUSAL_LM": ("AutoModelForCausalLM",),
    "SEQ_2_SEQ_LM": ("AutoModelForSeq2SeqLM",),
    "FEATURE_EXTRACTION": ("AutoModel",),
}


# what versions and classes put around the same layers, or take away
ROOTS = frozenset(("model", "base_model", "language_model", "text_model", "transformer", "module", "llm"))


PARTS_OF_CLASS = re.compile(r"(Text|Vision|Audio|Thinker)?(Model|Backbone|Encoder|For\w+)")


@dataclass(frozen=True)
class ModelSource:
    """What is known of an adapter's base. library, class_name: from PEFT's `auto_mapping`; config: the base's
    config.json, where it is on this machine; task: PEFT's task type."""

    library: str | None
    class_name: str | None
    config: Path | None
    task: str | None

    @property
    def known(self) -> bool:
        """Whether a class can be named."""
        return self.config is not None or self.class_name is not None


@dataclass(frozen=True)
class ModelNames:
    """Names of one model class. modules: all of them; layers: the same, numbers as #. whole: from the base's own
    configuration, else from the default one of its class, in which parts may be of another architecture than the
    base's. guessed: the class is the checkpoint's, as the adapter says nothing of its own: it may have been trained on
    the same model with another head, or without one."""

    title: str
    modules: frozenset[str]
    layers: frozenset[str]
    whole: bool
    model: Any
    guessed: bool = False

    def has(self, module: str) -> bool:
        """Whether the class has a module of this name."""
        return _numberless(module) in self.layers

    def has_under_any_head(self, module: str) -> bool:
        """Whether the class has it, or where that is guessed the same model with another head or without one."""
        prefix = f"{self.model.base_model_prefix}."
        other = module.removeprefix(prefix) if module.startswith(prefix) else prefix + module
        return self.has(module) or (self.guessed and self.has(other))

    def foreign(self, modules: Iterable[str]) -> list[str]:
        """Those of the modules that the model does not have, by number too, and that PEFT does not convert."""
        plain = {re.sub(r"\.base_layer(?=\.|$)", "", module) for module in modules}
        converted = {old for old, new in self.renamed(m for m in plain if not self.has(m)).items() if old == new}
        return sorted(plain - self.modules - converted)

    def nearest(self, module: str) -> str | None:
        """The model's own module whose name is most like this one, where one is."""
        last = module.rpartition(".")[2]
        same = sorted(name for name in self.modules if name.rpartition(".")[2] == last)
        return next(iter(difflib.get_close_matches(module, same or sorted(self.modules), 1, 0.7)), None)

    def renamed(self, modules: Iterable[str]) -> dict[str, str]:
        """{module that the class lacks: the one that it became in a later transformers}, by transformers' own table for
        checkpoints; itself where the weights are converted too, which PEFT does when it loads the adapter."""
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

        older = getattr(self.model, "_checkpoint_conversion_mapping", None)
        table = get_model_conversion_mapping(self.model, key_mapping=older)
        renamings = [entry for entry in table if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in table if isinstance(entry, WeightConverter)]
        new_names = {}
        for module in sorted(modules):  # as transformers does: some entries wait for an earlier name
            key, converter = rename_source_key(f"{module}.weight", renamings, converters)
            new = key.removesuffix(".weight")
            if self.has(module):
                continue
            if converter is not None:
                new_names[module] = module
            elif new not in (module, key) and self._may_have(new):
                new_names[module] = new
        return new_names

    def placed(self, modules: Iterable[str]) -> dict[str, str]:
        """{module that the class lacks: its only module that differs in `ROOTS` and the class's own prefix alone}."""
        roots = ROOTS | {self.model.base_model_prefix}
        places: dict[tuple[str, ...], list[str]] = {}
        for layer in self.layers:
            places.setdefault(_without(layer, roots), []).append(layer)
        unknown = {module: _without(_numberless(module), roots) for module in modules if not self.has(module)}
        only = {module: places[key][0] for module, key in unknown.items() if len(places.get(key, ())) == 1}
        return {module: _numbered(layer, module) for module, layer in only.items()}

    def _may_have(self, module: str) -> bool:
        if self.has_under_any_head(module):
            return True
        lists = {name.partition(".#")[0] for name in self.layers if ".#" in name}
        return not self.whole and _numberless(module).partition(".#")[0] in lists


def model_source(config: Mapping) -> ModelSource:
    """What an adapter's configuration, and the base's where it is at hand, say of the model; nothing is downloaded."""
    mapping = config.get("auto_mapping")
    mapping = mapping if isinstance(mapping, Mapping) else {}
    library, name = mapping.get("parent_library"), mapping.get("base_model_class")
    named = isinstance(library, str) and isinstance(name, str) and library.partition(".")[0] == "transformers"
    file = base_config_file(config.get("base_model_name_or_path"), config.get("revision"))
    return ModelSource(library if named else None, name if named else None, file, config.get("task_type"))


def may_be_renamed(source: ModelSource) -> bool:
    """Whether transformers' table of renamed layers has an entry for the model or a part of it: from the table's text,
    which takes a millisecond where the import takes a second."""
    types, classes = set(), set()
    if source.class_name is not None:
        types.add(str(source.library).split(".")[2:3][0] if str(source.library).count(".") > 1 else "")
        classes.add(source.class_name)
    if source.config is not None:
        with contextlib.suppress(InputError):
            _collect(read_json(source.config), types, classes)
    table = _table()
    stems = {re.split(r"For[A-Z]|(?:LMHead)?Model", name)[0] for name in classes}
    parts = (name.removeprefix(stem) for stem in stems for name in table if stem and name.startswith(stem))
    return bool(types & table or any(map(PARTS_OF_CLASS.fullmatch, parts)))


def model_names(source: ModelSource) -> list[ModelNames]:
    """The classes that the base may be loaded as, likeliest first; none where no class is known or can be built."""
    text = source.config.read_text(encoding="utf-8") if source.config is not None else None
    try:
        return _build(source, text)
    except Exception:  # whatever transformers raises for a configuration of another version or of somebody's own
        return []


@cache
def _build(source: ModelSource, text: str | None) -> list[ModelNames]:
    """Models of the possible classes on the meta device; text: what config.json says, so that the cache notices it."""
    import transformers

    with _quiet(), torch.random.fork_rng(devices=[]), torch.device("meta"):
        config = None
        if text is not None and source.config is not None:
            config = transformers.AutoConfig.from_pretrained(
                source.config.parent, trust_remote_code=False, local_files_only=True
            )
        if source.class_name is not None:
            model_class = getattr(transformers, source.class_name)
            own = isinstance(config, model_class.config_class)
            model = model_class(config if own else model_class.config_class())
            return [_names(source.class_name, model, own)]
        built = {}
        for name in AUTO_CLASSES.get(str(source.task), ()):
            with contextlib.suppress(ValueError):  # the configuration is of no class for this task
                model = getattr(transformers, name).from_config(config, trust_remote_code=False)
                built[type(model).__name__] = model
        own_classes = [] if source.task in ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS") and built else _architectures(text)
        for name in own_classes:
            if name not in built and hasattr(transformers, name):
                built[name] = getattr(transformers, name)(config)
        guessed = source.task not in AUTO_CLASSES
        return [replace(_names(name, model, True), guessed=guessed) for name, model in built.items()]


def _architectures(text: str | None) -> list[str]:
    names = json.loads(text or "{}").get("architectures")
    return [name for name in names if isinstance(name, str)] if isinstance(names, list) else []


def _names(title: str, model: torch.nn.Module, whole: bool) -> ModelNames:
    modules = frozenset(name for name, _ in model.named_modules(remove_duplicate=False))
    return ModelNames(title, modules, frozenset(_numberless(name) for name, _ in model.named_modules()), whole, model)


def _numberless(module: str) -> str:
    return re.sub(r"(?<![^.])\d+(?![^.])", "#", module)


def _numbered(layer: str, module: str) -> str:
    """A layer's name with the numbers of another one for each #."""
    numbers = iter(re.findall(r"(?<![^.])\d+(?![^.])", module))
    return re.sub("#", lambda _: next(numbers), layer)


def _without(module: str, roots: frozenset[str]) -> tuple[str, ...]:
    """The parts of a name without those in `roots` that stand before its last one."""
    *place, last = module.split(".")
    return (*(part for part in place if part not in roots), last)


def _collect(config: Any, types: set[str], classes: set[str]) -> None:
    """Every `model_type` and every class that a config.json names, those of its parts too."""
    if not isinstance(config, Mapping):
        return
    kind, names = config.get("model_type"), config.get("architectures")
    types |= {kind} if isinstance(kind, str) else set()
    classes |= {name for name in names if isinstance(name, str)} if isinstance(names, list) else set()
    for part in config.values():
        _collect(part, types, classes)


@cache
def _table() -> frozenset[str]:
    """Every model type and class that transformers' table of renamed layers names."""
    spec = importlib.util.find_spec("transformers")
    file = Path(spec.origin).with_name("conversion_mapping.py") if spec is not None and spec.origin else None
    if file is None or not file.is_file():
        return frozenset()
    return frozenset(re.findall(r'"(\w+)"', file.read_text(encoding="utf-8")))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No word of transformers on a class that nobody is going to run."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
