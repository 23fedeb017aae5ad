"""The merging methods, one literal table."""

from dataclasses import dataclass
from typing import Literal

from pm_hf.errors import InputError


@dataclass(frozen=True)
class Method:
    """What a method needs and where its training starts.

    fold: works as `θ̂_t = θ̂_{t−1} + αΔ_t`, one new adapter into the running merge. batch: merges N adapters at once.
    train_from: the model that task t must be trained from for the method's mathematics to hold.
    """

    about: str
    paper: str
    needs: str
    fold: bool
    batch: bool
    train_from: Literal["merged"] = "merged"


METHODS = {
    "pm": Method(
        "α = Δᵀ(M − Sθ̂)/ΔᵀSΔ, the closed-form optimum for the curvature given",
        "Perturb-and-Merge, arXiv 2505.22389",
        "a curvature file",
        fold=True,
        batch=False,
    ),
    "average": Method(
        "α = 1/t, the running mean of the task optima; with N adapters Σ wᵢΔᵢ (wᵢ = 1/N)",
        "model soups, arXiv 2203.05482",
        "nothing",
        fold=True,
        batch=True,
    ),
    "sequential": Method("α = 1, plain sequential training", "–", "nothing", fold=True, batch=False),
}


def get_method(name: str) -> Method:
    """The method, or an InputError that lists the valid names."""
    if name not in METHODS:
        raise InputError(f"unknown merging method {name!r}; valid: {', '.join(METHODS)}")
    return METHODS[name]
