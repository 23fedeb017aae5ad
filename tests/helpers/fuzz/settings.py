"""Settings: valid ones in any spelling are what was meant, odd ones are read by their plain meaning or refused, any
text is what yaml.safe_load makes of it or refused."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from hypothesis import strategies as st

from helpers.fuzz import REFUSED, RIGHT, check, read
from pm_hf.config.loading import load_config, run_settings, save_config
from pm_hf.config.presets import PRESETS
from pm_hf.config.schema import RunConfig
from pm_hf.config.typed import LARGEST
from pm_hf.config.yaml_text import read_yaml
from pm_hf.training.task_trainer import training_arguments

BASE = {"output_dir": "out", "model.base": "tiny", "stream.class_groups": 2}
YAML_ALIKE = ["007", "1e3", "1.50", "no", "null", "~", "2026-01-02", "0x1f", "1_000", "1:30", "true", "", "=", "<<"]
YAML_ALIKE += ["- a", "a: b", "# a", " a ", "é\n", "\t", "\u2028", "{a}", "*a", "&a", "!a", "%", "@", "|", "'", '"']
TEXTS = st.sampled_from(YAML_ALIKE) | st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"))
NAMES = TEXTS.filter(lambda text: text.strip() != "")
FILES = st.sampled_from(["a.csv", "~/x", "a b/ä", "1e3", "2026-01-02", "no", "[x]", "a: b", "-", "x~y", "'"])


def _share(low: float = 0.0, high: float = 1.0) -> st.SearchStrategy:
    return st.floats(low, high, exclude_min=True, exclude_max=True, allow_subnormal=False)


# settings that are valid beside each other, whatever the others are
VALID = {
    **dict.fromkeys(("output_dir", "model.base", "data_dir", "start_from", "stream.train", "stream.test"), FILES),
    **dict.fromkeys(("model.revision", "stream.text_column", "stream.label_column", "stream.train_split"), TEXTS),
    **dict.fromkeys(("stream.train_per_class", "stream.train_rows", "stream.test_rows"), st.integers(1, LARGEST)),
    **dict.fromkeys(("stream.shared_labels", "model.trust_remote_code", "head.strict"), st.booleans()),
    "lora.use_rslora": st.booleans(),
    "seed": st.integers(0, 2**32 - 1),
    "model.dtype": st.sampled_from(["float32", "bfloat16", "float16"]),
    "model.quantization": st.sampled_from(["nf4", "int8"]),
    "model.attn_implementation": st.sampled_from(["eager", "sdpa"]),
    "lora.init_lora_weights": st.sampled_from([True, "gaussian"]),
    "stream.max_length": st.integers(1, 10**6),
    "stream.eval_share": _share(),
    "stream.order": st.lists(TEXTS, max_size=3),
    "lora.r": st.integers(1, 8192),
    "lora.alpha": st.integers(1, LARGEST),
    "lora.dropout": _share(),
    "lora.target_modules": st.lists(NAMES, min_size=1, max_size=3),
    "perturbation.scale": _share(),
    "curvature.samples": st.integers(1, 10**9),
    "curvature.shrinkage": _share(),
    "curvature.max_gib": st.floats(1e-9, 1e9),
    "curvature.labels": st.sampled_from(["empirical", "mc"]),
    "merge.max_rank": st.none() | st.integers(1, 10**9),
    "merge.coefficient": _share(),
    "max_forgetting": st.floats(-1, 1),
    "head.ridge": st.floats(1e-9, 1e9),
    "strategy.replay_per_class": st.integers(0, 10**9),
    "strategy.base_samples": st.integers(0, 10**9),
    "training.learning_rate": st.floats(0, 1e9),
    "training.num_train_epochs": st.floats(0, 1e9) | st.integers(0, 10**9),
    "training.max_steps": st.integers(-1, 10**9),
    "training.weight_decay": st.floats(0, 1e8),
    "training.per_device_train_batch_size": st.integers(1, 10**9),
    "training.gradient_accumulation_steps": st.integers(1, 10**9),
    "training.adam_beta1": _share(),
    "training.label_smoothing_factor": st.floats(0, 1),
    "training.max_grad_norm": st.floats(0, 1e9),
    "training.lr_scheduler_type": st.sampled_from(["linear", "cosine", "constant"]),
    "training.run_name": TEXTS,
    "training.gradient_checkpointing": st.booleans(),
}
SPLITS = st.one_of(
    st.fixed_dictionaries({"stream.class_groups": st.integers(1, 10**6) | st.dictionaries(NAMES, st.lists(NAMES))}),
    st.fixed_dictionaries({"stream.domain_column": TEXTS}),
    st.fixed_dictionaries(
        {"stream.tasks": st.lists(st.fixed_dictionaries({"name": NAMES}, optional={"train": FILES}), max_size=3)}
    ),
)
WAYS = st.sampled_from(["block", "flow", "marked", "windows", "overrides", "values"])

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**30), 10**30),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(["1e-3", "nan", "~nosuchuser", "a\0b", "pm", "best", "(", "no", "10", LARGEST + 1, -0.0]),
    st.sampled_from(["(a|a)*b", "x" * 300, "\ud800", "{", "{}", '{"a": 1}', "a=1,b=2", "a=", 10**400, "text", "steps"]),
)
VALUES = st.recursive(
    SCALARS, lambda v: st.lists(v, max_size=3) | st.dictionaries(SCALARS, v, max_size=3), max_leaves=8
)


TRAINING = ("learning_rate", "head_learning_rate", "num_train_epochs", "max_steps", "lr_scheduler_kwargs", "optim")
TRAINING += ("optim_args", "optim_target_modules", "report_to", "fsdp", "fsdp_config", "debug", "zebra", "bf16")
TRAINING += ("adam_beta2", "warmup_steps", "save_strategy", "save_steps", "logging_steps", "eval_strategy", "deepspeed")
TRAINING += ("lr_scheduler_type", "per_device_train_batch_size", "accelerator_config", "neftune_noise_alpha", "seed")
ODD_NAMES = st.sampled_from(
    [*(name for name, _ in run_settings().walk()), *(f"training.{name}" for name in TRAINING), "zebra"]
)
METHODS = st.fixed_dictionaries({}, optional={"method": st.sampled_from([*PRESETS, "zebra"])})

LINES = ["output_dir: out", "model: {base: tiny}", "stream: {class_groups: 2}", "seed: 3", "lora: &l {r: 2}"]
LINES += ["training: &t\n  max_steps: 2", "curvature: {<<: {samples: 3}, labels: mc}"]
TAILS = st.lists(st.sampled_from(["head: {<<: *l}", "merge: *t", "perturbation: &p {scale: 0.5}", "x: *l"]), max_size=1)
PIECES = ["&a ", "*a", "[", "]", "{", "}", ": ", "- ", "\n", "  ", "\t", "'", '"', "!!int ", "!!timestamp ", "!!set "]
PIECES += ["? ", "|", "!!omap ", "!!binary ", "!!pairs ", "!!float ", "!!bool ", "!!str ", "!!null ", "---\n", "%", "~"]
PIECES += ["9" * 5000, "0x" + "f" * 300, ".nan", "2026-13-45", "1:30", "\0", "[" * 200, "<<: ", "é", "\u2028", "0b1"]
PIECES += [
    "!!python/name:os.system ",
    "b0: &b0 [x,x]\nb1: &b1 [*b0,*b0]\n",
    ".inf",
    "-0o7",
    "\x85",
    "\ufeff",
]
WHOLE = ["x: {a: 1, b: [2, ~], c: 1e3, d: 0x10, e: 1_0, f: 1:30, g: .5, h: 1., i: yes}", "z: 2026-01-02", "007: 08"]
WHOLE += ["y: 2026-01-02 10:00:00", "seed: 2026-01-02", "u: 'it''s'", "v: |\n  a\n\n  b", "w: >-\n a\n b", "t: !!str 1"]
WHOLE += [
    "s: &s [1, {a: *s}]",
    "r: !!binary YQ==",
    "q: !!set {a, b}",
    "p: {<<: [{a: 1}, {b: 2}], a: 3}",
    'o: "\\u00e9"',
    "? a\n: b",
]
PLACES = st.tuples(st.integers(0, 200), st.just(False), st.sampled_from(PIECES)) | st.tuples(
    st.integers(0, 200),
    st.just(True),  # at a line's begin
    st.sampled_from([f"{line}\n" for line in WHOLE]),
)

CASES = st.one_of(
    st.fixed_dictionaries(
        {
            "settings": st.fixed_dictionaries({}, optional=VALID),
            "split": SPLITS,
            "spellings": st.lists(st.sampled_from(["plain", "text", "float"]), min_size=1, max_size=5),
            "way": WAYS,
        }
    ),
    st.fixed_dictionaries(
        {"changes": st.dictionaries(ODD_NAMES, VALUES, max_size=4), "method": METHODS, "way": st.just("values") | WAYS}
    ),
    st.fixed_dictionaries(
        {
            "lines": st.permutations(LINES),
            "tail": st.just([]) | TAILS,
            "pieces": st.lists(PLACES, max_size=3),
            "bytes": st.lists(st.tuples(st.integers(0, 200), st.binary(max_size=2)), max_size=1),
        }
    ),
)


def judge(case: Mapping, folder: Path) -> str:
    """RIGHT or REFUSED; SilentError for another value than that of the reference."""
    if "lines" in case:
        return _judge_text(case, folder)
    return _judge_valid(case, folder) if "split" in case else _judge_odd(case, folder)


def _judge_valid(case: Mapping, folder: Path) -> str:
    meant = BASE | case["settings"]
    if "stream.class_groups" not in case["split"]:
        del meant["stream.class_groups"]
    meant |= case["split"]
    spellings = case["spellings"]
    given = {name: _spelled(v, spellings[i % len(spellings)]) for i, (name, v) in enumerate(meant.items())}
    given |= case["split"]  # a number in quotes is a file's name there
    config, said = read(lambda: _load(given, case["way"], folder))
    check(said is None, "valid settings are refused:", said, given)
    for name, value in meant.items():
        found = _value(config, name)
        check(found == value or (name == "stream.tasks" and _tasks(found, value)), name, "is", found, "not", value)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        check(number or type(found) is type(value), name, "is a", type(found), "not a", type(value))
    if "lora.r" in meant and "lora.alpha" not in meant:
        check(config.lora.alpha == 2 * meant["lora.r"], "lora.alpha is", config.lora.alpha, "of rank", meant["lora.r"])
    _comes_back(config, folder)
    return RIGHT


def _judge_odd(case: Mapping, folder: Path) -> str:
    changes = {**BASE, **case["method"], **case["changes"]}
    config, said = read(lambda: _load(changes, case["way"], folder))
    if config is None:
        return REFUSED
    for name, value in case["changes"].items():
        below = any(other.startswith(f"{name}.") for other in changes)
        check(value is None or below or _means(_value(config, name), value), name, "is", _value(config, name), value)
    _comes_back(config, folder)
    _, said = read(lambda: training_arguments(config, folder / "run", 0))
    return RIGHT if said is None else REFUSED


def _judge_text(case: Mapping, folder: Path) -> str:
    text = "\n".join([*case["lines"], *case["tail"]])
    for place, begin, piece in case["pieces"]:
        place = text.rfind("\n", 0, place) + 1 if begin else place
        text = text[:place] + piece + text[place:]
    content = text.encode()
    for place, piece in case["bytes"]:
        content = content[:place] + piece + content[place + 1 :]
    path = folder / "any.yaml"
    path.write_bytes(content)
    value, said = read(lambda: read_yaml(path))
    if said is None:
        check(_same(value, yaml.load(content.decode("utf-8-sig"), _WithoutDates)), "read as", repr(value), content)
    config, said = read(lambda: load_config(path))
    if config is None:
        check(said is not None and said.startswith(f"config {path}"), said)
        return REFUSED
    _comes_back(config, folder)
    return RIGHT


class _WithoutDates(yaml.SafeLoader):
    """yaml.safe_load, but for dates, which are no settings."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith("timestamp")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


def _same(left: Any, right: Any) -> bool:
    """Equality in which NaN is itself."""
    return repr(left) == repr(right)


def _spelled(value: Any, how: str) -> Any:
    """A number in another spelling: as text, a whole one with a point."""
    if isinstance(value, bool) or not isinstance(value, int | float) or how == "plain":
        return value
    if how == "text":
        return str(value)
    return float(value) if isinstance(value, int) and float(value) == value else value


def _load(settings: Mapping[str, Any], way: str, folder: Path) -> RunConfig:
    """The settings by one of the ways that a user has."""
    if way == "values":
        return load_config({}, values=settings)
    if way == "overrides":
        inline = {name: yaml.safe_dump(value, default_flow_style=True, width=10**9) for name, value in settings.items()}
        return load_config({}, [f"{name}={text.removesuffix('...' + chr(10))}" for name, text in inline.items()])
    nested: dict = {}
    for name, value in settings.items():
        *parents, last = name.split(".")
        place = nested
        for parent in parents:
            place = place.setdefault(parent, {})
            if not isinstance(place, dict):  # a group that is a value too: it cannot be written
                return load_config({}, values=settings)
        place[last] = value
    text = yaml.safe_dump(nested, default_flow_style=way == "flow", allow_unicode=True, sort_keys=False)
    if "\x85" in text:  # which PyYAML writes and does not read back
        text = yaml.safe_dump(nested, default_flow_style=way == "flow", sort_keys=False)
    path = folder / "c.yaml"
    content = ("\ufeff" if way == "marked" else "") + (text.replace("\n", "\r\n") if way == "windows" else text)
    path.write_bytes(content.encode("utf-8", "surrogatepass"))
    return load_config(path)


def _value(config: RunConfig, name: str) -> Any:
    place: Any = config
    for part in name.split("."):
        place = place.get(part) if isinstance(place, dict) else getattr(place, part, None)
    return place


def _means(found: Any, given: Any) -> bool:
    """Whether a setting is what was given, by its plain meaning: itself, or its number."""
    if isinstance(given, Mapping) and not isinstance(found, Mapping):
        return all(value is None or _means(getattr(found, str(key), None), value) for key, value in given.items())
    if isinstance(given, Mapping):
        return all(value is None or _means(found.get(key), value) for key, value in given.items())
    if isinstance(given, list) and isinstance(found, list):
        return len(found) == len(given) and all(map(_means, found, given))
    if isinstance(given, bool) or isinstance(found, bool) or found is None:
        return found is given
    if isinstance(found, int | float):
        return float(found) == float(given)
    return type(found) is type(given) and found == given


def _tasks(found: list, meant: list) -> bool:
    return len(found) == len(meant) and all(
        (task.name, task.train) == (wanted["name"], wanted.get("train"))
        for task, wanted in zip(found, meant, strict=True)
    )


def _comes_back(config: RunConfig, folder: Path) -> None:
    """Settings mean themselves, as they are and as a run saves them."""
    check(load_config(config) == config, "read back as another:", config)
    save_config(config, folder / "config.yaml")
    check(load_config(folder / "config.yaml") == config, "saved as another:", config)
