"""`merge_adapters`: adapter folders in, one plain PEFT adapter out, without the base model."""

import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from pm_hf.adapters.download import adapter_folder
from pm_hf.adapters.folder import Adapter, Update, cast_error, is_finite, open_adapter, write_adapter
from pm_hf.adapters.layout import ADAPTER_FILES, CARD_FILE, MERGE_REPORT
from pm_hf.adapters.plan import Curvatures, LearnedSource, Plan, Request, make_plan, make_request, request_problems
from pm_hf.adapters.saved_modules import merge_saved, roots
from pm_hf.environment import PeakMemory, versions
from pm_hf.errors import InputError, raise_all
from pm_hf.files import free_space_problem, output_problems
from pm_hf.merging.coefficient import Coefficient, Freedom, free_solution
from pm_hf.merging.lowrank import LowRank, from_dense, weighted_sum
from pm_hf.merging.methods.base import Matrix

STORAGE_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class MergeReport:
    """What a merge did; written into the output as merge_report.json.

    tasks: number of tasks in the result. modules: {module: ranks in, rank out, relative Frobenius error of the
    truncation, coefficient}. heads: {tensor: how it was merged}. cast_error: relative error of the storage dtype.
    notes: what a user of the result should know.
    peak_memory_mb: largest anonymous resident memory while merging, null where /proc does not tell.
    """

    method: str
    freedom: str
    tasks: int
    coefficient: Coefficient | None
    weights: list[float] | None
    modules: dict[str, dict]
    heads: dict[str, str]
    inputs: list[str]
    options: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    peak_memory_mb: float | None = None
    cast_error: float = 0.0
    measured: int | None = None  # tasks whose curvature has weight in the result
    state: dict[str, float] | None = None  # what the method needs for its next fold
    tokenizer: str | None = None  # folder whose tokenizer names the rows of the result, None without one
    notes: list[str] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=lambda: versions(("pm_hf", "torch", "safetensors")))

    @property
    def error(self) -> float:
        """Largest relative Frobenius error over the modules."""
        return max(module["error"] for module in self.modules.values())


@dataclass(frozen=True)
class _Size:
    """What is kept of a merged matrix and how it is stored."""

    max_rank: int | None
    energy: float | None
    full: bool
    dtype: torch.dtype


def merge_adapters(
    adapters: str | os.PathLike | Sequence[str | os.PathLike],
    output: str | os.PathLike,
    *,
    into: str | os.PathLike | None = None,
    method: str = "pm",
    curvature: Curvatures = None,
    coefficient: float | None = None,
    freedom: Freedom = "global",
    weights: Sequence[float] | None = None,
    options: Mapping[str, Any] | None = None,
    learned: LearnedSource | None = None,
    rows_from: str | os.PathLike | None = None,
    max_rank: int | str | None = None,
    energy: float | None = None,
    dtype: str | torch.dtype | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
) -> MergeReport:
    """Fold one task adapter into the running merge, or merge N adapters, from their folders or Hub ids alone.

    adapters, into: folders, or Hub ids `owner/name[@revision][/subfolder]`. Fold: θ̂_t = θ̂_{t−1} + αΔ, with α from
    `curvature` (arXiv 2505.22389), from the method, or `coefficient`; without `into` the adapter is the first task.
    `freedom="free"` takes the optimum over the whole matrix instead. N adapters: Σ wᵢΔᵢ, or what the method makes of
    them (pm_hf.merging.METHODS; `options` are its settings). curvature: the file saved with the task, or for `lot`
    and `cofima` one for each adapter. learned: coefficients for `adamerging` and `adarank`.

    The result is exact, factors side by side, unless `max_rank` or `energy` (share of the squared norm) asks for
    the best approximation. Methods whose result is dense are factored to `max_rank`, by default the sum of the input
    ranks; "full" keeps all. Errors stand in the report. Computed in float32, decompositions and coefficients in
    float64, cast once to `dtype`. Tensors of `modules_to_save` are absolute values: heads merge by label (a new label
    appends its row; where a label has several rows in an adapter, all rows stand side by side), embeddings of tokens by
    token where the tokenizers beside the adapters differ, others by the same coefficient, and what only one adapter has
    is taken as it is; they keep their dtype, or are float32 where several were combined. Heads that differ and have no
    labels, and rows that no tokenizer names, are refused, or taken from the adapter `rows_from`, one of those given.
    One module is in memory at a time, beside the result.

    `output` gets adapter_model.safetensors, adapter_config.json, labels.json (with a head), merge_report.json and the
    files of the tokenizer that its rows belong to, where an adapter has one; it is read back and compared before it
    takes its name. Raises InputError before anything is written.
    """
    start = time.perf_counter()
    paths = [adapters] if isinstance(adapters, str | os.PathLike) else list(adapters)
    request = make_request(
        method,
        options,
        coefficient=coefficient,
        weights=weights,
        curvature=curvature,
        freedom=freedom,
        learned=learned,
    )
    problems = request_problems(request, len(paths), into is not None)
    raise_all(problems + _size_problems(request, max_rank, energy, dtype), "merge_adapters")
    storage = dtype if isinstance(dtype, torch.dtype) else STORAGE_DTYPES[dtype or "float32"]
    size = _Size(max_rank if isinstance(max_rank, int) else None, energy, max_rank == "full", storage)
    if not dry_run:
        problems = output_problems(Path(output), overwrite=overwrite, allowed=(*ADAPTER_FILES, CARD_FILE))
        if problems:
            raise InputError("; ".join(problems))
    with PeakMemory() as memory:
        opened = [open_adapter(adapter_folder(path)) for path in paths]
        running = None if into is None else open_adapter(adapter_folder(into))
        if not dry_run:
            _check_space(Path(output), [*opened, *([running] if running else [])], size)
        plan = make_plan(request, opened, running)
        given = [*([] if into is None else [into]), *paths]
        saved = merge_saved(plan, _named(rows_from, given, plan.adapters))
        with _threads(None if request.method.dense or plan.free else 1):
            updates, modules, rounding = _merge_modules(plan, size, keep=not dry_run)
        report = MergeReport(
            method,
            freedom,
            plan.tasks,
            plan.coefficient,
            plan.weights if plan.coefficient is None else None,
            modules,
            saved.how,
            [_traced(*pair) for pair in zip(given, plan.adapters, strict=True)],
            options=request.options,
            cast_error=rounding,
            measured=plan.measured,
            state=getattr(plan.state, "to_save", None),
            tokenizer=saved.tokenizer_of,
            notes=_notes(plan, modules),
        )

        def finished() -> MergeReport:
            """The report with what it took until now."""
            return replace(report, seconds=time.perf_counter() - start, peak_memory_mb=memory.peak_mb)

        if not dry_run:
            with _threads(1):
                write_adapter(
                    Path(output),
                    _template(plan),
                    updates,
                    saved.tensors,
                    saved.labels,
                    ambiguous=any(_leaves_some_out(adapter.config) for adapter in plan.adapters),
                    overwrite=overwrite,
                    extra={**saved.tokenizer, MERGE_REPORT: asdict(finished())},
                )
        return finished()


def _named(
    source: str | os.PathLike | None, given: Sequence[str | os.PathLike], adapters: Sequence[Adapter]
) -> Adapter | None:
    """The adapter that rows_from= names, one of those given."""
    if source is None:
        return None
    for name, adapter in zip(given, adapters, strict=True):
        if os.fspath(name) == os.fspath(source) or Path(source) == adapter.path:
            return adapter
    raise InputError(f"rows_from= names one of the adapters, found {source}; expected one of {[str(g) for g in given]}")


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """Torch with at most `count` threads: on thin factors more of them gain nothing, and lose seconds when a core is
    busy with something else."""
    before = torch.get_num_threads()
    torch.set_num_threads(min(before, count or before))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _template(plan: Plan) -> dict:
    """The last adapter's settings; what only an earlier one says of the base comes from there."""
    configs = [adapter.config for adapter in plan.adapters]
    about = {key: next((c[key] for c in configs if c.get(key)), None) for key in ("revision", "task_type")}
    return configs[-1] | about | {"modules_to_save": roots(plan.adapters)}


def _leaves_some_out(config: Mapping) -> bool:
    """Whether modules whose names end like those of the adapter were left alone."""
    return bool(config.get("exclude_modules")) or config.get("layers_to_transform") is not None


def _traced(source: str | os.PathLike, adapter: Adapter) -> str:
    """An input as it was given; for a Hub id with the commit that was used."""
    if Path(source) == adapter.path:
        return str(source)
    places = zip(*(adapter.path.parts[i:] for i in range(3)), strict=False)  # huggingface_hub's cache
    commits = [commit for model, name, commit in places if model.startswith("models--") and name == "snapshots"]
    return f"{source} (commit {commits[-1]})" if commits else str(source)


def _merge_modules(plan: Plan, size: _Size, keep: bool) -> tuple[dict[str, Update], dict[str, dict], float]:
    """({module: merged update}, {module: its line in the report}, largest error of the storage dtype)."""
    updates, lines, rounding = {}, {}, [0.0]
    for module in tqdm(plan.modules, desc="merging", unit="module", leave=False, disable=None):
        holders = [adapter for adapter in plan.adapters if module in adapter.layouts]
        layout, matrices, errors = plan.layout(module), [], []
        for matrix in plan.matrices(module):
            merged, error = _merge_matrix(plan, module, matrix, size)
            errors.append((error, merged.norm() if layout.count > 1 else 1.0))
            stored = merged.to(size.dtype)
            if not is_finite(stored.A) or not is_finite(stored.B):
                raise InputError(
                    f"{matrix.name}: merged values do not fit {size.dtype}; use dtype='float32' or 'bfloat16'"
                )
            rounding.append(cast_error(merged, size.dtype))
            matrices.append(stored)
        update = Update(layout, matrices, plan.has_bias(module))
        if keep:
            updates[module] = update
        whole = plan.free is None and plan.kernel is None and module in plan.adapters[-1].layouts
        lines[module] = {
            "ranks_in": [adapter.layouts[module].rank for adapter in holders],
            "rank_out": update.rank,
            "error": _joint(errors[: layout.count]),
            "coefficient": plan.coefficient.for_module(module) if plan.coefficient and whole else None,
        }
    return updates, lines, max(rounding)


def _notes(plan: Plan, modules: Mapping[str, Mapping[str, Any]]) -> list[str]:
    ranks = {line["rank_out"] for module, line in modules.items() if plan.layout(module).kind != "fused"}
    notes = []
    if len(ranks) > 1:
        notes.append(
            f"the modules have ranks from {min(ranks)} to {max(ranks)}, each with an alpha of its own (rank_pattern, "
            "alpha_pattern), as PEFT reads them; a tool that takes one alpha for all tensors, such as llama.cpp, would "
            "apply modules of a smaller rank too strongly"
        )
    whole = [adapter for adapter in plan.adapters if adapter.layouts]
    if len(whole) > 1 and not any(a.layouts.keys() & b.layouts.keys() for a, b in combinations(whole, 2)):
        notes.append("no module is adapted by two of the adapters; right if each was trained on other layers")
    return notes


def _merge_matrix(plan: Plan, module: str, matrix: Matrix, size: _Size) -> tuple[LowRank, float]:
    """The merged matrix in float32 and the relative error of its truncation."""
    if plan.free is not None and module in plan.adapters[-1].layouts:
        past = matrix.terms[0] if len(matrix.terms) == 2 and matrix.terms[0].rank else None
        limit = min(matrix.shape) if size.full else size.max_rank
        merged, error = free_solution(module, matrix.terms[-1], past, plan.free, limit)
        return merged.to(torch.float32), error
    if plan.kernel is None:
        return _reduce(weighted_sum(matrix.terms, matrix.weights), size)
    result = plan.kernel(matrix, plan.state, **plan.options)
    if isinstance(result, Tensor):
        return _factor(result, sum(term.rank for term in matrix.terms), size)
    return _reduce(result.to(torch.float32), size)


def _reduce(merged: LowRank, size: _Size) -> tuple[LowRank, float]:
    """Truncated if asked for; without loss where there are more factors than the matrix has dimensions."""
    full = merged.rank > min(merged.shape)
    if size.energy is None and not full and (size.max_rank is None or merged.rank <= size.max_rank):
        return merged, 0.0
    return merged.compress(size.max_rank, size.energy)


def _factor(dense: Tensor, rank: int, size: _Size) -> tuple[LowRank, float]:
    """A dense result as factors: all of it, or the best approximation of the rank that is asked for."""
    if size.full or (size.energy is not None and size.max_rank is None):
        return _reduce(from_dense(dense, None)[0], size)
    limit = rank if size.max_rank is None else size.max_rank
    merged, error = from_dense(dense, max(1, min(limit, *dense.shape)))
    if size.energy is None:
        return merged, error
    smaller, further = merged.compress(size.max_rank, size.energy)
    return smaller, math.hypot(error, further * merged.norm() / max(float(torch.linalg.norm(dense)), 1e-300))


def _joint(errors: Sequence[tuple[float, float]]) -> float:
    """Relative error of several matrices together, from each one's own and the norm of what was kept of it."""
    if len(errors) == 1:
        return errors[0][0]
    lost = math.hypot(*(error * norm / math.sqrt(1 - error**2) for error, norm in errors if norm))
    whole = math.hypot(lost, *(norm for _, norm in errors))  # what is lost is orthogonal to what is kept
    return lost / whole if whole else 0.0


def _size_problems(request: Request, max_rank: object, energy: float | None, dtype: object) -> list[str]:
    problems, name = [], request.method.name
    if request.method.factors and (max_rank is not None or energy is not None):
        problems.append(f"{name} merges the factors, which max_rank= and energy= would replace; leave them out")
    if max_rank not in (None, "full") and not (isinstance(max_rank, int) and max_rank is not True and max_rank > 0):
        problems.append(f"max_rank must be at least 1, or 'full', found {max_rank!r}")
    if energy is not None and not 0 < energy <= 1:
        problems.append(f"energy must be in (0, 1], found {energy}")
    if energy is not None and max_rank == "full":
        problems.append("max_rank='full' keeps all, energy= does not; give one of them")
    if energy is not None and request.freedom == "free":
        problems.append("energy= cannot be used with freedom='free'; use max_rank=")
    if dtype is not None and dtype not in (*STORAGE_DTYPES, *STORAGE_DTYPES.values()):
        problems.append(f"dtype must be one of {', '.join(STORAGE_DTYPES)}, found {dtype!r}")
    return problems


def _check_space(output: Path, adapters: Sequence[Adapter], size: _Size) -> None:
    """InputError when the disk has no room for the factors of all adapters; a truncated result may be smaller."""
    layouts = [layout for adapter in adapters for layout in adapter.layouts.values()]
    needed = sum(math.prod(layout.A) + math.prod(layout.B) for layout in layouts) * size.dtype.itemsize
    needed = 0 if size.max_rank or size.energy else needed
    if problem := free_space_problem(output, needed):
        raise InputError(problem)
