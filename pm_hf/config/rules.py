"""Values of a run's settings that have the right type and still make no sense."""

import math
from collections.abc import Mapping, Sequence

from pm_hf.config.kinds import STREAM_KINDS
from pm_hf.config.patterns import pattern_problem
from pm_hf.config.schema import PENALTY_CURVATURES, RunConfig, StreamSettings
from pm_hf.errors import InputError
from pm_hf.merging.methods import read_options
from pm_hf.merging.methods.linear import PM, SEQUENTIAL

PLAIN_STARTS = ("gaussian", "orthogonal")  # of lora.init_lora_weights besides true: the product is 0, the base stays
_REWRITES = (
    "rewrites the base's weights: the adapter's product is then not what the task changes, which the perturbed step "
    "scales, the curvature measures and the merge adds"
)
REFUSED_STARTS = {
    **dict.fromkeys(("pissa", "olora", "corda", "loftq", "lora_ga"), _REWRITES),
    "eva": "looks at data first, in a pass that PEFT makes for a model with one adapter",
    "mica": "freezes B, and here both factors of a task are trained",
    "false": "starts from a random product instead of the model that the task begins with",
}


def value_problems(config: RunConfig) -> list[str]:
    """Values that have the right type and still make no sense."""
    checks = [
        (bool(config.output_dir), "output_dir: required"),
        (bool(config.model.base), "model.base: required, a Hub id, a folder or package:NAME/FOLDER"),
        (
            config.model.quantization is None or config.model.gguf_file is None,
            "model.quantization: the weights of a GGUF file are unpacked and stay so; leave one of the two out",
        ),
        (
            config.curvature.normalisation == "examples" or config.curvature.kind == "fisher",
            "curvature.normalisation: trace belongs to curvature.kind: fisher",
        ),
        (config.lora.target_modules not in ("", []), "lora.target_modules: names no layer; null: PEFT's for the model"),
        (config.head.training == "task" or config.head.kind == "lda", "head.training: seen belongs to head.kind: lda"),
        (not config.head.strict or config.head.kind == "lda", "head.strict: belongs to head.kind: lda"),
        (
            config.head.solver == "lda" or (config.head.kind == "lda" and config.kind.has_head),
            f"head.solver: {config.head.solver} belongs to head.kind: lda of a classifier",
        ),
        (
            config.head.solver == "lda" or not config.head.strict,
            f"head.solver: {config.head.solver} changes the rows of all classes with every task, which head.strict "
            "excludes; use lda",
        ),
        (config.trains or config.head.kind != "linear", "trains: false needs head.kind: lda"),
        (
            not config.head.gate or (config.head.kind == "lda" and config.kind.has_head),
            "head.gate: belongs to a classifier's head.kind: lda",
        ),
        (
            not config.head.gate or (config.trains is not False and not config.head.strict),
            "head.gate: compares with a backbone that is not trained; leave out trains: false and head.strict",
        ),
    ]
    problems = [message for fine, message in checks if not fine]
    scale = config.perturbation.scale
    problems += perturbation_problems(0.0 if scale is None else scale, config.perturbation.probabilities)
    problems += _start_problems(config) + (_whole_problems(config) if config.lora.modules_to_save is not None else [])
    problems += _stream_problems(config) + _merge_problems(config) + _strategy_problems(config)
    problems += _evaluation_problems(config)
    patterns = {
        "lora.target_modules": config.lora.target_modules,
        "training.optim_target_modules": config.training.get("optim_target_modules"),
    }
    for name, pattern in patterns.items():
        if isinstance(pattern, str) and (problem := pattern_problem(pattern)):
            problems.append(f"{name}: {problem}")
    return problems


def _start_problems(config: RunConfig) -> list[str]:
    """Starts of A and B of which the trained product would not be what the task changed."""
    lora, model = config.lora, config.model
    start, name = lora.init_lora_weights, "lora.init_lora_weights"
    if start == "orthogonal":
        if lora.r % 2:
            return [f"{name}: orthogonal needs an even lora.r, found {lora.r}"]
        if model.quantization is not None or model.dtype != "float32":
            return [
                f"{name}: orthogonal is rounded to the base's dtype, so that BA is 0 for a base in float32 only, found "
                f"{model.quantization or model.dtype}; use gaussian"
            ]
    if start is True or start in PLAIN_STARTS:
        return []
    reasons = [reason for kind, reason in REFUSED_STARTS.items() if str(start).lower().startswith(kind)]
    expected = f"expected true or {' or '.join(PLAIN_STARTS)}, found {str(start).lower()}"
    return [f"{name}: {expected}" + (f", which {reasons[0]}" if reasons else "")]


def _whole_problems(config: RunConfig) -> list[str]:
    """What modules that are trained whole cannot be combined with: whatever does not move them along with the product,
    to θ̂ + α(θ* − θ̂)."""
    merge, method, strategy = config.merge, config.merging_method, config.strategy
    merged = config.merges and not strategy.joint
    train_from = merge.train_from or method.train_from
    checks = [
        (config.lora.modules_to_save == [], "names no module; leave it out"),
        (config.model.dtype != "float32", f"they train in float32, and model.dtype is {config.model.dtype}"),
        (config.trains is False or config.head.strict, "trains: false and head.strict train no backbone"),
        (
            merged and (method.kernel is not None or method.factors or train_from != "merged"),
            f"merge.method {method.name} with train_from {train_from} merges what adapters add to the base, and what "
            "is held whole adds nothing; use sequential, coma, or average with train_from merged",
        ),
        (
            config.measures_curvature,
            "no curvature is measured of them, so neither a computed coefficient nor a penalty knows what they change; "
            "set merge.coefficient to average or a number, without ewc_weight and drift_weight",
        ),
        (config.searches, "merge.coefficient: search scales the adapter and leaves them as they are; give a number"),
        (config.head.gate, "head.gate scales the adapter and leaves them as they are"),
        (
            strategy.base_kl_weight > 0,
            "strategy.base_kl_weight compares with the base, and they stay in it",
        ),
        (strategy.averaging_period > 0, "strategy.averaging_period averages the adapter and not them"),
    ]
    return [f"lora.modules_to_save: {problem}" for applies, problem in checks if applies]


def _stream_problems(config: RunConfig) -> list[str]:
    stream, problems = config.stream, []
    splits = [name for name in stream.SPLITS if getattr(stream, name) is not None]
    if len(splits) != 1:
        ways, splits_given = ", ".join(stream.SPLITS), ", ".join(splits) or "none"
        problems.append(f"stream: exactly one of {ways} is needed, found {splits_given}")
    if stream.task_configs is not None and stream.dataset is None:
        problems.append("stream.task_configs: names configurations of stream.dataset, which is not given")
    if stream.task_files is not None and stream.test_share is None:
        problems.append("stream.task_files: the files hold training rows; set stream.test_share, or list stream.tasks")
    share, given = stream.test_share, [source for source in [stream, *(stream.tasks or [])] if source.test]
    if share is not None and (given or stream.test_split is not None):
        problems.append("stream.test_share: holds out training rows; leave out test and test_split")
    if stream.domain_column is not None and stream.scenario == "class_incremental":
        problems.append("stream.scenario: domain_column makes a domain_incremental stream")
    by_class = [name for name in ("class_groups", "task_column") if getattr(stream, name) is not None]
    if stream.scenario == "domain_incremental":
        problems += [f"stream.scenario: {name} makes a class_incremental stream" for name in by_class]
    fine = ("linear", "lda") if config.kind.has_head else ("none",) if config.trains else ("none", "lda")
    if config.head.kind not in fine:
        expected = "linear or lda" if config.kind.has_head else "none, or with trains: false lda (method: frozen)"
        problems.append(f"head.kind: {stream.kind} needs {expected}, found {config.head.kind}")
    foreign = dict.fromkeys(name for kind in STREAM_KINDS.values() for name in kind.settings)
    given_otherwise = [name for name in foreign if getattr(stream, name) != getattr(StreamSettings, name)]
    idle = [name for name in given_otherwise if name not in config.kind.settings]
    problems += [f"stream.{name}: {stream.kind} has no use for it" for name in idle]
    if stream.class_groups is not None and not config.kind.has_head:
        problems.append(f"stream.class_groups: {stream.kind} has no classes; use tasks or domain_column")
    return problems


def _merge_problems(config: RunConfig) -> list[str]:
    merge, method, problems = config.merge, config.merging_method, list[str]()
    train_from = merge.train_from or method.train_from
    if method.sums and config.computes_coefficient and config.curvature.kind is None:
        problems.append(f"curvature.kind: method {method.name} needs fisher or gram, or merge.coefficient")
    if merge.freedom in ("module", "free"):
        if not config.computes_coefficient:
            problems.append(f"merge.coefficient: freedom {merge.freedom} has no single coefficient")
        if not method.sums:
            problems.append(f"merge.freedom: {merge.freedom} belongs to merge.method {PM.name}")
    if merge.coefficient == "fisher" and (method is not PM or config.curvature.kind == "gram"):
        problems.append(
            f"merge.coefficient: fisher is the closed form of merge.method {PM.name} with curvature.kind fisher or "
            f"factored; found {method.name} with {config.curvature.kind}"
        )
    if config.searches:
        problems += _search_problems(config)
    if method.factors and merge.max_rank is not None:
        problems.append(f"merge.max_rank: {method.name} keeps the factors as they are; it must be null")
    if merge.train_from not in (None, *method.starts):
        problems.append(f"merge.train_from: the mathematics of {method.name} needs {' or '.join(method.starts)}")
    if config.head.training == "seen" and train_from != "merged":
        problems.append(
            "head.training: seen starts at the analytic rows of the running merge; the training has to start there too"
        )
    try:
        read_options(method.name, merge.options)
    except InputError as error:
        problems.append(f"merge.options: {error}")
    if config.curvature.at == "both" and train_from != "merged":
        problems.append(
            f"curvature.at: both ends of Δ are the running merge and the optimum; training starts from {train_from}"
        )
    if merge.freedom == "free" and config.curvature.kind == "factored":
        problems.append("merge.freedom: free needs curvature.kind fisher or gram; factored has no whole matrix")
    return problems


def _search_problems(config: RunConfig) -> list[str]:
    """Why there is no merge line θ + αΔ to search, or nothing to search it with."""
    merge, method, problems = config.merge, config.merging_method, list[str]()
    if not (config.rehearses or (config.analytic_head and config.kind.has_head)):
        needed = "head.kind: lda" if config.kind.has_head else "strategy.replay: generated"
        problems.append(
            "merge.coefficient: search measures the earlier tasks on their written rows, or on draws of their classes; "
            f"set {needed}, or give a number"
        )
    if config.trains is False or config.head.strict or config.strategy.joint:
        problems.append(
            "merge.coefficient: search needs several tasks that train the backbone; leave out trains: false, "
            "head.strict and strategy.joint"
        )
    if method.kernel is not None or (merge.train_from or method.train_from) != "merged":
        problems.append(
            f"merge.coefficient: search needs steps from the running merge, which merge.method {method.name} with "
            f"train_from {merge.train_from or method.train_from} does not take; use average or {PM.name}"
        )
    return problems


def _rehearsal_problems(config: RunConfig) -> list[str]:
    """What strategy.replay: generated cannot be combined with."""
    strategy, training = config.strategy, config.training
    checks = [
        (config.kind.has_head, f"language models write rows, {config.stream.kind} cannot; use replay_per_class"),
        (strategy.joint or strategy.individual, "with joint or individual no task has a past; leave it out"),
        (strategy.replay_per_class > 0, "replay_per_class keeps training rows instead; choose one of the two"),
        (config.trains is False, "trains: false trains nothing on the written rows"),
        (
            bool(training.get("fsdp") or training.get("deepspeed")),
            "the writer is trained whole in every process; leave out training.fsdp and training.deepspeed",
        ),
    ]
    return [f"strategy.replay: generated: {problem}" for applies, problem in checks if applies]


def _strategy_problems(config: RunConfig) -> list[str]:
    strategy, merge = config.strategy, config.merge
    # what holds on to earlier tasks
    held = (*PENALTY_CURVATURES, "olora_weight", "replay_per_class", "averaging_period")
    problems = _rehearsal_problems(config) if config.rehearses else []
    if not (strategy.replay_pool or config.rehearses):
        problems.append(
            "strategy.replay_pool: false keeps writers of written rows; it needs strategy.replay: generated"
        )
    if strategy.joint and strategy.individual:
        problems.append("strategy: joint and individual exclude each other")
    if (strategy.joint or strategy.individual) and (idle := [name for name in held if getattr(strategy, name)]):
        problems.append(f"strategy: with joint or individual no task has a past; leave out {', '.join(idle)}")
    method = config.merging_method
    if strategy.olora_weight and (method is not SEQUENTIAL or merge.max_rank is not None):
        problems.append("strategy.olora_weight: needs merge.method sequential and merge.max_rank null, to keep every A")
    for name in config.curvature_penalties:
        if config.curvature.kind != PENALTY_CURVATURES[name]:
            expected = PENALTY_CURVATURES[name]
            problems.append(f"strategy.{name}: needs curvature.kind {expected}, found {config.curvature.kind}")
        if not (method.curvature is None or method.sums):
            problems.append(
                f"strategy.{name}: needs the sums over tasks; merge.method {method.name} keeps one task's curvature"
            )
    if (strategy.joint or strategy.individual) and (config.start_from or config.max_forgetting is not None):
        problems.append("strategy: joint and individual continue no adapter; leave out start_from and max_forgetting")
    if strategy.individual and config.head.kind == "lda":
        problems.append("head.kind: lda is one head for all tasks; individual has one a task: use linear")
    return problems


def _evaluation_problems(config: RunConfig) -> list[str]:
    training, patience, share = config.training, config.early_stopping_patience, config.stream.eval_share
    best, metric = bool(training.get("load_best_model_at_end")), training.get("metric_for_best_model")
    known = ["loss", "accuracy"] if config.kind.has_head else ["loss"]
    checks = [
        (
            share is not None
            or not (_evaluates(training) or best or patience or training.get("save_strategy") == "best"),
            "training: eval_strategy and load_best_model_at_end need rows to evaluate on; set stream.eval_share, "
            "the share of a task's training rows that is held out for it",
        ),
        (
            training.get("save_strategy") != "best" or metric is not None,
            "training.save_strategy: best needs training.metric_for_best_model, and evaluations to judge by",
        ),
        (patience is None or best, "early_stopping_patience: needs training.load_best_model_at_end: true"),
        (
            metric is None or str(metric).removeprefix("eval_") in known,
            f"training.metric_for_best_model: {config.stream.kind} has {' and '.join(known)}, found {metric}",
        ),
    ]
    return [message for fine, message in checks if not fine]


def _evaluates(training: Mapping) -> bool:
    """Whether `training` asks for evaluations during a task's training."""
    return training.get("eval_strategy", "no") not in ("no", False) or bool(training.get("eval_on_start"))


def perturbation_problems(scale: float, probabilities: Sequence[float]) -> list[str]:
    """What is wrong with ε and the probabilities; empty if nothing is."""
    problems = []
    if not 0 <= scale < 1:
        problems.append(f"perturbation scale must be in [0, 1), found {scale}")
    if len(probabilities) != 3 or min(probabilities) < 0 or not math.isclose(sum(probabilities), 1, abs_tol=1e-6):
        problems.append(f"probabilities must be three values >= 0 that sum to 1, found {list(probabilities)}")
    elif not math.isclose(probabilities[1], probabilities[2], abs_tol=1e-9):
        problems.append(
            f"the probabilities of 1+ε and 1−ε must be equal, found {probabilities[1]} and {probabilities[2]}: "
            "otherwise a first-order term remains and the expected gradient is biased"
        )
    return problems
