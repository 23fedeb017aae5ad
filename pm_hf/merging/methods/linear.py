"""Methods that add factors up, Σ wᵢΔᵢ, and their rules for the coefficient α of θ̂_t = θ̂_{t−1} + αΔ."""

from dataclasses import replace

from pm_hf.errors import InputError
from pm_hf.merging.coefficient import Coefficient, ZeroCurvatureError, fixed_coefficient, optimal_coefficient
from pm_hf.merging.methods.base import STEP, SUM_COST, Fold, Method, Option


def closed_form(fold: Fold) -> Coefficient:
    """α_t = Δᵀ(M_t − S_tθ̂_{t−1})/ΔᵀS_tΔ (arXiv 2505.22389); 1 for a first task without curvature.

    InputError: no curvature, one that covers other tasks than those of the running merge and this one (unless the
    option `unmeasured_past` is "ignore": then the past has no weight), or one that is zero along Δ (unless
    `on_zero_curvature` is "average": then 1/t).
    """
    if fold.curvature is None:
        if fold.first:
            return fixed_coefficient(1.0, fold.tasks)
        raise InputError("method 'pm' needs curvature= (the file saved with the task) or coefficient=")
    covered = fold.curvature.tasks
    if covered != fold.measured and (fold.first or fold.options["unmeasured_past"] != "ignore"):
        raise InputError(
            f"the curvature covers {covered} task(s), but there is {fold.into}; use the file saved with this task "
            "(or the option unmeasured_past: ignore, if the past was never measured and shall have no weight)"
        )
    delta, merged = fold.vectors(fold.curvature)
    try:
        alpha = optimal_coefficient(delta, merged, fold.curvature, freedom=fold.freedom)
    except ZeroCurvatureError:
        if fold.options["on_zero_curvature"] != "average":
            raise
        share = 1.0 if fold.first else 1 / fold.tasks
        return fixed_coefficient(share, fold.tasks, "zero curvature: averaged", source="average")
    note = "the past was not measured, so it has no weight" if covered < fold.measured else alpha.note
    return replace(alpha, one_over_t=1 / fold.tasks, note=note)


def running_mean(fold: Fold) -> Coefficient:
    """α = 1/(t + prior), the mean of the optima and of the base counted `prior` times; a first merge has all of t."""
    new = fold.tasks if fold.first else 1
    return fixed_coefficient(new / (fold.tasks + fold.options["prior"]), fold.tasks, source="average")


def whole_step(fold: Fold) -> Coefficient:
    """α = 1."""
    return fixed_coefficient(1.0, fold.tasks)


def fixed_share(fold: Fold) -> Coefficient:
    """α = λ, 1 for the first task."""
    return fixed_coefficient(1.0 if fold.first else fold.options["coefficient"], fold.tasks)


PM = Method(
    "pm",
    "α = Δᵀ(M − Sθ̂)/ΔᵀSΔ, the closed-form optimum for the curvature given",
    "Perturb-and-Merge, arXiv 2505.22389",
    "a curvature file",
    "three sums over a module's curvature",
    fold=True,
    batch=False,
    train_from="merged",
    starts=("merged", "last"),
    curvature="sums",
    options={
        "on_zero_curvature": Option(
            "error",
            "what a zero curvature along the task vector means: refuse, or 1/t",
            choices=("error", "average"),
        ),
        "unmeasured_past": Option(
            "error", "earlier tasks without curvature: refuse, or give them no weight", choices=("error", "ignore")
        ),
    },
    coefficient=closed_form,
    in_streams=True,
)

AVERAGE = Method(
    "average",
    "α = 1/(t + prior), the running mean of the task optima; with N adapters Σ wᵢΔᵢ (wᵢ = 1/N)",
    "model soups, arXiv 2203.05482",
    "nothing",
    SUM_COST,
    fold=True,
    batch=True,
    train_from="merged",
    starts=("merged", "last"),
    options={"prior": Option(0.0, "number of models that the base counts as in a fold's mean, 0 or more", 0.0)},
    coefficient=running_mean,
    in_streams=True,
)

SEQUENTIAL = Method(
    "sequential",
    "α = 1, plain sequential training",
    "–",
    "nothing",
    SUM_COST,
    fold=True,
    batch=False,
    train_from="merged",
    starts=("merged",),
    coefficient=whole_step,
    in_streams=True,
)

COMA = Method(
    "coma",
    "α = λ, θ̂_t = (1−λ)θ̂_{t−1} + λθ*_t",
    "CoMA, arXiv 2312.08977",
    "nothing",
    SUM_COST,
    fold=True,
    batch=False,
    train_from="merged",
    starts=("merged", "last"),
    options={"coefficient": STEP},
    coefficient=fixed_share,
    in_streams=True,
)

TASK_ARITHMETIC = Method(
    "task_arithmetic",
    "Σ wᵢτᵢ (wᵢ = 0.3)",
    "task arithmetic, arXiv 2212.04089",
    "nothing",
    SUM_COST,
    fold=False,
    batch=True,
    train_from="base",
    starts=("last", "base"),
    weight=0.3,
)
