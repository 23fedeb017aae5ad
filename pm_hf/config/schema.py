"""The run's settings as typed dataclasses: one field, one default, one line for each setting."""

from dataclasses import asdict, dataclass, field, replace
from typing import Annotated, Any, Literal

from pm_hf.config.kinds import STREAM_KINDS, StreamKind
from pm_hf.config.typed import PATH
from pm_hf.merging.curvature import NORMALISATIONS, CurvatureSpec
from pm_hf.merging.methods import METHODS, get_method
from pm_hf.merging.methods.base import Method
from pm_hf.merging.methods.linear import PM

# by where their tasks may be trained from, in each group as in METHODS
STREAM_METHODS = tuple(
    method.name
    for method in sorted(METHODS.values(), key=lambda m: ("merged" not in m.starts, "last" not in m.starts))
    if method.in_streams
)

FilePath = Annotated[str, PATH]  # a text that can name a file; ~ is the home folder


@dataclass
class ModelSettings:
    """The backbone."""

    base: FilePath = ""  # Hub id, folder, or package:NAME/FOLDER for a model inside an installed Python package
    revision: str | None = None  # Hub revision
    gguf_file: str | None = None  # file of a GGUF checkpoint in `base`
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # of the frozen weights; adapters are float32
    trust_remote_code: bool = False  # whether Python code that comes with `base` (auto_map) is run with your rights


@dataclass
class Source:
    """Where rows come from and which columns matter; a task's entry overrides the stream's."""

    train: FilePath | None = (
        None  # file of training rows (csv, json, jsonl, .gz too; parquet; npz), relative to data_dir
    )
    test: FilePath | None = None  # file of test rows; pictures: a folder <class>/<file>, or the same .npz as `train`
    dataset: FilePath | None = None  # instead of files: Hub id or folder for datasets.load_dataset
    dataset_config: str | None = None  # configuration name of the Hub data set
    dataset_revision: str | None = None  # Hub revision
    train_split: str | None = None  # split of the data set, default "train"
    test_split: str | None = None  # split of the data set, default "test"
    text_column: str | None = None  # default "text"; language models: see pm_hf.data.language.language_rows
    label_column: str | None = None  # default "label"
    image_column: str | None = None  # default "image"
    prompt_template: str | None = None  # language models: prompt made of {text} and {task}, completed by the label
    answers: dict | None = None  # language models: {label: the words that stand for it}, of every label


@dataclass
class TaskSettings(Source):
    """One task of a list; a finished one may leave out its training rows (`train`)."""

    name: str = ""  # unique within the stream


@dataclass
class StreamSettings(Source):
    """The tasks: a list of them, or one data set split by class groups or by a column."""

    kind: Annotated[str, tuple(STREAM_KINDS)] = "text-classification"
    # new classes in every task, or the same classes in every task; default: by domain_column, else by class
    scenario: Literal["class_incremental", "domain_incremental"] | None = None
    tasks: list[TaskSettings] | None = None
    held_out: list[TaskSettings] | None = None  # language models: texts scored after every task and never trained on
    class_groups: int | FilePath | dict | None = None  # number of groups, {task: [label, …]}, or a JSON file of that
    domain_column: str | None = None  # one task for each value of this column, in order of appearance
    order: list[str] | None = None  # names of all tasks in the order in which they are learned; default: as they stand
    shared_labels: bool = False  # whether equal label names of different tasks mean the same class
    max_length: int = 128  # tokens
    augmentation: Literal["none", "flip", "crop_flip"] = "none"  # of training pictures
    test_share: float | None = (
        None  # share of each class's training rows held out as the test rows, drawn with the seed
    )
    eval_share: float | None = None  # share of each class's training rows that training.eval_strategy evaluates on
    train_per_class: int | None = None  # training rows kept of each class and task, drawn with the seed
    train_rows: int | None = None  # training rows kept of each task, drawn with the seed
    test_rows: int | None = None  # test rows kept of each task, drawn with the seed


@dataclass
class LoraSettings:
    """The task adapter."""

    r: int = 8  # rank
    alpha: int = 16  # scaling is alpha / r; default: 2 · r
    dropout: float = 0.0  # probability
    target_modules: list[str] | str | None = None  # names or a regular expression; default: PEFT's for the model


@dataclass
class PerturbationSettings:
    """Perturbation of the training step."""

    scale: float | None = None  # ε, 0 ≤ ε < 1
    probabilities: list[float] = field(default_factory=lambda: [1 / 3, 1 / 3, 1 / 3])  # of 1, 1 + ε, 1 − ε


@dataclass
class CurvatureSettings:
    """Curvature of a finished task."""

    kind: Literal["fisher", "gram", "factored"] | None = None
    labels: Literal["empirical", "mc"] = "empirical"  # labels of the Fisher: the data's, or drawn from the model
    loss_reduction: Literal["mean", "sum"] = "mean"  # language models: over the target tokens of an example
    max_gib: float = 8.0  # the run is refused when the curvature's sums would be larger than this many GiB
    samples: int | None = 512  # examples used at most; null: all
    normalisation: Literal["examples", "trace"] = "examples"  # trace: each task's Fisher over its mean entry
    shrinkage: float = 0.1  # ρ of the Gram: (1−ρ)G + ρ·diag(G)


@dataclass
class MergeSettings:
    """The fold of a task into the running merge."""

    method: Annotated[str, STREAM_METHODS] | None = None  # how a task is folded, see pm-hf methods
    train_from: Literal["merged", "last", "base"] | None = None  # where a task's training starts; default: the method's
    options: dict[str, Any] = field(default_factory=dict)  # settings of the merging method, see pm-hf methods
    freedom: Literal["global", "module", "free"] | None = None  # one coefficient, one a module, the whole matrix
    # a coefficient of one's own instead of the computed one; search: the best on held-out rows and the pool (replay)
    coefficient: float | Literal["search"] | None = None
    max_rank: int | None = 64  # rank kept; null: exact, the rank grows with every task
    on_zero_curvature: Literal["error", "average"] = "average"  # pm: refuse, or 1/t; the same as in `options`


@dataclass
class HeadSettings:
    """The classification head."""

    kind: Literal["linear", "lda", "none"] | None = None  # trained rows, the analytic head, or none (language models)
    means: Literal["class", "task"] | None = None  # lda: one for each class, or class and task (default of domains)
    training: Literal["task", "seen"] = "task"  # lda: seen: from analytic rows, against those of all classes seen
    drift: Literal["ridge", "none"] = "ridge"  # lda: how old class means follow the backbone
    ridge: float = 1.0  # lda: λ = ridge · tr(FᵀF)/d of the drift regression
    strict: bool = False  # lda: freeze backbone and covariance after task 1, old rows stay bit-identical


@dataclass
class StrategySettings:
    """What else holds on to earlier tasks while a new one is trained; everything is off by default."""

    # generated: rows of earlier tasks, written by a throw-away adapter and labelled by the merge (language models)
    replay: Literal["none", "generated"] = "none"
    pool_rows: int = 512  # written rows that are kept, of all tasks together; at least 64 a task are advised
    replay_pool: bool = True  # false: no written row is kept but each task's writer, which writes them again
    base_samples: int = 64  # texts of the base that are rehearsed too, for its general ability (causal-lm); 0: none
    replay_per_class: int = 0  # training rows kept of each class (language models: answer) of every earlier task
    ewc_weight: float = 0.0  # λ of λ(½θᵀSθ − θᵀM), elastic weight consolidation with the running Fisher
    olora_weight: float = 0.0  # λ of Σ|A_old A_tᵀ|, O-LoRA
    base_kl_weight: float = 0.0  # weight of the divergence from the frozen base's own prediction
    divergence: Literal["kl", "reverse_kl", "js", "tv"] = "kl"  # of base_kl_weight
    averaging_period: float = 0.0  # SFA: p, share of a task's steps between two averagings with the model before it
    averaging_weight: float = 0.5  # SFA: 1 − β, the share of the model being trained in an average
    individual: bool = False  # one adapter for each task, none merged: each task is scored with its own
    joint: bool = False  # one training on the data of all tasks


@dataclass
class RunConfig:
    """Everything that decides a run; saved as config.yaml."""

    output_dir: FilePath = ""
    method: str = ""  # a row of PRESETS: fills what is left null below; default: that of stream.kind
    seed: int = 0  # 0 to 2**32 − 1
    data_dir: FilePath | None = None  # folder that file names in `stream` are relative to
    model: ModelSettings = field(default_factory=ModelSettings)
    stream: StreamSettings = field(default_factory=StreamSettings)
    lora: LoraSettings = field(default_factory=LoraSettings)
    # any field of TrainingArguments, and head_learning_rate; default of the learning rates and epochs: the kind's
    training: dict[str, Any] = field(default_factory=dict)
    perturbation: PerturbationSettings = field(default_factory=PerturbationSettings)
    curvature: CurvatureSettings = field(default_factory=CurvatureSettings)
    merge: MergeSettings = field(default_factory=MergeSettings)
    head: HeadSettings = field(default_factory=HeadSettings)
    strategy: StrategySettings = field(default_factory=StrategySettings)
    early_stopping_patience: int | None = None  # a task's training ends after so many evaluations without a better one
    trains: bool | None = None  # false: the backbone stays as it is and only the head is computed
    max_forgetting: float | None = None  # the run fails when an old task lost more accuracy than this
    start_from: FilePath | None = None  # released adapter folder to begin from

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
        """Whether the head's rows are computed from class statistics (linear discriminant analysis)."""
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
    def searches(self) -> bool:
        """Whether the coefficient is searched for on held-out rows and the pool."""
        return self.merge.coefficient == "search"

    @property
    def merges(self) -> bool:
        """Whether tasks are folded into a running merge; otherwise each one keeps an adapter of its own."""
        return not self.strategy.individual

    @property
    def measures_curvature(self) -> bool:
        """Whether the curvature of a finished task is measured: for its coefficient, or for the next task's penalty."""
        wanted = self.merging_method.curvature is not None and self.merge.coefficient is None
        return self.merges and (wanted or self.strategy.ewc_weight > 0)

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
        return replace(spec, normalisation=NORMALISATIONS[settings.normalisation])

    def to_dict(self) -> dict:
        """Plain nested dict."""
        return asdict(self)
