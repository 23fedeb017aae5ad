"""The run's settings as typed dataclasses: one field a setting, with its default, meaning, unit and range."""

from dataclasses import asdict, dataclass, replace
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from pm_hf.config.kinds import STREAM_KINDS, StreamKind
from pm_hf.config.typed import MODEL, Choices, FilePath, Flag, Keyed, Named, Number, Text, Whole, setting
from pm_hf.merging.curvature import FULL_PRECISION, NORMALISATIONS, CurvatureSpec
from pm_hf.merging.methods import METHODS, get_method
from pm_hf.merging.methods.base import Method
from pm_hf.merging.methods.linear import PM

# by where their tasks may be trained from, in each group as in METHODS
STREAM_METHODS = tuple(
    method.name
    for method in sorted(METHODS.values(), key=lambda m: ("merged" not in m.starts, "last" not in m.starts))
    if method.in_streams
)
LARGEST_RANK = 2**13
PENALTY_CURVATURES = {"ewc_weight": "fisher", "drift_weight": "gram"}  # {setting of `strategy`: kind that it needs}


@dataclass
class ModelSettings:
    """The backbone."""

    __pydantic_config__ = MODEL

    base: FilePath = setting(
        "", "Hub id, folder, or package:NAME/FOLDER for a model inside an installed Python package"
    )
    revision: Text | None = setting(None, "Hub revision")
    gguf_file: Text | None = setting(None, "file of a GGUF checkpoint in `base`")
    dtype: Literal["float32", "bfloat16", "float16"] = setting(
        "float32", "dtype of the frozen weights; adapters are float32"
    )
    quantization: Literal["nf4", "int8"] | None = setting(
        None, "frozen weights of linear layers in 4 or 8 bits (the extra quantized); null: as `dtype` says"
    )
    attn_implementation: Literal["eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention"] | None = (
        setting(None, "how transformers computes attention; null: its choice for the model")
    )
    trust_remote_code: Flag = setting(
        False, "whether Python code that comes with `base` (auto_map) is run with your rights"
    )

    @property
    def base_precision(self) -> str:
        """What files of measurements say of the frozen weights beneath: the quantization, or "full" without one."""
        return self.quantization or FULL_PRECISION

    @property
    def packages(self) -> tuple[str, ...]:
        """Packages that compute with the weights besides those of every run."""
        return () if self.quantization is None else ("bitsandbytes",)


@dataclass
class Source:
    """Where rows come from and which columns matter; a task's entry overrides the stream's."""

    __pydantic_config__ = MODEL

    train: FilePath | None = setting(
        None, "file of training rows (csv, json, jsonl, .gz too; parquet; npz), relative to data_dir"
    )
    test: FilePath | None = setting(
        None, "file of test rows; pictures: a folder <class>/<file>, or the same .npz as `train`"
    )
    dataset: FilePath | None = setting(None, "instead of files: Hub id or folder for datasets.load_dataset")
    dataset_config: Text | None = setting(None, "configuration name of the Hub data set")
    dataset_revision: Text | None = setting(None, "Hub revision")
    train_split: Text | None = setting(None, "split of the data set; null: train")
    test_split: Text | None = setting(None, "split of the data set; null: test")
    text_column: Text | None = setting(
        None, "column of the text; null: text; language models: see pm_hf.data.language.language_rows"
    )
    label_column: Text | None = setting(None, "column of the class; null: label")
    image_column: Text | None = setting(None, "column of the picture; null: image")
    prompt_template: Text | None = setting(
        None, "language models: prompt made of {text} and {task}, completed by the label"
    )
    answers: Keyed | None = setting(None, "language models: {label: the words that stand for it}, of every label")


@dataclass
class TaskSettings(Source):
    """One task of a list; a finished one may leave out its training rows (`train`)."""

    name: Text = setting("", "name, unique within the stream")


@dataclass
class StreamSettings(Source):
    """The tasks: a list of them, files or configurations, or one data set split by class groups or by a column."""

    SPLITS: ClassVar = ("tasks", "class_groups", "domain_column", "task_column", "task_files", "task_configs")

    kind: Annotated[str, Choices(tuple(STREAM_KINDS))] = setting("text-classification", "what the model learns to do")
    scenario: Literal["class_incremental", "domain_incremental"] | None = setting(
        None, "new classes in every task, or the same classes in every task; null: by domain_column, else by class"
    )
    tasks: list[TaskSettings] | None = setting(None, "the tasks, each with its rows")
    held_out: list[TaskSettings] | None = setting(
        None, "language models: texts scored after every task and never trained on"
    )
    class_groups: Annotated[FilePath | Whole | Keyed, Field(union_mode="left_to_right")] | None = setting(
        None, "number of groups, {task: [label, …]}, or a JSON file of that"
    )
    domain_column: Text | None = setting(
        None, "one task for each value of this column, in order of appearance; every task has the same classes"
    )
    task_column: Text | None = setting(
        None, "one task for each value of this column (month, customer, batch); classes may be new or come back"
    )
    task_files: FilePath | None = setting(
        None, "one task for each file that this pattern names, in the order of their names; classes may come back"
    )
    task_configs: list[Text] | None = setting(
        None, "one task for each of these configurations of `dataset`; classes may come back"
    )
    order: list[Text] | None = setting(
        None, "names of all tasks in the order in which they are learned; null: as they stand"
    )
    shared_labels: Flag = setting(False, "whether equal label names of different tasks mean the same class")
    max_length: Whole = setting(128, "longest input; what is longer is cut", "tokens", ge=1)
    augmentation: Literal["none", "flip", "crop_flip"] = setting("none", "random changes of training pictures")
    test_share: Number | None = setting(
        None, "share of each class's training rows held out as the test rows, drawn with the seed", gt=0, lt=1
    )
    eval_share: Number | None = setting(
        None, "share of each class's training rows that training.eval_strategy evaluates on", gt=0, lt=1
    )
    train_per_class: Whole | None = setting(
        None, "training rows kept of each class and task, drawn with the seed", "rows", ge=1
    )
    train_rows: Whole | None = setting(None, "training rows kept of each task, drawn with the seed", "rows", ge=1)
    test_rows: Whole | None = setting(None, "test rows kept of each task, drawn with the seed", "rows", ge=1)


@dataclass
class LoraSettings:
    """The task adapter."""

    __pydantic_config__ = MODEL

    r: Whole = setting(8, "rank", ge=1, le=LARGEST_RANK)
    alpha: Whole = setting(16, "scaling is alpha / r; where it is left out: 2 · r, with use_rslora 6", ge=1)
    dropout: Number = setting(0.0, "probability that an input of the adapter is dropped", ge=0, lt=1)
    target_modules: list[Text] | Text | None = setting(
        None, "names or a regular expression of the adapted layers; null: PEFT's for the model, or all-linear"
    )
    use_rslora: Flag = setting(False, "whether the scaling is alpha / √r, which stays right for large ranks")
    init_lora_weights: Flag | Text = setting(
        True, "how A and B start: true (B = 0), gaussian (B = 0) or orthogonal (BA = 0 with B ≠ 0)"
    )
    modules_to_save: list[Text] | None = setting(
        None,
        "norms, embeddings and other modules that are trained whole beside the adapter, with head_learning_rate; they "
        "merge by the coefficient",
    )


@dataclass
class PerturbationSettings:
    """Perturbation of the training step."""

    __pydantic_config__ = MODEL

    scale: Number | None = setting(None, "ε", ge=0, lt=1)
    probabilities: list[Number] = setting(lambda: [1 / 3, 1 / 3, 1 / 3], "of the factors 1, 1 + ε, 1 − ε")


@dataclass
class CurvatureSettings:
    """Curvature of a finished task."""

    __pydantic_config__ = MODEL

    kind: Literal["fisher", "gram", "factored"] | None = setting(
        None, "diagonal Fisher, Gram of the inputs, or the Fisher's two factors for large matrices"
    )
    labels: Literal["empirical", "mc"] = setting(
        "empirical", "labels of the Fisher: the data's, or drawn from the model"
    )
    loss_reduction: Literal["mean", "sum"] = setting("mean", "language models: over the target tokens of an example")
    max_gib: Number = setting(8.0, "the run is refused when the curvature's sums would be larger", "GiB", gt=0)
    samples: Whole | None = setting(512, "examples used at most; null: all", "examples", ge=1)
    normalisation: Literal["examples", "trace"] = setting(
        "examples", "a task's Fisher over its examples, or over its mean entry (trace)"
    )
    at: Literal["optimum", "both"] = setting(
        "optimum", "where it is measured: after the training, or the mean of before and after (one more pass)"
    )
    shrinkage: Number = setting(0.1, "ρ of the Gram: (1−ρ)G + ρ·diag(G)", ge=0, lt=1)


@dataclass
class MergeSettings:
    """The fold of a task into the running merge."""

    __pydantic_config__ = MODEL

    method: Annotated[str, Choices(STREAM_METHODS)] | None = setting(None, "how a task is folded, see pm-hf methods")
    train_from: Literal["merged", "last", "base"] | None = setting(
        None, "where a task's training starts; null: the method's"
    )
    options: Named = setting(dict, "settings of the merging method, see pm-hf methods")
    freedom: Literal["global", "module", "free"] | None = setting(
        None, "one coefficient, one a module, or the whole matrix"
    )
    coefficient: Annotated[Number, Field(ge=0, le=1)] | Literal["average", "fisher", "search"] | None = setting(
        None,
        "of every task but the first: a number; average: 1/t; fisher: the published closed form (method pm); search: "
        "the best on held-out rows and what stands for earlier tasks, the pool (strategy.replay) or draws of their "
        "classes (head.kind lda); null: the method's",
    )
    max_rank: Whole | None = setting(64, "rank kept; null: exact, the rank grows with every task", ge=1)
    on_zero_curvature: Literal["error", "average"] = setting("average", "pm: refuse, or 1/t; the same as in `options`")


@dataclass
class HeadSettings:
    """The classification head."""

    __pydantic_config__ = MODEL

    kind: Literal["linear", "lda", "none"] | None = setting(
        None,
        "trained rows, the analytic head (linear discriminant analysis), or none; language models: none, or lda for "
        "analytic answers without training",
    )
    means: Literal["class", "task"] | None = setting(
        None, "lda: one mean for each class, or for each class and task (null: so for domains and language models)"
    )
    training: Literal["task", "seen"] = setting(
        "task", "lda: trained against the task's classes; seen: from analytic rows, against all classes seen"
    )
    drift: Literal["ridge", "none"] = setting("ridge", "lda: how old class means follow the backbone")
    ridge: Number = setting(1.0, "lda: λ = ridge · tr(FᵀF)/d of the drift regression", gt=0)
    gate: Flag = setting(
        False,
        "lda: deploy the merged adapter at the largest scale of 0, ½ and 1 that beats 0, the frozen control, on "
        "held-out rows",
    )
    solver: Literal["lda", "bound", "search"] = setting(
        "lda",
        "lda: rows are the discriminants, or minimise a bound of the expected loss with each class's own covariance; "
        "search: those that lose less on rows held out in turn",
    )
    strict: Flag = setting(False, "lda: freeze backbone and covariance after task 1, old rows stay bit-identical")


@dataclass
class StrategySettings:
    """What else holds on to earlier tasks while a new one is trained; everything is off by default."""

    __pydantic_config__ = MODEL

    replay: Literal["none", "generated"] = setting(
        "none",
        "generated: rows of earlier tasks, written by a throw-away adapter and labelled by the merge (language models)",
    )
    pool_rows: Whole = setting(
        512, "written rows that are kept, of all tasks together; at least 64 a task are advised", "rows", ge=1
    )
    replay_pool: Flag = setting(True, "false: no written row is kept but each task's writer, which writes them again")
    base_samples: Whole = setting(
        128, "texts of the base that are rehearsed too, for its general ability (causal-lm); 0: none", "texts", ge=0
    )
    replay_per_class: Whole = setting(
        0, "training rows kept of each class (language models: answer) of every earlier task", "rows", ge=0
    )
    ewc_weight: Number = setting(0.0, "λ of λ(½θᵀSθ − θᵀM), elastic weight consolidation with the running Fisher", ge=0)
    olora_weight: Number = setting(0.0, "λ of Σ|A_old A_tᵀ|, O-LoRA", ge=0)
    drift_weight: Number = setting(
        0.0,
        "of the change of outputs that inputs of earlier tasks have, from their Gram; 1: what the last task changed on "
        "its own inputs costs 0.1 nat",
        ge=0,
    )
    base_kl_weight: Number = setting(0.0, "weight of the divergence from the frozen base's own prediction", ge=0)
    divergence: Literal["kl", "reverse_kl", "js", "tv"] = setting("kl", "divergence of base_kl_weight")
    averaging_period: Number = setting(
        0.0, "SFA: p, share of a task's steps between two averagings with the model before it", ge=0, le=1
    )
    averaging_weight: Number = setting(
        0.5, "SFA: 1 − β, the share of the model being trained in an average", gt=0, le=1
    )
    individual: Flag = setting(False, "one adapter for each task, none merged: each task is scored with its own")
    joint: Flag = setting(False, "one training on the data of all tasks")


@dataclass
class RunConfig:
    """Everything that decides a run; saved as config.yaml."""

    __pydantic_config__ = MODEL

    output_dir: FilePath = setting("", "folder of the run")
    method: Text = setting("", "preset that fills what is left null below; where it is left out: that of stream.kind")
    seed: Whole = setting(0, "seed of everything random", ge=0, lt=2**32)
    data_dir: FilePath | None = setting(None, "folder that file names in `stream` are relative to")
    model: ModelSettings = setting(ModelSettings, "the backbone")
    stream: StreamSettings = setting(StreamSettings, "the tasks")
    lora: LoraSettings = setting(LoraSettings, "the task adapter")
    training: Named = setting(
        dict,
        "any field of TrainingArguments, and head_learning_rate; learning rates and epochs are by default the kind's",
    )
    perturbation: PerturbationSettings = setting(PerturbationSettings, "perturbation of the training step")
    curvature: CurvatureSettings = setting(CurvatureSettings, "curvature of a finished task")
    merge: MergeSettings = setting(MergeSettings, "the fold of a task into the running merge")
    head: HeadSettings = setting(HeadSettings, "the classification head")
    strategy: StrategySettings = setting(StrategySettings, "what else holds on to earlier tasks")
    early_stopping_patience: Whole | None = setting(
        None, "a task's training ends after so many evaluations without a better one", "evaluations", ge=1
    )
    trains: Flag | None = setting(None, "false: the backbone stays as it is and only the head is computed")
    max_forgetting: Number | None = setting(
        None, "the run fails when an old task lost more accuracy than this", ge=-1, le=1
    )
    start_from: FilePath | None = setting(None, "released adapter folder to begin from")

    @property
    def kind(self) -> StreamKind:
        """What the stream's kind loads, reads and publishes."""
        return STREAM_KINDS[self.stream.kind]

    @property
    def merging_method(self) -> Method:
        """The row of the merging method."""
        return get_method(self.merge.method or PM.name)

    @property
    def analytic_head(self) -> bool:
        """Whether the head's rows, or what answers are chosen by, are computed from class statistics (linear
        discriminant analysis)."""
        return self.head.kind == "lda"

    @property
    def shared_head(self) -> bool:
        """Whether all tasks have one head, that of the same classes."""
        return self.kind.has_head and self.stream.scenario == "domain_incremental"

    @property
    def rehearses(self) -> bool:
        """Whether tasks train on written rows of the earlier ones too."""
        return self.strategy.replay == "generated"

    @property
    def keeps_pool(self) -> bool:
        """Whether written rows are kept."""
        return self.rehearses and self.strategy.replay_pool

    @property
    def keeps_writers(self) -> bool:
        """Whether the writers are kept in place of what they wrote."""
        return self.rehearses and not self.strategy.replay_pool

    @property
    def samples_base(self) -> bool:
        """Whether samples of the base are rehearsed; an encoder-decoder says nothing without an input."""
        return self.rehearses and self.strategy.base_samples > 0 and self.stream.kind == "causal-lm"

    @property
    def searches(self) -> bool:
        """Whether the coefficient is searched for on held-out rows and what stands for the earlier tasks."""
        return self.merge.coefficient == "search"

    @property
    def holds_out_rows(self) -> bool:
        """Whether a share of a task's training rows is held out though `stream.eval_share` does not ask for it."""
        return self.stream.eval_share is None and (self.searches or self.head.gate)

    @property
    def computes_coefficient(self) -> bool:
        """Whether the merging method computes its coefficient."""
        return self.merge.coefficient in (None, "fisher")

    @property
    def averages(self) -> bool:
        """Whether the coefficient is 1/t whatever the merging method."""
        return self.merge.coefficient == "average"

    @property
    def merges(self) -> bool:
        """Whether tasks are folded into a running merge; otherwise each one keeps an adapter of its own."""
        return not self.strategy.individual

    @property
    def measures_curvature(self) -> bool:
        """Whether the curvature of a finished task is measured: for its coefficient, or for the next task's penalty."""
        wanted = self.merging_method.curvature is not None and self.computes_coefficient
        return self.merges and (wanted or bool(self.curvature_penalties))

    @property
    def curvature_penalties(self) -> list[str]:
        """Settings of the penalties in use that need the sums of the earlier tasks' curvature."""
        return [name for name in PENALTY_CURVATURES if getattr(self.strategy, name)]

    @property
    def sums_curvature(self) -> bool:
        """Whether the curvature of all tasks is added up; otherwise each task's stands alone."""
        return self.measures_curvature and (self.merging_method.curvature is None or self.merging_method.sums)

    @property
    def curvature_spec(self) -> CurvatureSpec:
        """How the curvature is measured: what a file of sums must have been measured with to be gone on with."""
        kind, settings = self.curvature.kind or "fisher", self.curvature
        if kind == "gram":
            spec = CurvatureSpec(kind, labels="none", shrinkage=settings.shrinkage)
        else:
            reduction = "mean" if self.kind.has_head else settings.loss_reduction
            spec = CurvatureSpec(kind, labels=settings.labels, loss_reduction=reduction)
        normalisation = NORMALISATIONS[settings.normalisation]
        return replace(spec, normalisation=normalisation, at=settings.at, base=self.model.base_precision)

    def to_dict(self) -> dict:
        """Plain nested dict."""
        return asdict(self)
