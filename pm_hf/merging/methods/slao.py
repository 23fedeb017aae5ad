"""SLAO: a merge of the factors themselves."""

import math
from collections.abc import Mapping

import torch

from pm_hf.errors import InputError
from pm_hf.merging.lowrank import LowRank
from pm_hf.merging.methods.base import SUM_COST, Matrix, Method


def slao(matrix: Matrix, state: Mapping[str, float]) -> LowRank:
    """SLAO's merge: A ← A_t, B ← B + (B_t − B)/√t (arXiv 2512.23017). Sequential; data-free.

    terms: (running merge, task); state: {"tasks": t}, the new task counted. It works on the factors themselves (the
    task's scaling is in B), so their ranks must be equal, and the running merge must not have been truncated in
    between. A module that one side lacks (rank 0) has the factors of the other side with B = 0. InputError: ranks
    differ. Cost: that of a sum.
    """
    running, task = matrix.terms
    step = 1 / math.sqrt(state["tasks"])
    if task.rank == 0:
        return running.scale(1 - step)
    if running.rank == 0:
        return task.scale(step)
    if running.rank != task.rank:
        raise InputError(
            f"slao merges the factors, so ranks must be equal: {matrix.name} has {running.rank} in the running merge, "
            f"{task.rank} in the task; train with one rank and merge without max_rank, or use another method"
        )
    return LowRank(torch.lerp(running.B, task.B, step), task.A)


SLAO = Method(
    "slao",
    "A ← A_t, B ← B + (B_t − B)/√t on the factors, ranks all equal",
    "SLAO, arXiv 2512.23017",
    "nothing",
    SUM_COST,
    fold=True,
    batch=False,
    train_from="last",
    starts=("last", "base"),
    kernel=slao,
    factors=True,
    in_streams=True,
)
