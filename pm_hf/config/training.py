"""`training:`, typed and range-checked from the fields of TrainingArguments."""

import dataclasses
import enum
import json
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

from pydantic import Field
from typing_extensions import TypedDict  # pydantic's; typing's from Python 3.12 on

from pm_hf.config.typed import (
    MODEL,
    Anything,
    Choices,
    Flag,
    Keyed,
    Named,
    Number,
    Settings,
    Text,
    Whole,
    as_number,
    brief,
    join,
    nested_faults,
    options,
)

TAKEN = {int: Whole, float: Number, str: Text, bool: Flag, dict: Keyed, Any: Anything}

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
OWN_ABOUT: dict[str, dict[str, Any]] = {
    "head_learning_rate": {
        "help": "The learning rate of the classification head; null: learning_rate.",
        "default": None,
    }
}
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
    """The values in the types of their fields; what is wrong, or the learner's to decide, is left out and added to the
    problems.

    Integers of float fields stay integers, so that what was saved stays the same.
    """
    if not training:
        return {}
    settings = training_settings()
    known, managed = settings.json["properties"], sorted(MANAGED_ARGUMENTS & training.keys())
    unknown = sorted(join("", key if isinstance(key, str) else brief(key)) for key in training.keys() - known.keys())
    unknown = [name for name in unknown if name not in managed]
    if unknown:
        meant = ", ".join(dict.fromkeys(near for name in unknown for near in settings.meant(f"training.{name}", known)))
        guess = f"; did you mean {meant}?" if meant else ""
        problems.append(f"training: {', '.join(unknown)} are not fields of TrainingArguments{guess}")
    if managed:
        problems.append(f"training: {', '.join(managed)} are decided by pm_hf, which never uploads; remove them")
    read = settings.read({name: value for name, value in training.items() if name in known}, problems)
    values = {}
    for name in (name for name in training if name in read):
        takes_mapping = any(option.get("type") == "object" for option in options(known[name]))
        if told := _text_problems(name, read[name], takes_mapping):
            problems += told
        else:
            is_integer = isinstance(training[name], int) and isinstance(read[name], float)
            values[name] = training[name] if is_integer else read[name]
    return values


def _text_problems(name: str, value: Any, takes_mapping: bool) -> list[str]:
    """What is wrong with numbers inside a text: `key=value,key=value`, or JSON where a mapping is taken too."""
    if not isinstance(value, str) or not value:
        return []
    if name == "optim_args":
        if any(part.count("=") != 1 for part in value.split(",")):
            return [f"training.optim_args: expected key=value,key=value, found {brief(value)}"]
        inside: Any = [as_number(part.partition("=")[2].strip()) for part in value.split(",")]
        return [f"training.optim_args: {fault}" for _, fault in nested_faults(inside)]
    if not takes_mapping or not value.startswith("{"):
        return []
    try:
        return [f"training.{name}{place}: {fault}" for place, fault in nested_faults(json.loads(value))]
    except (ValueError, RecursionError):
        return [f"training.{name}: expected JSON, found {brief(value)}"]


@cache
def training_settings() -> Settings:
    """What `training:` may hold: the fields of TrainingArguments that are not the learner's, and OWN_FIELDS."""
    from transformers import TrainingArguments  # seconds

    hints = get_type_hints(TrainingArguments, include_extras=True) | OWN_FIELDS | WIDER
    settable = {}
    for argument in fields(TrainingArguments):
        if argument.name not in MANAGED_ARGUMENTS:
            settable[argument.name] = _field(argument.name, hints[argument.name], _about(argument))
    settable |= {name: _field(name, hint, OWN_ABOUT[name]) for name, hint in OWN_FIELDS.items()}
    typed_dict: Any = TypedDict
    kind = typed_dict("TrainingValues", settable, total=False)
    kind.__pydantic_config__ = MODEL
    return Settings(kind, "training")


def _field(name: str, hint: Any, metadata: Mapping) -> Any:
    """What YAML can say of a type: the values of an enum where the field takes its text too, no objects."""
    alternatives = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    texts = Annotated[str, Choices(tuple(choices))] if (choices := metadata.get("choices")) else Text
    has_enum = any(isinstance(option, type) and issubclass(option, enum.Enum) for option in alternatives)
    taken = [
        texts if option is str else _taken(option)
        for option in sorted(alternatives, key=lambda option: option is not str)  # a number in quotes stays text
        if not (is_dataclass(option) or option is NoneType or (option is str and has_enum))
    ]
    inner: Any = Union[tuple(taken)] if taken else None  # noqa: UP007
    if len(taken) > 1:
        inner = Annotated[inner, Field(union_mode="left_to_right")]
    limits: dict[str, Any] = dict(zip(("ge", "le"), RANGES[name], strict=True)) if name in RANGES else {}
    limits |= {"ge": 0, "lt": 1} if name in BELOW_ONE else {}
    nullable = Union[inner, None] if NoneType in alternatives else inner  # noqa: UP007
    default = {"default": metadata["default"]} if "default" in metadata else None
    return Annotated[nullable, Field(description=metadata.get("help"), json_schema_extra=default, **limits)]


def _about(argument: dataclasses.Field) -> dict[str, Any]:
    """What a field's metadata say, with its default where YAML can have it."""
    default = argument.default.value if isinstance(argument.default, enum.Enum) else argument.default
    plain = default is None or isinstance(default, bool | int | float | str)
    return {**argument.metadata} | ({"default": default} if plain else {})


def _taken(option: Any) -> Any:
    """A type of TrainingArguments as that of a setting."""
    if isinstance(option, type) and issubclass(option, enum.Enum):
        return Annotated[str, Choices(tuple(member.value for member in option))]
    if get_origin(option) is list:
        return list[_taken(get_args(option)[0])]  # type: ignore[misc]
    return Named if get_origin(option) is dict else TAKEN.get(option, option)
