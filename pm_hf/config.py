"""The run's settings: defaults < method < YAML < command line, checked as a whole before anything runs."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from pm_hf.checks import value_problems
from pm_hf.errors import InputError, raise_all
from pm_hf.files import write_text
from pm_hf.settings import LANGUAGE, RunConfig, StrategySettings
from pm_hf.typed import build, fill, number, pairs, parsed, plain, put


def _method(
    merge: str, scale: float, kind: str | None, freedom: str, head: str, max_rank: int | None = 64, **strategy: Any
) -> dict:
    return {
        "merge": {"method": merge, "freedom": freedom, "max_rank": max_rank},
        "perturbation": {"scale": scale},
        "curvature": {"kind": kind},
        "head": {"kind": head},
        "strategy": asdict(StrategySettings(**strategy)),
        "trains": True,
    }


def _sequential(kind: str | None = None, head: str = "linear", **strategy: Any) -> dict:
    """Every task counts in full and nothing is truncated: that would look like forgetting."""
    return _method("sequential", 0.0, kind, "global", head, max_rank=None, **strategy)


# what each method of a stream sets where the YAML is silent
METHODS = {
    "sequential": _sequential(),
    "average": _method("average", 0.0, None, "global", "linear"),
    "coma": _method("coma", 0.0, None, "global", "linear"),
    "merge_only": _method("pm", 0.0, "fisher", "global", "linear"),
    "pm": _method("pm", 0.5, "fisher", "global", "linear"),
    # each task's Fisher over its mean entry, so that tasks weigh alike whatever the size of their gradients
    "pm_trace": _method("pm", 0.5, "fisher", "global", "linear")
    | {"curvature": {"kind": "fisher", "normalisation": "trace"}},
    "pm_gram": _method("pm", 0.5, "gram", "free", "linear"),
    "pm_gram_lda": _method("pm", 0.5, "gram", "free", "lda"),
    # chosen on held-out training rows, results/factorial
    "best": _method("pm", 0.0, "fisher", "global", "lda")
    | {
        "head": {"kind": "lda", "training": "seen"},
        "merge": {"method": "pm", "freedom": "global", "max_rank": 64, "on_zero_curvature": "average"},
    },
    "frozen": _sequential(head="lda") | {"trains": False},
    "cofima": _method("cofima", 0.0, "fisher", "global", "linear"),
    "magmax": _method("magmax", 0.0, None, "global", "linear"),
    "opcm": _method("opcm", 0.0, None, "global", "linear"),
    "slao": _method("slao", 0.0, None, "global", "linear", max_rank=None),
    # λ and labels drawn from the model as in its paper: of a fitted task the data's own labels leave no Fisher
    "ewc": _sequential("fisher", ewc_weight=400.0) | {"curvature": {"kind": "fisher", "labels": "mc"}},
    "olora": _sequential(olora_weight=0.5),
    "base_kl": _sequential(base_kl_weight=1.0),
    "sfa": _sequential(averaging_period=0.25),
    "replay": _sequential(replay_per_class=5),
    "joint": _sequential(joint=True),
    "individual": _sequential(individual=True),
}


# what may change when a finished run is continued; the data of finished tasks is compared by its fingerprint
FREE_KEYS = (
    *("output_dir", "data_dir", "max_forgetting", "training.report_to", "training.run_name"),
    *("stream.tasks", "stream.class_groups", "stream.domain_column"),
)


def load_config(
    source: str | Path | Mapping | RunConfig, overrides: Sequence[str] = (), values: Mapping[str, Any] | None = None
) -> RunConfig:
    """Read YAML (or a mapping), apply overrides, fill in the method's settings, check everything.

    overrides: `key=value`, `--key value` and `--flag` as typed on a command line; values: {dotted key: value}.
    Raises one InputError that lists every unknown key, wrong type and impossible value.
    """
    raw, name = _read(source)
    problems: list[str] = []
    changes = {key: parsed(text) for key, text in pairs(overrides, problems)} | plain(values or {})
    _forget_method(raw, changes.get("method"))
    if changes.get("method") in (None, raw.get("method")):
        _as_saved(raw)
    for key, value in changes.items():
        put(raw, key, value, problems)
    method = raw.get("method", RunConfig.method)
    if not isinstance(method, str) or method not in METHODS:
        problems.append(f"method: unknown {method!r}; valid: {', '.join(METHODS)}")
        method = RunConfig.method  # so that the other problems are found too
    if isinstance(raw.get("stream"), dict) and raw["stream"].get("kind") in LANGUAGE:
        fill(raw, {"head": {"kind": "none"}})
    fill(raw, _defaults(method, raw))
    config = build(RunConfig, raw, "", problems)
    if config.stream.scenario is None:
        config.stream.scenario = "domain_incremental" if config.stream.domain_column else "class_incremental"
    if config.head.kind == "lda" and config.head.means is None:
        config.head.means = "task" if config.stream.scenario == "domain_incremental" else "class"
    config.training = {key: number(value) for key, value in config.training.items()}
    raise_all(problems + value_problems(config), name)
    return config


def save_config(config: RunConfig, path: Path) -> None:
    """Write the resolved settings as YAML."""
    write_text(path, config_text(config))


def config_text(config: RunConfig) -> str:
    """The resolved settings as YAML."""
    return yaml.safe_dump(config.to_dict(), sort_keys=False, allow_unicode=True)


def _defaults(method: str, raw: Mapping) -> dict:
    """What the method sets; how the analytic head is trained only where there is one."""
    row, head = METHODS[method], raw.get("head")
    asked = head.get("kind") if isinstance(head, Mapping) else None
    return row if asked in (None, "lda") else row | {"head": {"kind": row["head"]["kind"]}}


def _as_saved(raw: dict) -> None:
    """A run's own config.yaml, which has every setting, of before there were some: they mean what was done then."""
    head = raw.get("head")
    if isinstance(head, dict) and {"drift", "ridge", "strict"} <= head.keys() and "training" not in head:
        head |= {"training": "task"} | ({"means": "class"} if head.get("kind") == "lda" else {})


def _forget_method(raw: dict, method: Any) -> None:
    """Another method is asked for: settings that equal the old method's defaults are the new method's to decide."""
    before = raw.get("method", RunConfig.method)
    old = METHODS.get(before) if isinstance(before, str) else None
    if old is None or method is None or method == before:
        return
    for group, defaults in old.items():
        if not isinstance(defaults, dict):
            raw.pop(group, None)
        elif isinstance(raw.get(group), dict):
            raw[group] = {k: v for k, v in raw[group].items() if k not in defaults or v != defaults[k]}


def _read(source: str | Path | Mapping | RunConfig) -> tuple[dict, str]:
    if isinstance(source, RunConfig):
        return source.to_dict(), "config"
    if isinstance(source, Mapping):
        return plain(source), "config"
    path = Path(source)
    if not path.is_file():
        raise InputError(f"config {path} does not exist")
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise InputError(f"config {path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(raw, dict):
        raise InputError(f"config {path}: expected a mapping of settings, found {type(raw).__name__}")
    return raw, f"config {path}"


def differing_keys(finished: Mapping, now: Mapping, path: str = "") -> list[str]:
    """Settings that contradict those of the finished part of a run."""
    found = []
    for key in [*finished, *(key for key in now if key not in finished)]:
        name, old, new = f"{path}{key}", finished.get(key), now.get(key)
        if name in FREE_KEYS or old == new:
            continue
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found += differing_keys(old, new, name + ".")
        else:
            found.append(f"{name}: {old!r} in the finished run, {new!r} now")
    return found
