"""The mathematics of merging: tensors in, tensors out; no model, no path but its own files, no settings."""

from pm_hf.merging.coefficient import Coefficient, free_solution, optimal_coefficient
from pm_hf.merging.curvature import Curvature
from pm_hf.merging.lowrank import LowRank
from pm_hf.merging.methods import METHODS, get_method, read_options
from pm_hf.merging.methods.base import Matrix, Method, Option

__all__ = [
    "METHODS",
    "Coefficient",
    "Curvature",
    "LowRank",
    "Matrix",
    "Method",
    "Option",
    "free_solution",
    "get_method",
    "optimal_coefficient",
    "read_options",
]
