"""The merging methods, one literal table, and their options."""

from collections.abc import Mapping
from typing import Any

from pm_hf.errors import InputError, raise_all
from pm_hf.merging.methods.adamerging import adamerging, adamerging_trimmed, adarank
from pm_hf.merging.methods.base import DENSE_COST, DROP, MAJORITY, SEED, STEP, SUM_COST, TINY, TRIM, Method, Option
from pm_hf.merging.methods.curvature_weighted import cofima, lot
from pm_hf.merging.methods.doge import doge, largest_entries
from pm_hf.merging.methods.lore import lore
from pm_hf.merging.methods.magmax import magmax
from pm_hf.merging.methods.opcm import opcm, opcm_scale
from pm_hf.merging.methods.slao import slao
from pm_hf.merging.methods.ties import dare, dare_ties, ties

METHODS: dict[str, Method] = {
    "pm": Method(
        "α = Δᵀ(M − Sθ̂)/ΔᵀSΔ, the closed-form optimum for the curvature given",
        "Perturb-and-Merge, arXiv 2505.22389",
        "a curvature file",
        "three sums over a module's curvature",
        fold=True,
        batch=False,
        train_from="merged",
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
    ),
    "average": Method(
        "α = 1/(t + prior), the running mean of the task optima; with N adapters Σ wᵢΔᵢ (wᵢ = 1/N)",
        "model soups, arXiv 2203.05482",
        "nothing",
        SUM_COST,
        fold=True,
        batch=True,
        train_from="merged",
        options={"prior": Option(0.0, "number of models that the base counts as in a fold's mean, 0 or more", 0.0)},
    ),
    "sequential": Method(
        "α = 1, plain sequential training", "–", "nothing", SUM_COST, fold=True, batch=False, train_from="merged"
    ),
    "coma": Method(
        "α = λ, θ̂_t = (1−λ)θ̂_{t−1} + λθ*_t",
        "CoMA, arXiv 2312.08977",
        "nothing",
        SUM_COST,
        fold=True,
        batch=False,
        train_from="merged",
        options={"coefficient": STEP},
    ),
    "cofima": Method(
        "θ = Σ wᵢFᵢθᵢ / Σ wᵢFᵢ per entry; in a fold w = (1−λ, λ)",
        "CoFiMA, arXiv 2312.08977; Fisher merging, arXiv 2111.09832",
        "one diagonal Fisher for each adapter",
        DENSE_COST,
        fold=True,
        batch=True,
        train_from="merged",
        kernel=cofima,
        dense=True,
        curvature="fisher",
        options={"coefficient": STEP},
    ),
    "task_arithmetic": Method(
        "Σ wᵢτᵢ (wᵢ = 0.3)",
        "task arithmetic, arXiv 2212.04089",
        "nothing",
        SUM_COST,
        fold=False,
        batch=True,
        train_from="base",
        weight=0.3,
    ),
    "ties": Method(
        "trim each τᵢ to its largest entries, elect a sign for each entry, mean of the wᵢτᵢ that agree",
        "TIES-Merging, arXiv 2306.01708, algorithm 1",
        "nothing",
        DENSE_COST,
        fold=False,
        batch=True,
        train_from="base",
        kernel=ties,
        dense=True,
        weight=1.0,
        options={"density": TRIM, "majority": MAJORITY},
    ),
    "dare": Method(
        "Σ wᵢ mᵢ∘τᵢ/(1−p), mᵢ random with P(0) = p (wᵢ = 0.3)",
        "DARE, arXiv 2311.03099",
        "nothing",
        DENSE_COST,
        fold=False,
        batch=True,
        train_from="base",
        kernel=dare,
        dense=True,
        weight=0.3,
        options={"density": DROP, "seed": SEED},
    ),
    "dare_ties": Method(
        "TIES with the random drop and rescale of DARE in place of trimming",
        "DARE, arXiv 2311.03099, with TIES-Merging, arXiv 2306.01708",
        "nothing",
        DENSE_COST,
        fold=False,
        batch=True,
        train_from="base",
        kernel=dare_ties,
        dense=True,
        weight=1.0,
        options={"density": DROP, "majority": MAJORITY, "seed": SEED},
    ),
    "magmax": Method(
        "per entry the wᵢτᵢ whose |τᵢ| is largest",
        "MagMax, arXiv 2407.06322",
        "nothing",
        DENSE_COST,
        fold=True,
        batch=True,
        train_from="last",
        kernel=magmax,
        dense=True,
        weight=1.0,
    ),
    "opcm": Method(
        "P_t = (λ_{t−1}P_{t−1} + τ_t projected off the leading directions of P_{t−1})/λ_t",
        "OPCM, arXiv 2501.09522, algorithm 1",
        "nothing",
        "twice a QR and an SVD of R×R a module",
        fold=True,
        batch=False,
        train_from="base",
        kernel=opcm,
        prepare=opcm_scale,
    ),
    "lot": Method(
        "Θ = (Σ wᵢΘᵢGᵢ)(Σ wᵢGᵢ)⁺, the optimum of Σ wᵢ‖(Θ − Θᵢ)Xᵢ‖²",
        "LOT Merging, arXiv 2505.23859; RegMean, arXiv 2212.09849",
        "one Gram file for each adapter",
        "a Cholesky factor of in×in a module",
        fold=False,
        batch=True,
        train_from="base",
        kernel=lot,
        curvature="gram",
        options={
            "scale": Option(1.0, "factor of the merged matrix; the paper uses 1 to 1.5", TINY),
            "shrinkage": Option(0.0, "ρ of (1−ρ)G + ρ·diag(G), on top of what the file has, in [0, 1]", 0.0, 1.0),
        },
    ),
    "lore": Method(
        "θ_0 + λ Σ wᵢδᵢ from min Σ wᵢ(½‖θ_0 + δᵢ − θᵢ‖² + μ‖δᵢ‖_*), by turns",
        "LoRE-Merging, arXiv 2502.10749, algorithm 1",
        "nothing",
        "an SVD of R×R for each adapter and round of a module",
        fold=False,
        batch=True,
        train_from="base",
        kernel=lore,
        options={
            "threshold": Option(0.01, "μ, what every singular value loses, in units of the weights", 0.0),
            "rounds": Option(20, "number of alternations, at least 1", 1),
            "scale": Option(1.0, "λ, factor of the mean low-rank part", 0.0),
        },
    ),
    "doge": Method(
        "Σ λᵢ mᵢ∘(τᵢ + D), D learned from the task vectors off their shared subspace, λᵢ = wᵢ·0.07/‖τᵢ‖",
        "DOGE, arXiv 2501.01230, algorithm 1",
        "nothing",
        "400 times two dense products a module (minutes at 4096×4096); reads the model twice more",
        fold=False,
        batch=True,
        train_from="base",
        kernel=doge,
        prepare=largest_entries,
        dense=True,
        weight=1.0,
        options={
            "scale": Option(0.07, "η of λᵢ = wᵢη/‖τᵢ‖, in units of the weights' norm", TINY),
            "learning_rate": Option(1e-4, "step size of Adam, in units of the weights", 0.0),
            "steps": Option(400, "number of Adam steps, 0 or more", 0),
            "keep": Option(0.3, "share of a task vector's entries to keep, over the whole model, in (0, 1]", TINY, 1),
        },
    ),
    "slao": Method(
        "A ← A_t, B ← B + (B_t − B)/√t on the factors, ranks all equal",
        "SLAO, arXiv 2512.23017",
        "nothing",
        SUM_COST,
        fold=True,
        batch=False,
        train_from="last",
        kernel=slao,
        factors=True,
    ),
    "adamerging": Method(
        "Σ λᵢτᵢ, λᵢ learned for each module to minimise the prediction entropy",
        "AdaMerging, arXiv 2310.02575",
        "coefficients learned from unlabelled inputs",
        SUM_COST,
        fold=False,
        batch=True,
        train_from="base",
        kernel=adamerging,
        learned=True,
    ),
    "adamerging++": Method(
        "AdaMerging of task vectors that are trimmed as TIES does",
        "AdaMerging++, arXiv 2310.02575",
        "coefficients learned from unlabelled inputs",
        DENSE_COST,
        fold=False,
        batch=True,
        train_from="base",
        kernel=adamerging_trimmed,
        dense=True,
        learned=True,
        options={"density": TRIM},
    ),
    "adarank": Method(
        "Σ λᵢ Uᵢ(mᵢ∘Sᵢ)Vᵢᵀ, λᵢ and the 0/1 masks mᵢ learned to minimise the prediction entropy",
        "AdaRank, arXiv 2503.22178",
        "coefficients and masks learned from unlabelled inputs",
        "a QR and an SVD of r×r for each adapter of a module",
        fold=False,
        batch=True,
        train_from="base",
        kernel=adarank,
        learned=True,
    ),
}


def get_method(name: str) -> Method:
    """The method, or an InputError that lists the valid names."""
    if name not in METHODS:
        raise InputError(f"unknown merging method {name!r}; valid: {', '.join(METHODS)}")
    return METHODS[name]


def read_options(method_name: str, given: Mapping[str, Any] | None) -> dict[str, Any]:
    """All options of a method: those given, converted to their type ("0.2" → 0.2), defaults for the others.

    One InputError lists every unknown key and every value that is out of range.
    """
    options = get_method(method_name).options
    found: dict[str, Any] = {key: option.default for key, option in options.items()}
    problems = []
    for key, value in (given or {}).items():
        if key not in options:
            problems.append(f"unknown option {key!r}; valid: {', '.join(options) or 'none'}")
            continue
        try:
            found[key] = options[key].read(value)
        except ValueError as error:
            problems.append(f"option {key} must fit {options[key].about!r}: {error}, found {value!r}")
    raise_all(problems, f"method {method_name}")
    return found
