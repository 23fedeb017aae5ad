"""The mathematics: low-rank matrices, curvature, coefficients. Imports torch and safetensors only."""

from pm_hf.merging.curvature import Curvature
from pm_hf.merging.lowrank import LowRank
from pm_hf.merging.methods import METHODS
from pm_hf.merging.solve import Coefficient, free_solution, optimal_coefficient

__all__ = ["METHODS", "Coefficient", "Curvature", "LowRank", "free_solution", "optimal_coefficient"]
