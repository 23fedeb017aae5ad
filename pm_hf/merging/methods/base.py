"""What merging methods share: the matrix that a kernel sees, a method's row and options, blocks of rows, weights."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from pm_hf.errors import InputError
from pm_hf.merging.coefficient import Coefficient
from pm_hf.merging.curvature import Curvature
from pm_hf.merging.lowrank import LowRank, row_slices, weighted_sum
from pm_hf.merging.order_statistics import kth_largest


@dataclass(frozen=True)
class Matrix:
    """One adapted matrix of all adapters: what a merging kernel sees.

    name: unique in the model: the module's name, with [i] for the i-th matrix of a fused parameter.
    terms: one (out, in) float32 product for each adapter, in order; rank 0 where an adapter lacks the module.
    weights: one factor for each adapter.
    curvature: one tensor for each adapter where the method needs it: Fisher (out, in) or Gram (in, in).
    """

    name: str
    terms: tuple[LowRank, ...]
    weights: tuple[float, ...]
    curvature: tuple[Tensor, ...] = ()

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.terms[0].shape


Value = float | int | str
Start = Literal["merged", "last", "base"]

# kernel(matrix: Matrix, state, **options) -> the merged matrix: low-rank and exact, or dense float32 (out, in). The
# state is what `prepare` or the learning found; in a fold without either it is {"tasks": t}.
Kernel = Callable[..., LowRank | Tensor]

# prepare(matrices: Callable[[], Iterator[Matrix]], past: Mapping | None, **options) -> state; each call of `matrices`
# streams the whole model again. Where the state has `to_save`, a dict of floats, the next fold gets it as `past`.
Prepare = Callable[..., Any]


@dataclass(frozen=True)
class Option:
    """A setting of a method: default, one line with its unit, and the values it may take.

    low, high: inclusive range of a number (None: unbounded). choices: the valid strings.
    """

    default: Value
    about: str
    low: float | None = None
    high: float | None = None
    choices: tuple[str, ...] = ()

    def read(self, given: object) -> Value:
        """The value in the default's type; ValueError, saying what was expected, if it cannot be."""
        kind = type(self.default)
        if isinstance(self.default, str):
            if given not in self.choices:
                raise ValueError(f"expected one of {', '.join(self.choices)}")
            return str(given)
        if isinstance(given, bool) or not isinstance(given, int | float | str):
            raise ValueError(f"expected {_number_kind(kind)}")
        return self._in_range(_convert(given, kind))

    def _in_range(self, value: float | int) -> float | int:
        low = -math.inf if self.low is None else self.low
        high = math.inf if self.high is None else self.high
        if not low <= value <= high or math.isinf(value):
            raise ValueError(f"expected a value in [{low:g}, {high:g}]")
        return value


@dataclass(frozen=True)
class Fold:
    """What decides the coefficient of a task that is folded into a running merge.

    tasks: t, this one included. first: whether there is no running merge yet. options: the method's settings.
    curvature: the sums that include this task, None where none were given. measured: number of tasks that they must
    cover; into: the running merge in words. vectors: (Δ, θ̂_{t−1} − θ0) by module, (out, in), read when asked for.
    freedom: one coefficient for the model, or one for each module.
    """

    tasks: int
    first: bool
    options: Mapping[str, Any]
    curvature: Curvature | None
    measured: int
    into: str
    vectors: Callable[[Curvature], tuple[Mapping[str, LowRank], Mapping[str, LowRank]]]
    freedom: Literal["global", "module"] = "global"


@dataclass(frozen=True)
class Method:
    """What a method computes, what it needs, and where its training starts.

    name: how it is asked for. about: its equation in one line. needs: the data it needs besides the adapters. cost: the
    dominant work. fold: can fold one new adapter into a running merge (terms = running merge, task). batch: can merge N
    at once. train_from: the model that a task must be trained from for the method's mathematics to hold: the running
    merge, the last task's optimum, or the pretrained base. Methods with "last" or "base" take task vectors relative to
    θ0. starts: all models from which a task may be trained. coefficient: α of a fold without a kernel (`Fold` says from
    what); None where it only merges several. kernel: None means Σ wᵢΔᵢ. prepare: what must be known of the whole model
    first. saves: names of the numbers in its state's `to_save`, `tasks` among them. dense: the kernel returns a dense
    tensor, which has to be factored. weight: default weight of each of N adapters; None is 1/N. curvature: "sums" is
    the running file of all tasks, "fisher" and "gram" are one file for each adapter. learned: what of each matrix is
    learned from unlabelled inputs, a list with an entry for each adapter. factors: works on A and B themselves, not on
    their product, so the running merge must keep its factors. in_streams: whether a stream of tasks may use it.
    """

    name: str
    about: str
    paper: str
    needs: str
    cost: str
    fold: bool
    batch: bool
    train_from: Start
    starts: tuple[Start, ...]
    coefficient: Callable[[Fold], Coefficient] | None = None
    kernel: Kernel | None = None
    prepare: Prepare | None = None
    saves: tuple[str, ...] = ()
    dense: bool = False
    weight: float | None = None
    curvature: Literal["sums", "fisher", "gram"] | None = None
    learned: tuple[str, ...] = ()
    factors: bool = False
    in_streams: bool = False
    options: Mapping[str, Option] = field(default_factory=dict)

    @property
    def sums(self) -> bool:
        """Whether it reads the curvature of all tasks added up; otherwise one of each adapter, or none."""
        return self.curvature == "sums"


SUM_COST = "a weighted sum of the factors"
DENSE_COST = "a dense matrix for each adapter of a module"
TINY = 1e-12  # the lowest value of an option for which 0 makes no sense
TRIM = Option(0.2, "share of the entries of a task vector that is kept, the largest, in (0, 1]", TINY, 1.0)
STEP = Option(0.4, "λ, weight of the new task against the running merge, in [0, 1]", 0.0, 1.0)


def _convert(given: int | float | str, kind: type) -> float | int:
    """An int or a float that is not NaN; ValueError otherwise."""
    try:
        number = float(given)
    except (ValueError, OverflowError):
        number = math.nan
    if math.isnan(number) or (kind is int and not number.is_integer()):
        raise ValueError(f"expected {_number_kind(kind)}")
    return int(number) if kind is int else number


def _number_kind(kind: type) -> str:
    return "an integer" if kind is int else "a number"


ROW_BLOCK = 2**20  # entries of a block of rows


def mean_weights(matrix: Matrix) -> Tensor:
    """wᵢ/Σw, (N,) float64; InputError when they are no weights of a mean."""
    w = torch.tensor(matrix.weights, dtype=torch.float64)
    if w.min() < 0 or w.sum() == 0:
        raise InputError(f"a mean needs weights that are 0 or more and not all 0, found {list(matrix.weights)}")
    return w / w.sum()


def smallest_kept(term: LowRank, density: float) -> float:
    """The smallest magnitude, in float32, of the int(density·out·in) largest entries; ∞ if that is none."""
    count = int(density * term.shape[0] * term.shape[1])
    return kth_largest(lambda: (tau for _, tau in row_blocks(term)), count) if count else math.inf


def row_blocks(term: LowRank) -> Iterator[tuple[slice, Tensor]]:
    """The dense product, block by block of rows; the same rounding whenever it is made again."""
    for rows in row_slices(term.shape, ROW_BLOCK):
        yield rows, term.B[rows] @ term.A


def map_rows(matrix: Matrix, merge: Callable[[slice, Tensor], Tensor]) -> Tensor:
    """`merge` of the stacked dense terms (N, rows, in), so that they never stand side by side whole."""
    merged = matrix.terms[0].B.new_empty(matrix.shape)
    for rows in row_slices(matrix.shape, ROW_BLOCK):
        merged[rows] = merge(rows, torch.stack([term.B[rows] @ term.A for term in matrix.terms]))
    return merged


def trim(tau: Tensor, lowest: Sequence[float]) -> Tensor:
    """The entries of each τᵢ, (N, rows, in), whose magnitude reaches lowest[i]; 0 for the others."""
    return tau * (tau.float().abs() >= torch.tensor(lowest)[:, None, None])


def weighted_rows(tau: Tensor, weights: Sequence[float]) -> Tensor:
    """Σ wᵢτᵢ of a block, (rows, in), from (N, rows, in)."""
    return (tau * torch.tensor(weights, dtype=tau.dtype)[:, None, None]).sum(0)


def from_core(U: Tensor, core: Tensor, V: Tensor, matrix: Matrix) -> LowRank:
    """U core Vᵀ with the core inside the factor that leaves the smaller rank; the zero matrix where it is empty."""
    if core.numel() == 0:
        return weighted_sum(matrix.terms, [0.0] * len(matrix.terms))
    whole = LowRank(U @ core, V.T) if core.shape[1] <= core.shape[0] else LowRank(U, core @ V.T)
    return whole.to(dtype_of(matrix))


def dtype_of(matrix: Matrix) -> torch.dtype:
    """Dtype of a matrix's terms, which its merge gets."""
    return matrix.terms[0].B.dtype
