"""The same layer under two names: adapters of one base, written under different versions of transformers.

Names that the model's class lacks are replaced by those that transformers' own table gives for them. Where the class is
not known (no `auto_mapping`, and the base's config.json is not on this machine), names stay as they are, and adapters
whose names look like two names of the same layers are refused. Where the base's config.json is known too and the
adapters do not all adapt the same modules, each module has to be one of the model's.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import combinations

from pm_hf.adapters.architecture import ROOTS, ModelNames, ModelSource, may_be_renamed, model_names, model_source
from pm_hf.adapters.folder import Adapter, base_name, is_under
from pm_hf.adapters.layout import PEFT_PREFIX
from pm_hf.adapters.names import is_own_class
from pm_hf.errors import InputError

# what models call their parts: names that differ by one of these are two parts of one model
PARTS = re.compile(
    r"encoder|decoder|vision|visual|image|audio|speech|video|text|query|question|passage|ctx|student|teacher|mtp"
)


Twins = tuple[Adapter, str, Adapter, str]


def one_naming(adapters: Sequence[Adapter]) -> list[Adapter]:
    """The adapters with one name for each layer; InputError with both names where that cannot be had."""
    opened = list(adapters)
    if len({base_name(adapter.config) for adapter in opened}) > 1:  # which is refused for itself
        return opened
    if all(is_own_class(adapter.config) for adapter in opened):  # whose names are its own affair
        return opened
    sources = [model_source(adapter.config) for adapter in reversed(opened)]  # the last one's class is written
    source = min(sources, key=lambda s: (s.class_name is None, s.config is None))
    if not source.known:
        _refuse([pair for pair in (*_twins(opened), *_strangers(opened)) if _look_renamed(pair[1], pair[3])], [])
        return opened
    apart = next(_twins(opened), None) is not None
    agree = len({frozenset(adapter.layouts) for adapter in opened}) == 1
    strange = (source.config is not None and not agree) or any(_strangers(opened))
    if not apart and not strange and not any(map(may_be_renamed, sources)):
        return opened
    models = _likeliest_first(model_names(source), opened)
    named = [_renamed(adapter, models, apart) for adapter in opened]
    pairs = [*_twins(named), *_strangers(named)]
    layers = [_known_layers(model, {name for pair in pairs for name in (pair[1], pair[3])}) for model in models]
    _refuse([pair for pair in pairs if not _both_known(pair[1], pair[3], layers)], models)
    _refuse_foreign(named, models, source)
    return named


def _likeliest_first(models: Sequence[ModelNames], adapters: Sequence[Adapter]) -> list[ModelNames]:
    """The classes in order of how many of the adapters' layers they have."""
    names = {module for adapter in adapters for module in adapter.layouts}
    return sorted(models, key=lambda model: -sum(map(model.has, names)))


def check_loads(adapter: Adapter) -> None:
    """InputError where PEFT would not find every tensor of the folder: the names in the file are not the model's."""
    named = one_naming([adapter])[0]
    odd = [full for name, full in named.stored.items() if full != PEFT_PREFIX + name]
    if odd:
        raise InputError(
            f"adapter {adapter.path}: its tensor {odd[0]} has not the name that PEFT looks for; write it with the "
            f"names of the installed transformers first: pm-hf merge {adapter.path} --output NEW"
        )


def _renamed(adapter: Adapter, models: Sequence[ModelNames], apart: bool) -> Adapter:
    """The adapter with the names of the installed transformers, where one of the classes has them. apart: other
    adapters name these layers otherwise, so that a place that only one layer of the class has tells too."""
    saved = {name.rpartition(".")[0].removesuffix(".base_layer") for name in adapter.saved}
    plain = [m for m, layout in adapter.layouts.items() if layout.kind != "fused" and ".base_layer" not in m]
    known = [model.has if apart else model.has_under_any_head for model in models]
    unknown = [name for name in {*plain, *saved} if not any(has(name) for has in known)]
    for model in models if unknown else ():
        new = (model.placed(unknown) if apart or model.whole else {}) | model.renamed(unknown)
        every = [new.get(name, name) for name in {*adapter.layouts, *saved}]
        if new and len(set(every)) == len(every):
            return _with_names(adapter, new)
    return adapter


def _with_names(adapter: Adapter, new: Mapping[str, str]) -> Adapter:
    def tensor(name: str) -> str:
        module = name
        while module and module not in new:
            module = module.rpartition(".")[0]
        return new[module] + name.removeprefix(module) if module else name

    roots = adapter.config.get("modules_to_save") or []
    moved = {
        root: [new[module] for module in new if is_under(f"{module}.", root) and not is_under(f"{new[module]}.", root)]
        for root in roots
    }
    roots = list(dict.fromkeys(name for root in roots for name in moved[root] or [root]))
    return replace(
        adapter,
        config=adapter.config | ({"modules_to_save": roots} if roots else {}),
        layouts={new.get(module, module): layout for module, layout in adapter.layouts.items()},
        saved=tuple(tensor(name) for name in adapter.saved),
        rows={new.get(head, head): rows for head, rows in adapter.rows.items()},
        stored={tensor(name): full for name, full in adapter.stored.items()},
    )


def _twins(adapters: Sequence[Adapter]) -> Iterator[Twins]:
    """Layers that may be one: equal behind what names their place in the model, of one shape, each of its own adapter,
    whose other layers are not in the other's place, unless the two places differ in `ROOTS` alone: half renamed."""
    distinct = {frozenset(adapter.layouts): adapter for adapter in adapters}
    for left, right in combinations(distinct.values(), 2):
        places = [{_split(module)[0] for module in adapter.layouts} for adapter in (left, right)]
        others: dict[str, list[str]] = {}
        for module in right.layouts:
            layer = _split(module)[1]
            if module not in left.layouts:
                others.setdefault(layer, []).append(module)
        for module, layout in left.layouts.items():
            place, layer = _split(module)
            for other in others.get(layer, []) if module not in right.layouts else ():
                beside = _split(other)[0]
                apart = place not in places[1] and beside not in places[0]
                if right.layouts[other].site == layout.site and (apart or _changed(place, beside) <= ROOTS):
                    yield left, module, right, other


def _strangers(adapters: Sequence[Adapter]) -> Iterator[Twins]:
    """A layer of each of two adapters that have neither a module nor a list of layers in common."""
    distinct = {frozenset(adapter.layouts): adapter for adapter in adapters}
    for left, right in combinations(distinct.values(), 2):
        lists = [{_list_of(module): module for module in a.layouts if _list_of(module)} for a in (left, right)]
        if all(lists) and not lists[0].keys() & lists[1].keys() and not left.layouts.keys() & right.layouts.keys():
            yield left, min(lists[0].values()), right, min(lists[1].values())


def _list_of(module: str) -> str:
    """The first list of layers that a module is in, `model.layers`; empty without one."""
    match = re.match(r"(.+?)\.\d+(?:\.|$)", module)
    return match[1] if match else ""


def _split(module: str) -> tuple[str, str]:
    """(the layer's place in the model, its name there): `model` and `layers.0.q`; without a number the last part."""
    match = re.match(r"(?:(.*?)\.)?([^.]+\.\d+(?:\..*)?)$", module)
    return (match[1] or "", match[2]) if match else (module.rpartition(".")[0], module.rpartition(".")[2])


def _look_renamed(module: str, other: str) -> bool:
    """Whether the places of two layers look like names of one rather than like two parts of a model."""
    places = [_list_of(name) or name.rpartition(".")[0] for name in (module, other)]
    changed = _changed(*places)
    if changed <= ROOTS:
        return True
    return bool(_list_of(module)) and not any(map(PARTS.search, changed))


def _changed(place: str, other: str) -> set[str]:
    """The parts that only one of two places has."""
    parts, more = Counter(place.split(".")), Counter(other.split("."))
    return set((parts - more) + (more - parts)) - {""}


def _known_layers(model: ModelNames, names: set[str]) -> set[str]:
    """Those of the names that the class has, and those that PEFT converts when it loads them."""
    lacking = {name for name in names if not model.has(name)}
    return (names - lacking) | {name for name, new in model.renamed(lacking).items() if name == new}


def _both_known(module: str, other: str, layers: Sequence[set[str]]) -> bool:
    """Whether one class has both layers; without any class that has one of them, whether they look like two parts."""
    if any(module in known or other in known for known in layers):
        return any(module in known and other in known for known in layers)
    return not _look_renamed(module, other)


def _refuse(pairs: Sequence[Twins], models: Sequence[ModelNames]) -> None:
    if not pairs:
        return
    left, module, right, other = pairs[0]
    base = left.config.get("base_model_name_or_path")
    both = f"adapter {left.path} calls a layer {module}, adapter {right.path} {other}"
    if not models and model_source(left.config).config is None:
        raise InputError(
            f"{both}: the same layer under two names, or two layers; the base's config.json would tell, and {base} is "
            f"neither a folder that has it nor in the Hub's cache: download it (hf download {base} config.json), or "
            "write the folder of the base into base_model_name_or_path of both"
        )
    if not models:
        raise InputError(
            f"{both}: the same layer under two names, or two layers, and the installed transformers cannot "
            f"build {base} to tell; load both into one class and save them again with PEFT"
        )
    lacks = [name for name in (module, other) if not any(model.has(name) for model in models)]
    titles = " and ".join(model.title for model in models)
    why = f"{titles} of the installed transformers has no {lacks[0]}" if lacks else f"{titles} call it differently"
    raise InputError(
        f"{both}: {why}, and its table of renamed layers does not say that the two are one; load the adapter into "
        "the same class as the other and save it again with PEFT"
    )


def _refuse_foreign(adapters: Sequence[Adapter], models: Sequence[ModelNames], source: ModelSource) -> None:
    """InputError where a module is none of the model's, whose configuration is known. A class that is only guessed,
    from the task or the base's config.json, and that has no layer of any adapter is not the one they had."""
    names = {module for adapter in adapters for module in adapter.layouts}
    whole = [m for m in models if m.whole and (source.class_name is not None or any(map(m.has, names)))]
    if not whole:
        return
    foreign, model = min(((m.foreign(names), m) for m in whole), key=lambda pair: len(pair[0]))
    for adapter in adapters:
        for module in foreign:
            if any(is_under(f"{name}.", module) for name in adapter.layouts):
                near = model.nearest(module)
                raise InputError(
                    f"adapter {adapter.path}: {model.title} of the installed transformers, built from {source.config}, "
                    f"has no module {module}{f' (nearest: {near})' if near else ''}; load the adapter into the class "
                    "and base that it was trained on and save it again with PEFT, or write that base into "
                    "base_model_name_or_path"
                )
