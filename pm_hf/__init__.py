"""pm_hf: continual fine-tuning by merging for Transformers and PEFT (Perturb-and-Merge, arXiv 2505.22389)."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pm_hf.adapters.inspection import describe as describe
    from pm_hf.adapters.inspection import inspect_adapters as inspect_adapters
    from pm_hf.adapters.inspection import relate as relate
    from pm_hf.adapters.merge import MergeReport as MergeReport
    from pm_hf.adapters.merge import merge_adapters as merge_adapters
    from pm_hf.data.pool import Pool as Pool
    from pm_hf.errors import InputError as InputError
    from pm_hf.measuring.curvature import estimate_curvature as estimate_curvature
    from pm_hf.measuring.learned_coefficients import learn_coefficients as learn_coefficients
    from pm_hf.merging.coefficient import Coefficient as Coefficient
    from pm_hf.merging.coefficient import optimal_coefficient as optimal_coefficient
    from pm_hf.merging.curvature import Curvature as Curvature
    from pm_hf.runs.learner import evaluate as evaluate
    from pm_hf.runs.learner import learn as learn
    from pm_hf.runs.merge_line import merge_line as merge_line
    from pm_hf.runs.records import Report as Report
    from pm_hf.runs.written_rows import WrittenRows as WrittenRows
    from pm_hf.runs.written_rows import label_rows as label_rows
    from pm_hf.runs.written_rows import write_rows as write_rows
    from pm_hf.training.rehearsal import RehearsalMixin as RehearsalMixin
    from pm_hf.training.trainer import PerturbationArguments as PerturbationArguments
    from pm_hf.training.trainer import PerturbationMixin as PerturbationMixin
    from pm_hf.training.trainer import PMConfig as PMConfig
    from pm_hf.training.trainer import PMTrainer as PMTrainer

__version__ = "0.1.0"

# names are imported when they are used: the mathematics needs neither transformers nor peft
_HOME = {
    "Coefficient": "pm_hf.merging.coefficient",
    "Curvature": "pm_hf.merging.curvature",
    "InputError": "pm_hf.errors",
    "MergeReport": "pm_hf.adapters.merge",
    "PMConfig": "pm_hf.training.trainer",
    "PMTrainer": "pm_hf.training.trainer",
    "PerturbationArguments": "pm_hf.training.trainer",
    "PerturbationMixin": "pm_hf.training.trainer",
    "Pool": "pm_hf.data.pool",
    "RehearsalMixin": "pm_hf.training.rehearsal",
    "Report": "pm_hf.runs.records",
    "WrittenRows": "pm_hf.runs.written_rows",
    "describe": "pm_hf.adapters.inspection",
    "estimate_curvature": "pm_hf.measuring.curvature",
    "evaluate": "pm_hf.runs.learner",
    "inspect_adapters": "pm_hf.adapters.inspection",
    "label_rows": "pm_hf.runs.written_rows",
    "learn": "pm_hf.runs.learner",
    "learn_coefficients": "pm_hf.measuring.learned_coefficients",
    "merge_adapters": "pm_hf.adapters.merge",
    "merge_line": "pm_hf.runs.merge_line",
    "optimal_coefficient": "pm_hf.merging.coefficient",
    "relate": "pm_hf.adapters.inspection",
    "write_rows": "pm_hf.runs.written_rows",
}
__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'pm_hf' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
