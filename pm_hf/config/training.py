"""`training:`, typed and range-checked from the fields of TrainingArguments."""

import enum
import json
import types
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

from pm_hf.config.typed import as_number, brief, convert, join, nested_faults

# TrainingArguments that the learner decides itself
MANAGED_ARGUMENTS = frozenset(
    (
        *("output_dir", "seed", "data_seed", "task_index", "label_names", "remove_unused_columns", "save_only_model"),
        *("perturbation_scale", "perturbation_probabilities", "perturbation_adapter", "resume_from_checkpoint"),
        *("do_train", "do_eval", "do_predict", "push_to_hub", "hub_token", "hub_model_id", "hub_strategy"),
        *("hub_private_repo", "hub_always_push", "hub_revision"),
    )
)

# what PMConfig adds to them and `training` may set
OWN_FIELDS = {"head_learning_rate": float | None}
WIDER = {"fsdp": bool | str | list[str] | None}  # fields that take more than their annotation says


def _of(low: float, high: float | None, *names: str) -> dict[str, tuple[float, float | None]]:
    return dict.fromkeys(names, (low, high))


# {field: (least, most)} of numbers, both possible values; None: no limit but that of all numbers
RANGES = {
    **_of(1, None, "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"),
    **_of(1, None, "torch_empty_cache_steps", "eval_accumulation_steps"),
    **_of(1, None, "ddp_bucket_cap_mb"),
    **_of(0, None, "learning_rate", "head_learning_rate", "adam_epsilon", "max_grad_norm"),
    **_of(0, None, "warmup_steps", "logging_steps", "eval_steps", "save_steps", "eval_delay", "save_total_limit"),
    **_of(0, None, "neftune_noise_alpha"),
    **_of(-1, None, "max_steps", "local_rank"),
    **_of(0, 10**8, "weight_decay"),  # times a learning rate it is a float32 still
    **_of(0, 1, "label_smoothing_factor"),
    **_of(0, 10**9, "num_train_epochs"),
    **_of(1, 10**9, "ddp_timeout"),  # seconds
    **_of(0, 1024, "dataloader_num_workers"),
    **_of(1, 1024, "dataloader_prefetch_factor"),
}
BELOW_ONE = ("adam_beta1", "adam_beta2")  # in [0, 1)


def training_values(training: Mapping[Any, Any], problems: list[str]) -> dict[str, Any]:
    """The values in the types of their fields, those of the learner left as they are; what is wrong is left out and
    added to the problems.

    Integers of float fields stay integers, so that what was saved stays the same.
    """
    if not training:
        return {}
    known = _hints()
    unknown = [join("", key) for key in training if key not in known]
    if unknown:
        problems.append(f"training: {', '.join(sorted(unknown))} are not fields of TrainingArguments")
    values = {}
    for name, given in training.items():
        if name in unknown or name not in known:
            continue
        before, value = len(problems), given
        if name not in MANAGED_ARGUMENTS:
            value = convert(known[name], given, f"training.{name}", problems)
            if isinstance(given, int) and isinstance(value, float):
                value = given
            if isinstance(value, str) and value.startswith("{") and dict in map(_kind, get_args(known[name])):
                problems += _json_problems(name, value)
            problems += [] if len(problems) > before else _range_problems(name, value)
        if len(problems) == before:
            values[name] = value
    managed = sorted(MANAGED_ARGUMENTS & values.keys())
    if managed:
        problems.append(f"training: {', '.join(managed)} are decided by pm_hf, which never uploads; remove them")
    return values


def _kind(hint: Any) -> Any:
    return get_origin(hint) or hint


def _json_problems(name: str, text: str) -> list[str]:
    """What is wrong with a mapping that stands as JSON in a text, as TrainingArguments takes it."""
    try:
        return list(nested_faults(json.loads(text), f"training.{name}"))
    except (ValueError, RecursionError):
        return [f"training.{name}: expected JSON, found {brief(text)}"]


def _range_problems(name: str, value: Any) -> list[str]:
    if name == "optim_args" and value:
        settings = [part.partition("=")[2].strip() for part in value.split(",")]
        if any(part.count("=") != 1 for part in value.split(",")):
            return [f"training.optim_args: expected key=value,key=value, found {brief(value)}"]
        problems = list[str]()
        for number in settings:
            convert(Any, as_number(number), "training.optim_args", problems)
        return problems
    if isinstance(value, bool) or not isinstance(value, int | float):
        return []
    if name in BELOW_ONE:
        return [] if 0 <= value < 1 else [f"training.{name}: must be in [0, 1), found {brief(value)}"]
    low, high = RANGES.get(name, (None, None))
    if low is None or low <= value <= (value if high is None else high):
        return []
    limits = f"at least {low:g}" if high is None else f"in [{low:g}, {high:g}]"
    return [f"training.{name}: must be {limits}, found {brief(value)}"]


@cache
def _hints() -> dict[str, Any]:
    """{field: its type}, with the choices of fields that have some."""
    from transformers import TrainingArguments  # seconds

    hints = get_type_hints(TrainingArguments, include_extras=True)
    typed = {field.name: _settable(hints[field.name], field.metadata) for field in fields(TrainingArguments)}
    return typed | dict.fromkeys(MANAGED_ARGUMENTS, Any) | OWN_FIELDS | WIDER


def _settable(hint: Any, metadata: Mapping) -> Any:
    """What YAML can say of a type: the values of an enum where the field takes its text too, no objects."""
    options = list(get_args(hint)) if get_origin(hint) in (Union, types.UnionType) else [hint]
    if choices := metadata.get("choices"):
        options = [Annotated[str, tuple(choices)] if option is str else option for option in options]
    if any(isinstance(option, type) and issubclass(option, enum.Enum) for option in options):
        options.remove(str)
    return Union[tuple(option for option in options if not is_dataclass(option))]  # noqa: UP007
