"""What the config's strategy adds to the training of one task: where it starts, penalties, averaging."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import TrainerCallback

from pm_hf.adapter_writer import Update, write_adapter
from pm_hf.adapters import open_adapter
from pm_hf.errors import InputError
from pm_hf.fisher import adapted_layers
from pm_hf.merge import merge_adapters
from pm_hf.merging.curvature import Curvature
from pm_hf.merging.lowrank import LowRank, compact_svd, weighted_sum
from pm_hf.merging.methods import get_method
from pm_hf.modeling import MERGED, TASK, TaskModel, find_head
from pm_hf.penalties import BaseDivergence, ElasticWeights, OrthogonalSubspaces, Penalty
from pm_hf.regularised import SequentialAveraging, orthonormal_start
from pm_hf.released import CHANGE, OPTIMUM, State
from pm_hf.settings import RunConfig


@dataclass(frozen=True)
class Start:
    """Where a task's training starts: with the adapter `frozen` in place, or with the factors of the last task."""

    train_from: str  # merged, last or base
    frozen: Path | None = None
    factors: Path | None = None


def start_of(config: RunConfig, state: State) -> Start:
    """The start that the merging method states (`train_from`), unless the config asks for another."""
    method = get_method(config.merge.method or "pm")
    where = "base" if config.strategy.individual else config.merge.train_from or method.train_from
    if method.factors:
        return Start(where, factors=state.optimum)
    return Start(where, {"merged": state.merged, "last": state.optimum, "base": None}[where])


def folded(folder: Path, start: Start, state: State, method: str, max_rank: int | None) -> Path:
    """The adapter folder that is folded: the trained adapter, or what it is together with the optimum it started from.

    Trained from the last optimum, a method that takes task vectors relative to the base gets the optimum itself, one
    that takes steps from the running merge gets θ*_t − θ̂_{t−1}, of no more than its own rank. The optimum is kept for
    the next task.
    """
    trained = folder / "adapter"
    if start.train_from != "last" or start.frozen is None:
        return trained
    merge_adapters(trained, folder / OPTIMUM, into=start.frozen, method="sequential", max_rank=max_rank)
    if get_method(method).train_from != "merged" or state.merged is None:
        return folder / OPTIMUM
    task, last, merged = (open_adapter(path) for path in (trained, start.frozen, state.merged))
    updates = {}
    for module, layout in task.layouts.items():
        parts = zip(*(adapter.read(module, bias=False) for adapter in (task, last, merged)), strict=True)
        updates[module] = Update(layout.merged, [_reduced(weighted_sum(part, [1.0, 1.0, -1.0])) for part in parts])
    saved = {name: task.tensor(name) for name in task.saved}
    write_adapter(folder / CHANGE, task.config, updates, saved, task.labels, ambiguous=False, overwrite=True, extra={})
    return folder / CHANGE


def _reduced(matrix: LowRank) -> LowRank:
    """The same matrix with as few factors as its numerical rank needs: those of the last optimum and of the running
    merge have most of their directions in common, and would double at every task."""
    U, s, Vh = compact_svd(matrix)
    root = s.sqrt()
    return LowRank(U * root, root[:, None] * Vh).to(matrix.B.dtype) if len(s) else matrix


def prepare(config: RunConfig, built: TaskModel, start: Start) -> None:
    """Give the task adapter the factors that its start names."""
    if start.factors is not None:
        orthonormal_start(built.model, TASK, open_adapter(start.factors))


def check_room(config: RunConfig, built: TaskModel, tasks: int) -> None:
    """InputError where O-LoRA's running merge could not hold the factors of `tasks` more tasks side by side."""
    if not config.strategy.olora_weight:
        return
    for name, layer in adapted_layers(built.model, TASK).items():
        past = layer.lora_A[MERGED].out_features if MERGED in layer.lora_A else 0
        rank, limit = past + config.lora.r * (tasks - 1), min(layer.in_features, layer.out_features)
        if rank > limit:
            raise InputError(
                f"strategy.olora_weight keeps the A of every task: rank {rank} before the last one, but {name} has "
                f"room for {limit}; use a smaller lora.r, or fewer tasks"
            )


def penalties(config: RunConfig, built: TaskModel, state: State) -> list[Penalty]:
    """The penalties of the strategy; none of those that need a past before the first task."""
    strategy, found = config.strategy, list[Penalty]()
    if strategy.ewc_weight and state.curvature is not None:
        found.append(ElasticWeights(built.model, TASK, Curvature.load(state.curvature), strategy.ewc_weight))
    if strategy.olora_weight and state.merged is not None:
        found.append(OrthogonalSubspaces(built.model, TASK, MERGED, strategy.olora_weight))
    if strategy.base_kl_weight:
        found.append(BaseDivergence(strategy.base_kl_weight, strategy.divergence))
    return found


def callbacks(config: RunConfig, built: TaskModel, state: State) -> Sequence[TrainerCallback]:
    """SFA's averaging, from the second task on."""
    strategy = config.strategy
    if not strategy.averaging_period or state.merged is None:
        return []
    shared = built.head is not None and config.stream.scenario == "domain_incremental"
    head = find_head(built.model, str(built.head)) if shared else None
    return [SequentialAveraging(built.model, TASK, head, strategy.averaging_period, strategy.averaging_weight)]
