"""The mathematics: low-rank matrices, curvature, coefficients, merging methods. Imports torch and safetensors only."""

from pm_hf.merging.curvature import Curvature
from pm_hf.merging.lowrank import LowRank, Matrix
from pm_hf.merging.methods import METHODS, Method, Option, get_method, read_options
from pm_hf.merging.solve import Coefficient, free_solution, optimal_coefficient

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
