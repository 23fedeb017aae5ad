"""What is asked of an adapter folder before it is read: its configuration, its targets, its biases, its labels."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from pm_hf.adapters.layout import ADAPTER_CONFIG, LABELS_FILE, Layout, peft_type
from pm_hf.files import is_number

# initialisations that leave the base weights alone, so that scaling·BA is all that the adapter adds
PLAIN_INITS = (True, False, "gaussian", "orthogonal", "eva", "mica")


# settings that only say where LoRA sits, how it was trained or who made it: the weights already tell
HARMLESS_SETTINGS = frozenset(
    (
        *("task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
        *("inference_mode", "r", "target_modules", "exclude_modules", "lora_alpha", "lora_dropout", "fan_in_fan_out"),
        *("bias", "use_rslora", "modules_to_save", "init_lora_weights", "layers_to_transform", "layers_pattern"),
        *("rank_pattern", "alpha_pattern", "megatron_config", "megatron_core", "runtime_config", "eva_config"),
        *("loftq_config", "corda_config", "lora_ga_config", "qalora_group_size", "ensure_weight_tying"),
        *("target_parameters", "lora_bias"),
        # of older versions and of other trainers: how it was trained
        *("merge_weights", "lora_dtype", "loraplus_lr_ratio", "loraplus_lr_embedding", "loraplus_weight_decay"),
        *("lorap_lr_ratio", "lorap_emb_lr"),
    )
)


QUOTED = 80  # characters of a value that a message quotes


# how AdaLoRA chose its ranks; what it learned is in the weights
ADALORA_SETTINGS = frozenset(
    ("init_r", "target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step")
)


SAVE_AS_LORA = (
    "load it with PEFT and call peft.save_as_lora(folder, model, rank=R), R an integer that holds the update (rank=1.0 "
    "cuts up to 3e-4 of its norm)"
)


DIFFERENCE = "subtract the base's weights from those of PeftModel.merge_and_unload() and factor the difference by SVD"


ADDITIVE = ("LOHA", "LOKR", "VERA", "RANDLORA", "FOURIERFT", "MISS", "VBLORA", "C3A", "DELORA")


NO_UPDATE = ("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "PREFIX_TUNING", "P_TUNING", "ADAPTION_PROMPT", "CPT", "XLORA")


INIT_WAYS_OUT = {
    "loftq": "name the quantised base that it was trained on as its base, with init_lora_weights: true",
    "pissa": "save it again with model.save_pretrained(folder, path_initial_model_for_weight_conversion=FIRST), FIRST "
    "the adapter as it was saved before training",
}


SETTING_WAYS_OUT = {
    "use_dora": "a DoRA update has full rank; train with use_dora=False",
    "use_qalora": "train with use_qalora=False",
    "kasa_config": f"it changes the base weights; {DIFFERENCE}",
    "use_bdlora": DIFFERENCE,
    "alora_invocation_tokens": "it acts on some tokens only; train a plain LoRA",
    "trainable_token_indices": "its rows are absolute values; train the embedding with LoRA or in modules_to_save",
    "layer_replication": "save the expanded base once and set layer_replication to null",
    "velora_config": SAVE_AS_LORA,
    "monteclora_config": SAVE_AS_LORA,
    "arrow_config": "it routes between adapters; merge the adapters that it routes to",
}


def config_problems(config: Mapping) -> list[str]:
    """Why this PEFT configuration is not a LoRA whose products are the whole update; empty if it is."""
    kind = peft_type(config)
    if "peft_type" not in config:
        return ["its configuration has no peft_type; expected LORA, as PEFT writes it"]
    if kind not in ("LORA", "ADALORA"):
        way_out = SAVE_AS_LORA if kind in ADDITIVE else f"it is no sum of low-rank products; {DIFFERENCE}"
        way_out = "it is no update of weights; train a LoRA" if kind in NO_UPDATE else way_out
        return [f"expected peft_type LORA, found {config.get('peft_type')}; {way_out}"]
    problems, init = [], config.get("init_lora_weights", True)
    if init is not None and (init.lower() if isinstance(init, str) else init) not in PLAIN_INITS:
        way_out = INIT_WAYS_OUT.get(str(init).lower(), INIT_WAYS_OUT["pissa"])
        problems.append(
            f"init_lora_weights={init!r} rewrites the base weights, so BA is not the task vector; {way_out}"
        )
    if (config.get("bias") or "none") != "none":
        problems.append(
            f"bias={config['bias']!r} trains the base's biases, which are saved as absolute values; train with "
            "bias='none', or with lora_bias=True"
        )
    harmless = HARMLESS_SETTINGS | ADALORA_SETTINGS if kind == "ADALORA" else HARMLESS_SETTINGS
    for key in sorted(key for key, value in config.items() if key not in harmless and value):
        setting = f"{key}={_shown(config[key])}"
        if key in SETTING_WAYS_OUT:
            problems.append(f"{setting} makes the update more than scaling·BA; {SETTING_WAYS_OUT[key]}")
        else:
            problems.append(
                f"{setting} is a setting that this pm_hf does not know; if it only concerned the training, remove it "
                f"from {ADAPTER_CONFIG}; if the layers compute more than scaling·BA by it, {DIFFERENCE}"
            )
    return problems


def type_problems(config: Mapping) -> list[str]:
    """Settings that a merge computes with and that have another type or value than PEFT gives them."""
    adalora = peft_type(config) == "ADALORA"
    wanted = {"init_r" if adalora else "r": _is_rank, "lora_alpha": is_number}
    problems = [f"has no {key!r}" for key in wanted if config.get(key) is None]
    checks = {
        key: (check, "a positive integer" if check is _is_rank else "a finite number") for key, check in wanted.items()
    }
    checks["alpha_pattern"] = (lambda value: _is_pattern(value, is_number), "{expression: number}")
    if not adalora:
        checks["rank_pattern"] = (lambda value: _is_pattern(value, _is_rank), "{expression: positive integer}")
    checks |= dict.fromkeys(("target_modules", "exclude_modules"), (_is_targets, "a list of names or an expression"))
    checks |= dict.fromkeys(("target_parameters", "modules_to_save"), (_is_names, "a list of names"))
    checks |= dict.fromkeys(("use_rslora", "lora_bias"), (_is_flag, "true or false"))
    checks["layers_to_transform"] = (_are_layers, "a layer's number or a list of numbers")
    checks["layers_pattern"] = (_are_expressions, "an expression or a list of them")
    checks |= dict.fromkeys(("base_model_name_or_path", "revision", "task_type"), (_is_text, "a text"))
    for key, (check, expected) in checks.items():
        value = config.get(key)
        if value is not None and not check(value):
            problems.append(f"says {key} {_shown(value)}, expected {expected}")
    return problems


def _shown(value: Any) -> str:
    """A value as a message quotes it; of a long one the beginning."""
    try:
        text = repr(value)
    except ValueError:  # an integer of thousands of digits
        text = f"an integer of {value.bit_length()} bits"
    return text if len(text) <= QUOTED else f"{text[:QUOTED]}…"


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def _is_rank(value: Any) -> bool:
    return is_number(value) and value > 0 and value == int(value)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_names(value: Any) -> bool:
    return isinstance(value, list | tuple | set) and all(isinstance(name, str) for name in value)


def _is_expression(value: Any) -> bool:
    try:
        re.compile(value)
    except (TypeError, re.error):
        return False
    return isinstance(value, str)


def _are_expressions(value: Any) -> bool:
    return all(map(_is_expression, value if isinstance(value, list | tuple) else [value]))


def _are_layers(value: Any) -> bool:
    return all(type(layer) is int for layer in (value if isinstance(value, list | tuple) else [value]))


def _is_targets(value: Any) -> bool:
    return _is_expression(value) or _is_names(value)


def _is_pattern(value: Any, check: Any) -> bool:
    return isinstance(value, Mapping) and all(_is_expression(key) and check(item) for key, item in value.items())


def target_problems(config: Mapping, layouts: Mapping[str, Layout], called: Mapping[str, tuple[str, str]]) -> list[str]:
    """Modules in the weights that the configuration does not target: PEFT would leave them out without a word.

    called: {module: (its name, that in the file)}; the configuration may mean either.
    """
    targets, excluded = config.get("target_modules"), config.get("exclude_modules")
    if config.get("ensure_weight_tying"):  # which adds modules by itself
        return []
    modules = [module for module, layout in layouts.items() if layout.kind != "fused"]
    every = targets is None or targets == "all-linear"

    def targeted(name: str) -> bool:
        """Whether PEFT adapts a module of this name."""
        meant = every or _named(name, targets or ())
        return meant and not (excluded and _named(name, excluded)) and _in_layers(name, config)

    outside = [module for module in modules if not any(map(targeted, called[module]))]
    return (
        [f"{len(outside)} modules are not in target_modules of {ADAPTER_CONFIG}, first {outside[0]}"] if outside else []
    )


def _named(module: str, names: str | Sequence[str]) -> bool:
    """PEFT's match of target_modules and exclude_modules: an expression for the whole name, or ends of it."""
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in names)


def _in_layers(module: str, config: Mapping) -> bool:
    """PEFT's match of layers_to_transform: the number after a layers_pattern, or after any name, in the module."""
    wanted, patterns = config.get("layers_to_transform"), config.get("layers_pattern")
    if wanted is None or wanted == []:
        return True
    patterns = [patterns] if isinstance(patterns, str) else patterns or [r"[^.]*"]
    layer = next((match for p in patterns if (match := re.match(rf"(?:.*?\.)?{p}\.(\d+)\.", module))), None)
    return layer is None or int(layer[1]) in ([wanted] if isinstance(wanted, int) else wanted)


def bias_problems(config: Mapping, layouts: Mapping[str, Layout]) -> list[str]:
    """What contradicts `lora_bias` in the weights."""
    wanted = bool(config.get("lora_bias"))
    odd = [m for m, layout in layouts.items() if layout.kind in ("linear", "conv") and layout.bias != wanted]
    fault = "lacks its lora_B.bias" if wanted else "has a lora_B.bias"
    return [f"{ADAPTER_CONFIG} says lora_bias {wanted}, but {odd[0]} {fault}"] if odd else []


def are_labels(names: object) -> bool:
    """Whether a value of labels.json names rows: a list of texts or numbers, or null for rows in one order in all."""
    return names is None or (isinstance(names, list) and all(isinstance(n, str) or _is_finite(n) for n in names))


def label_text(label: str | float | bool) -> str:
    """The text that a label stands for: 0 is "0", true is "true"."""
    return label if isinstance(label, str) else json.dumps(label)


def two_spellings(labels: Sequence) -> tuple | None:
    """Two labels that are the same number written in two ways (1 and true, 1 and 1.0); None where there are none."""
    numbers: dict = {}
    for label in labels:
        if not isinstance(label, str) and type(numbers.setdefault(label, label)) is not type(label):
            return numbers[label], label
    return None


def label_problems(labels: Mapping[str, list | None], shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """What is wrong with labels.json: another number of rows than the head has, or one label written in two ways."""
    problems = []
    for head, names in labels.items():
        own = {name: shape for name, shape in shapes.items() if name.rpartition(".")[0] == head and shape}
        rows = {name: shape[0] for name, shape in own.items() if len(shape) > 1 or name.endswith(".bias")}
        if not rows:
            below = sorted({name.rpartition(".")[0] for name in shapes if name.startswith(f"{head}.")})
            inside = f"; its modules are {', '.join(below)}" if below else ""
            named = head if names is None else f"{len(names)} labels for {head}"
            problems.append(f"{LABELS_FILE} names {named}, which has 0 rows in the adapter{inside}")
            continue
        if names is None:
            continue
        problems += [
            f"{LABELS_FILE} names {len(names)} labels for {head}, which has {count} rows in {name}"
            for name, count in rows.items()
            if count != len(names)
        ][:1]
        texts: dict[str, Any] = {}
        same = [(texts.setdefault(label_text(name), name), name) for name in names]
        mixed = [pair for pair in same if type(pair[0]) is not type(pair[1])]
        if pair := two_spellings(names) or next(iter(mixed), None):
            first, second = map(json.dumps, pair)
            problems.append(
                f"{LABELS_FILE} names one label of {head} in two ways, {first} and {second}; write every label as the "
                "text it stands for"
            )
    return problems


def _is_finite(value: object) -> bool:
    return isinstance(value, int) or (isinstance(value, float) and math.isfinite(value))
