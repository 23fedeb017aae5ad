"""Adapter folders: whatever wrote their names, a merge is the dense float64 sum of their updates and heads merge by
label; folders of odd content are merged as PEFT means them, or refused."""

import json
import math
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from helpers.adapter_folders import HEAD, edited, head, tree, write_folder
from helpers.fuzz import REFUSED, RIGHT, check, read
from helpers.random_adapters import CONFIG, PREFIX, WEIGHTS, Drawn, Site, adapters, dense, sites, write
from pm_hf.adapters.inspection import describe
from pm_hf.adapters.merge import merge_adapters
from pm_hf.adapters.names import WRAPPERS

TOLERANCE = 1e-5  # of the norms that go in
PARALLEL = "module"
OUTER = st.lists(st.sampled_from([PARALLEL, *sorted(WRAPPERS)]), max_size=2)
INNER = st.lists(st.sampled_from([PARALLEL, *sorted(WRAPPERS), PREFIX.rstrip(".")]), max_size=2)
FORMS = st.fixed_dictionaries(
    {
        "outer": OUTER,  # before PEFT's prefix
        "inner": INNER,  # behind it
        "between": st.lists(st.tuples(st.sampled_from(sorted(WRAPPERS)), st.integers(1, 9)), max_size=2),
        "adapter": st.sampled_from([None, None, "default", "task-1", "lora", "weight", "0"]),
    }
)
PLAIN = {"outer": [], "inner": [], "between": [], "adapter": None}
CLASSES = ["x", "y", "z", "7", "07", "true", "é", " x"]
HEADS = st.lists(st.sampled_from(CLASSES), min_size=1, max_size=5, unique=True)


@st.composite
def _sound(draw: Any) -> dict:
    places = draw(sites())
    drawn = draw(adapters(places, draw(st.integers(2, 3))))
    return {
        "places": places,
        "drawn": drawn,
        "forms": [draw(FORMS) for _ in drawn],
        "weights": draw(st.none() | st.lists(st.floats(-2, 2), min_size=len(drawn), max_size=len(drawn))),
        "heads": draw(st.none() | st.lists(HEADS, min_size=len(drawn), max_size=len(drawn))),
    }


# layers of classes of transformers: (class and module of it, names of today, what earlier versions called them)
OLD = {
    "vit": (
        ("ViTForImageClassification", "transformers.models.vit.modeling_vit"),
        ["vit.layers.0.attention.q_proj", "vit.layers.1.attention.v_proj"],
        [("vit.layers", "vit.encoder.layer"), ("n.q_proj", "n.attention.query"), ("n.v_proj", "n.attention.value")],
    ),
    "llava": (
        ("LlavaForConditionalGeneration", "transformers.models.llava.modeling_llava"),
        ["model.language_model.layers.0.self_attn.q_proj", "model.language_model.layers.11.mlp.up_proj"],
        [("model.language_model.layers", "language_model.model.layers")],
    ),
    "gpt_neox": (
        ("GPTNeoXForCausalLM", "transformers.models.gpt_neox.modeling_gpt_neox"),
        ["gpt_neox.layers.0.attention.query_key_value", "lm_head"],
        [("lm_head", "embed_out")],
    ),
}
RENAMED = st.fixed_dictionaries(
    {
        "model": st.sampled_from(sorted(OLD)),
        "old": st.lists(st.booleans(), min_size=2, max_size=3),
        "ranks": st.lists(st.integers(1, 4), min_size=3, max_size=3),
        "forms": st.lists(FORMS, min_size=3, max_size=3),
    }
)

KEYS = [
    *("peft_type", "task_type", "base_model_name_or_path", "revision", "r", "lora_alpha", "target_modules", "bias"),
    *("exclude_modules", "rank_pattern", "alpha_pattern", "modules_to_save", "use_rslora", "lora_bias", "auto_mapping"),
    *("init_lora_weights", "layers_to_transform", "layers_pattern", "target_parameters", "ensure_weight_tying"),
    *("fan_in_fan_out", "use_dora", "init_r", "eva_config", "loftq_config", "weather"),
]
NUMBERS = st.integers() | st.floats() | st.sampled_from([10**400, -(10**400), 0, 1, 2, True, 1e-320, 2.0])
TEXTS = st.text(max_size=6) | st.sampled_from(
    [
        "",
        "(",
        "q",
        "LORA",
        "ADALORA",
        "none",
        "\x1b[2J",
        "\u202e",
        "a\0b",
        "/",
        "~",
        "layers.0.q",
        "^layers.0.q",
        "v",
        ".",
    ]
)
ATOMS = st.none() | st.booleans() | NUMBERS | TEXTS
VALUES = st.recursive(ATOMS, lambda v: st.lists(v, max_size=3) | st.dictionaries(TEXTS, v, max_size=3), max_leaves=4)
LIKELY = st.fixed_dictionaries(
    {},
    optional={
        "lora_alpha": st.integers(1, 99) | st.floats(0.1, 99),
        "use_rslora": st.booleans(),
        "alpha_pattern": st.dictionaries(
            st.sampled_from(["q", "v", "layers.0.q", "layers.1.v", r"^layers\.1", ".*v", "0.q", "layers"]),
            st.integers(1, 9),
        ),
        "rank_pattern": st.dictionaries(st.sampled_from(["q", "layers.1.v", "k"]), st.integers(1, 3)),
        "target_modules": st.sampled_from([["q", "v"], ["layers.0.q", "v"], ".*[qv]", "all-linear", ["q"], [], None]),
        "r": st.integers(1, 4),
    },
)
PARTS = st.sampled_from(
    [
        *("module", "base_model", "model", "_orig_mod", "layers", "0", "q", "lora_A", "lora_B", "lora_E", "weight"),
        *("default", "modules_to_save", "original_module", "base_layer", "lora_embedding_A", "classifier", "bias", ""),
    ]
)
DTYPES = ("float32", "float16", "bfloat16", "int8", "bool", "complex64", "float64", "float8_e4m3fn")
TENSORS = st.dictionaries(
    st.lists(PARTS, min_size=1, max_size=7).map(".".join) | TEXTS.filter(bool),
    st.tuples(st.lists(st.integers(0, 3), max_size=3), st.sampled_from(DTYPES)),
    max_size=2,
)
DAMAGE = st.tuples(
    st.sampled_from([WEIGHTS, CONFIG, "labels.json"]),
    st.integers(0, 5000),
    st.sampled_from(["put", "set", "cut", "gone"]),
    st.binary(max_size=2),
)
ODD = st.fixed_dictionaries(
    {
        "config": st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=2) | LIKELY,
        "tensors": st.just({}) | TENSORS,
        "labels": st.none() | VALUES,
        "report": st.none() | VALUES,
        "prefix": st.sampled_from([PREFIX, "", "module." + PREFIX]),
        "damage": st.just([]) | st.lists(DAMAGE, max_size=2),
    }
)
CASES = st.one_of(_sound(), _sound(), ODD, ODD, RENAMED)


def judge(case: Mapping, folder: Path) -> str:
    """RIGHT or REFUSED; SilentError for a merge that is not the sum."""
    if "places" in case:
        return _judge_sound(case, folder)
    return _judge_renamed(case, folder) if "model" in case else _judge_odd(case, folder)


def renamed(folder: Path, form: Mapping) -> Path:
    """The folder with the tensor names that wrappers and state dicts make of PEFT's."""
    tensors = {}
    for name, value in load_file(folder / WEIGHTS).items():
        module, _, tail = name.removeprefix(PREFIX).rpartition(".lora_")
        module, tail = (
            (module, f"lora_{tail}")
            if module
            else (name.removeprefix(PREFIX).rpartition(".")[0], name.rpartition(".")[2])
        )
        parts = module.split(".")
        for wrapper, place in form["between"]:
            parts.insert(1 + (place - 1) % len(parts), wrapper)
        if form["adapter"] is not None and tail.startswith("lora_"):
            factor, dot, rest = tail.partition(".")
            tail = f"{factor}.{form['adapter']}{dot}{rest}"
        elif form["adapter"] is not None:
            tail = f"modules_to_save.{form['adapter']}.{tail}"
            tensors[
                ".".join(
                    [*form["outer"], PREFIX[:-1], *form["inner"], *parts, f"original_module.{name.rpartition('.')[2]}"]
                )
            ] = value + 1
        tensors[".".join([*form["outer"], PREFIX[:-1], *form["inner"], *parts, tail])] = value
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    return folder


def _judge_sound(case: Mapping, folder: Path) -> str:
    places, count, weights = case["places"], len(case["drawn"]), case["weights"]
    updates, heads, odd = [], [], []
    for i, (drawn, form) in enumerate(zip(case["drawn"], case["forms"], strict=True)):
        path = write(folder / f"a{i}", places, drawn)
        updates.append(dense(path, places))
        if case["heads"] is not None and weights is None:
            heads.append(_with_head(path, case["heads"][i], i))
        odd.append(renamed(path, form))
    shares = [1 / count] * count if weights is None else weights
    read_or_not = read(lambda: merge_adapters(odd, folder / "out", method="average", weights=weights))
    check(read_or_not[1] is None, "refused:", read_or_not[1])
    found = dense(folder / "out", places)
    for name, matrix in found.items():
        wanted = sum(share * update[name] for share, update in zip(shares, updates, strict=True))
        size = sum(abs(share) * float(update[name].norm()) for share, update in zip(shares, updates, strict=True))
        check(float((matrix - wanted).norm()) <= TOLERANCE * size + 1e-12, name, "is not the sum:", matrix, wanted)
    if heads:
        _check_head(folder / "out", heads)
    return RIGHT


def _with_head(path: Path, labels: Sequence[str], seed: int) -> dict[str, torch.Tensor]:
    """Write a class head into the folder; {label: its row, the bias last}."""
    values = head(len(labels), seed, width=5)
    tensors = load_file(path / WEIGHTS) | {PREFIX + name: value for name, value in values.items()}
    save_file(tensors, path / WEIGHTS, {"format": "pt"})
    edited(path, modules_to_save=[HEAD])
    (path / "labels.json").write_text(json.dumps({HEAD: labels}))
    return dict(zip(labels, _rows(values), strict=True))


def _rows(values: Mapping[str, torch.Tensor], prefix: str = "") -> torch.Tensor:
    return torch.cat([values[f"{prefix}{HEAD}.weight"], values[f"{prefix}{HEAD}.bias"][:, None]], dim=1).double()


def _check_head(out: Path, heads: Sequence[Mapping[str, torch.Tensor]]) -> None:
    """Each label's row is the mean of the rows that the adapters have for it."""
    labels = json.loads((out / "labels.json").read_text())[HEAD]
    check(set(labels) == {label for rows in heads for label in rows} and len(labels) == len(set(labels)), labels)
    for label, row in zip(labels, _rows(load_file(out / WEIGHTS), PREFIX), strict=True):
        having = [rows[label] for rows in heads if label in rows]
        check(torch.allclose(row, sum(having) / len(having), rtol=1e-5, atol=1e-6), "row of", label)


def _judge_renamed(case: Mapping, folder: Path) -> str:
    (name, library), layers, changes = OLD[case["model"]]
    places = [Site(layer, "linear", 6, 4) for layer in layers]
    updates, odd = [], []
    for i, old in enumerate(case["old"]):
        sizes = dict.fromkeys(layers, (case["ranks"][i], 3 + i))
        path = write(folder / f"a{i}", places, Drawn(sizes, rslora=i > 1, bias=False, dtype=torch.float32, seed=i))
        updates.append(dense(path, places))
        config = json.loads((path / CONFIG).read_text())
        config["auto_mapping"] = {"base_model_class": name, "parent_library": library}
        tensors = load_file(path / WEIGHTS)
        if old:
            tensors = {_replaced(key, changes): value for key, value in tensors.items()}
            for key in ("rank_pattern", "alpha_pattern"):
                config[key] = {_replaced(module, changes): value for module, value in config[key].items()}
            config["target_modules"] = [_replaced(module, changes) for module in config["target_modules"]]
        save_file(tensors, path / WEIGHTS, {"format": "pt"})
        (path / CONFIG).write_text(json.dumps(config))
        odd.append(renamed(path, case["forms"][i]))
    _, said = read(lambda: merge_adapters(odd, folder / "out", method="average"))
    check(said is None, "refused:", said)
    found, count = dense(folder / "out", places), len(updates)
    for layer in layers:
        wanted = sum(update[layer] for update in updates) / count
        check(float((found[layer] - wanted).norm()) <= TOLERANCE * float(wanted.norm()), layer, "is not the sum")
    return RIGHT


def _replaced(name: str, changes: Sequence[tuple[str, str]]) -> str:
    for new, old in changes:
        name = name.replace(new, old)
    return name


def _judge_odd(case: Mapping, folder: Path) -> str:
    sound = write_folder(folder / "sound", saved=head(2, 1), labels={HEAD: ["x", "y"]})
    odd = folder / "odd"
    shutil.copytree(sound, odd)
    edited(odd, **case["config"])
    added = {
        case["prefix"] + name: torch.ones(shape).to(getattr(torch, dtype))
        for name, (shape, dtype) in case["tensors"].items()
    }
    save_file(load_file(odd / WEIGHTS) | added, odd / WEIGHTS, {"format": "pt"})
    for file, value in (("labels.json", case["labels"]), ("merge_report.json", case["report"])):
        if value is not None:
            (odd / file).write_text(json.dumps(value))
    for file, place, how, piece in case["damage"]:
        _damage(odd / file, place, how, piece)
    before = tree(folder)
    _, said = read(lambda: merge_adapters([sound, odd], folder / "out", method="average"))
    _, told = read(lambda: describe(odd))
    if said is not None:
        check(tree(folder) == before, "refused, and yet files have changed:", said)
        return REFUSED
    merged = load_file(folder / "out" / WEIGHTS)
    check(all(math.isfinite(float(value.double().abs().sum())) for value in merged.values()), "not finite")
    check(told is None, "it can be merged and not be looked at:", told)
    if not case["tensors"]:
        first, second, found = (_as_peft(path) for path in (sound, odd, folder / "out"))
        for name, matrix in found.items():
            wanted = (first[name] + second[name]) / 2
            size = float(first[name].norm() + second[name].norm())
            check(float((matrix - wanted).norm()) <= TOLERANCE * size, name, "is not the mean of the two")
    return RIGHT


def _damage(path: Path, place: int, how: str, piece: bytes) -> None:
    if not path.is_file():
        return
    content = path.read_bytes()
    at = place % (len(content) + 1)
    if how == "gone":
        path.unlink()
    else:
        path.write_bytes(
            content[:at] + {"put": piece + content[at:], "set": piece + content[at + len(piece) :], "cut": b""}[how]
        )


def _as_peft(folder: Path) -> dict[str, torch.Tensor]:
    """{module: update in float64} of plain names, scaled as PEFT reads the settings."""
    config, tensors, found = json.loads((folder / CONFIG).read_text()), load_file(folder / WEIGHTS), {}
    for name, B in tensors.items():
        if not name.endswith(".lora_B.weight"):
            continue
        module = name.removeprefix(PREFIX).removesuffix(".lora_B.weight")
        A, patterns = tensors[f"{PREFIX}{module}.lora_A.weight"], config.get("alpha_pattern") or {}
        matching = next((key for key in patterns if re.match(rf"(.*\.)?({key})$", module)), None)
        alpha = config["lora_alpha"] if matching is None else patterns[matching]
        rank = A.shape[0]
        found[module] = (B.double() @ A.double()) * alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return found
