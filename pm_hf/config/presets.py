"""Presets: what `method:` of a run's YAML sets where the YAML is silent."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from pm_hf.config.kinds import STREAM_KINDS, StreamKind
from pm_hf.config.schema import RunConfig, StrategySettings, StreamSettings


def _preset(
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
    return _preset("sequential", 0.0, kind, "global", head, max_rank=None, **strategy)


# what each method of a stream sets where the YAML is silent
PRESETS = {
    "sequential": _sequential(),
    "average": _preset("average", 0.0, None, "global", "linear"),
    "coma": _preset("coma", 0.0, None, "global", "linear"),
    "merge_only": _preset("pm", 0.0, "fisher", "global", "linear"),
    "pm": _preset("pm", 0.5, "fisher", "global", "linear"),
    # each task's Fisher over its mean entry, so that tasks weigh alike whatever the size of their gradients
    "pm_trace": _preset("pm", 0.5, "fisher", "global", "linear")
    | {"curvature": {"kind": "fisher", "normalisation": "trace"}},
    "pm_gram": _preset("pm", 0.5, "gram", "free", "linear"),
    "pm_gram_lda": _preset("pm", 0.5, "gram", "free", "lda"),
    # chosen on held-out training rows, results/ablation
    "best": _preset("pm", 0.0, "fisher", "global", "lda") | {"head": {"kind": "lda", "training": "seen"}},
    "frozen": _sequential(head="lda") | {"trains": False},
    "cofima": _preset("cofima", 0.0, "fisher", "global", "linear"),
    "magmax": _preset("magmax", 0.0, None, "global", "linear"),
    "opcm": _preset("opcm", 0.0, None, "global", "linear"),
    "slao": _preset("slao", 0.0, None, "global", "linear", max_rank=None),
    # λ and labels drawn from the model as in its paper: of a fitted task the data's own labels leave no Fisher
    "ewc": _sequential("fisher", ewc_weight=400.0) | {"curvature": {"kind": "fisher", "labels": "mc"}},
    "olora": _sequential(olora_weight=0.5),
    "base_kl": _sequential(base_kl_weight=1.0),
    "sfa": _sequential(averaging_period=0.25),
    "replay": _sequential(replay_per_class=5),
    "joint": _sequential(joint=True),
    "individual": _sequential(individual=True),
}


# what a method sets for a kind of stream without class heads where that is something else; chosen on held-out training
# rows, results/rehearsal
_REHEARSED = _preset("average", 0.0, None, "global", "none", replay="generated")
LANGUAGE_PRESETS = {"best": {**_REHEARSED, "merge": {**_REHEARSED["merge"], "coefficient": 1.0}}}


def kind_of(raw: Mapping) -> StreamKind:
    """The kind of stream asked for; the default's row for one that does not exist, so that other problems are found."""
    stream = raw.get("stream")
    kind = stream.get("kind") if isinstance(stream, Mapping) else None
    return STREAM_KINDS[kind if isinstance(kind, str) and kind in STREAM_KINDS else StreamSettings.kind]


def preset_notes(config: RunConfig) -> list[str]:
    """What a method, or a setting, cannot do for the kind of stream that it was asked for."""
    notes, row = [], preset_row(config.method, config.kind)
    if config.rehearses and config.strategy.base_samples and config.stream.kind == "seq2seq-lm":
        notes.append("strategy.base_samples is left out: an encoder-decoder says nothing of its own without an input")
    if config.kind.has_head or config.analytic_head or row["head"]["kind"] != "lda":
        return notes
    return [
        *notes,
        f"method {config.method} is for classifiers: {config.stream.kind} has no class head, so its analytic head is "
        f"left out and its merge is all that remains; the default here is {config.kind.method}",
    ]


def preset_row(method: str, kind: StreamKind) -> dict:
    """What the method sets for a kind of stream."""
    return PRESETS[method] if kind.has_head else LANGUAGE_PRESETS.get(method, PRESETS[method])


def preset_defaults(method: str, raw: Mapping) -> dict:
    """What the method sets; how the analytic head is trained only where there is one. A language model has no head, and
    its answers are analytic only where it is not trained."""
    kind, head = kind_of(raw), raw.get("head")
    row = preset_row(method, kind)
    if not kind.has_head and row["trains"]:
        return row | {"head": {"kind": "none"}}
    asked = head.get("kind") if isinstance(head, Mapping) else None
    return row if asked in (None, "lda") else row | {"head": {"kind": row["head"]["kind"]}}


def forget_preset(raw: dict, method: Any) -> None:
    """Another method is asked for: settings that equal the old method's defaults are the new method's to decide."""
    before = raw.get("method") or kind_of(raw).method
    if not isinstance(before, str) or before not in PRESETS or method in (None, before):
        return
    for group, defaults in preset_defaults(before, raw).items():
        if not isinstance(defaults, dict):
            raw.pop(group, None)
        elif isinstance(raw.get(group), dict):
            raw[group] = {k: v for k, v in raw[group].items() if k not in defaults or v != defaults[k]}
