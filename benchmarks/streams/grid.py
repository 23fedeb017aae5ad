"""What the suite runs: streams, methods with the changes that make them, presets. Nothing here computes anything."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

NAMES = {
    "sequential": "sequential LoRA (α = 1)",
    "average": "running mean (α = 1/t)",
    "coma": "CoMA (α = 0.4)",
    "cofima": "CoFiMA (λ = 0.4)",
    "magmax": "MagMax",
    "opcm": "OPCM",
    "slao": "SLAO",
    "sfa": "SFA",
    "ewc": "EWC",
    "olora": "O-LoRA",
    "base_kl": "KL to the base",
    "replay": "replay, 5 rows a class",
    "replay_8": "replay, 8 rows a class",
    "merge_only": "merging alone (Fisher α)",
    "pm": "P&M: perturbation + Fisher α",
    "pm_trace": "P&M, each task's Fisher over its mean",
    "pm_gram": "perturbation + free Gram",
    "pm_gram_lda": "perturbation + free Gram + analytic head",
    "pm_lda": "P&M + analytic head",
    "average_lda": "running mean + analytic head",
    "gram_lda": "free Gram + analytic head",
    "best_no_drift": "`best` without drift correction",
    "best_local": "`best` trained against the task's own classes",
    "best_average": "`best` with the running mean (α = 1/t)",
    "first_lda": "first task's LoRA + analytic head",
    "best": "`best`: Fisher α + analytic head, trained against all classes seen",
    "individual": "one adapter a task (upper bound)",
    "joint": "joint training (upper bound)",
    "joint_lda": "joint training + analytic head (upper bound)",
    "frozen": "control: frozen backbone + analytic head",
    "classifier": "control: the same rows as classes, a classifier of the base trained with `best`",
    "untouched": "control: the base, untouched",
}
LANGUAGE_NAMES = {  # of methods that are something else for a language model
    "best": "`best`: rehearsal of rows that a writer wrote, α = 1",
    "frozen": "control: untouched base + analytic answers",
}
# rows that are no method of their own: a method, and what is changed of it
VARIANTS: dict[str, dict[str, Any]] = {
    "untouched": {"method": "joint", "trains": False},  # the base is scored and left alone
    "classifier": {"method": "best"},  # of a stream of classes that classifier.py makes
    "replay_8": {"method": "replay", "strategy.replay_per_class": 8},  # 128 rows of 16 answers
    "pm_lda": {"method": "pm", "head.kind": "lda"},
    "average_lda": {"method": "average", "head.kind": "lda"},
    "gram_lda": {"method": "pm_gram_lda", "perturbation.scale": 0.0},
    "best_no_drift": {"method": "best", "head.drift": "none"},
    "best_local": {"method": "best", "head.training": "task"},
    "best_average": {"method": "best", "merge.method": "average"},
    "joint_lda": {"method": "joint", "head.kind": "lda"},
    "first_lda": {"method": "best", "head.strict": True},
}
CLASSES = {"ACC": "ACC", "AAA": "AAA", "forgetting": "forgetting", "ACC, task given": "task_incremental"}
ANSWERS = {
    "choice among all answers": "ACC",
    "forgetting": "forgetting",
    "choice, task given": "task_incremental",
    "exact match": "exact_match",
    "bits/byte of answers": "bits_per_byte",
    "bits/byte, held-out text": "held_out",
    "change against the base, %": "held_out_change",
}
TEXT = {"bits/byte": "ACC", "AAA": "AAA", "forgetting": "forgetting", "bits/byte, held-out text": "held_out"}
CORE = ("sequential", "average", "pm", "best", "frozen", "joint", "joint_lda")
ENGINES = ("coma", "cofima", "magmax", "opcm", "slao", "sfa", "ewc", "olora", "base_kl", "replay", "individual")
LDA = ("pm_gram_lda", "pm_lda", "average_lda", "gram_lda", "best_no_drift", "best_local", "best_average", "first_lda")
REST = ("merge_only", "pm_trace", "pm_gram", *LDA, *ENGINES)
LANGUAGE = (
    *("sequential", "average", "slao", "pm", "replay", "replay_8"),
    *("best", "joint", "frozen", "classifier", "untouched"),
)
TEXTS = ("sequential", "average", "pm", "pm_trace", "joint", "untouched")


@dataclass(frozen=True)
class Stream:
    """One stream: its YAML, the folder of its data below --data, its methods and the columns of its table."""

    title: str
    config: str
    data: str
    methods: Sequence[str] = CORE
    columns: Sequence[tuple[str, str]] = tuple(CLASSES.items())  # (title, key)
    tasks: int | None = None  # the first so many tasks of the YAML only
    orders: bool = False  # seed k starts with task k; ± is then the 95 % t interval
    shuffled: bool = False  # seed k > 0 shuffles the classes before they are put into groups
    recipe: str | None = None  # file in recipes/ that makes the data of --data/text
    held_out: Sequence[str] = ()  # texts of recipes/make_held_out.py that are scored beside the tasks
    base_recipe: str | None = None  # file in recipes/ that makes the base of --data/text


# named as their file in configs/; those with `tasks` are the first ones of another
STREAMS = {
    "clinc150": Stream("CLINC150, 10 domains", "text/clinc150.yaml", "text"),
    "banking77": Stream("BANKING77, 11 x 7 intents", "text/banking77.yaml", "text"),
    "ten-sets": Stream("ten text sets", "text/ten-sets.yaml", "text"),
    "four-sets": Stream("four text sets", "text/ten-sets.yaml", "text", tasks=4),
    "pacs": Stream("PACS, 4 domains", "image/pacs.yaml", "image"),
    "tiny-imagenet-50": Stream("Tiny-ImageNet-50, 10 x 5 classes", "image/tiny-imagenet-50.yaml", "image"),
    "cifar10": Stream("CIFAR-10, 5 x 2 classes", "image/cifar10.yaml", "image"),
    "mini-imagenet": Stream(
        "mini-ImageNet-100, 10 x 10 classes", "focus/mini-imagenet.yaml", "image112", shuffled=True
    ),
    "mini-imagenet-50": Stream(
        "mini-ImageNet-50, 5 x 10 classes", "focus/mini-imagenet.yaml", "image112", tasks=5, shuffled=True
    ),
    "cifar100": Stream("CIFAR-100, 10 x 10 classes", "focus/cifar100.yaml", "image112", shuffled=True),
    "cifar100-50": Stream("CIFAR-50, 5 x 10 classes", "focus/cifar100.yaml", "image112", tasks=5, shuffled=True),
    "pacs-112": Stream("PACS at 112 pixels, 4 domains", "focus/pacs-112.yaml", "image112"),
    "grocery": Stream("groceries, 9 x 9 classes", "focus/grocery.yaml", "image112", shuffled=True),
    "smollm2-text": Stream(
        *("SmolLM2-135M, four text sets", "smollm2/text.yaml", "text", LANGUAGE, tuple(ANSWERS.items())),
        orders=True,
        held_out=("news", "code"),
    ),
    "smollm2-eight": Stream(
        *("SmolLM2-135M, eight text sets", "smollm2/eight.yaml", "text", LANGUAGE, tuple(ANSWERS.items())),
        orders=True,
        held_out=("plots", "code"),  # it learns news
    ),
    "smollm2-chat": Stream(
        *("SmolLM2-135M, four skills as chats", "smollm2/chat.yaml", "text", LANGUAGE, tuple(ANSWERS.items())),
        orders=True,
        recipe="make_chats",
        held_out=("news", "code"),
    ),
    "t5-text": Stream(
        "a small T5 of recipes/make_t5.py, four text sets",
        "language/t5-text.yaml",
        "text",
        ("sequential", "average", "slao", "replay", "best", "joint", "untouched"),
        tuple(ANSWERS.items()),
        orders=True,
        base_recipe="make_t5",
    ),
    "smollm2-domains": Stream(
        *("SmolLM2-135M, 4 domains of text and code", "smollm2/domains.yaml", "text", TEXTS, tuple(TEXT.items())),
        orders=True,
        recipe="make_domains",
    ),
}


@dataclass(frozen=True)
class Preset:
    """Which streams, methods and seeds one command runs. methods: None for those of each stream."""

    streams: Sequence[str]
    methods: Sequence[str] | None
    seeds: Sequence[int]


PRESETS = {
    "quick": Preset(("clinc150", "pacs", "four-sets"), None, (0,)),
    "standard": Preset(tuple(name for name, stream in STREAMS.items() if not stream.tasks), None, (0, 1, 2)),
    "methods": Preset(("clinc150", "pacs"), REST, (0,)),
}
