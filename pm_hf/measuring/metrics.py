"""Continual-learning metrics of an accuracy matrix R[t][i]: score on task i after task t, None where not evaluated."""

from collections.abc import Sequence
from statistics import fmean

ScoreMatrix = Sequence[Sequence[float | None]]


def average_accuracy(R: ScoreMatrix) -> float:
    """ACC: mean over tasks of the scores after the last task."""
    return fmean(_scores(R, len(R) - 1))


def average_anytime_accuracy(R: ScoreMatrix) -> float:
    """AAA: mean over t of the mean score on the tasks seen up to t."""
    return fmean(fmean(_scores(R, t)) for t in range(len(R)))


def backward_transfer(R: ScoreMatrix) -> float | None:
    """BWT: mean over earlier tasks of (score at the end − score when learned); None for one task."""
    last = _scores(R, len(R) - 1)
    changes = [last[i] - _at(R, i, i) for i in range(len(R) - 1)]
    return fmean(changes) if changes else None


def forgetting(R: ScoreMatrix) -> float | None:
    """Mean over earlier tasks of (best score before the end − score at the end), may be negative; None for one task."""
    drops = [drop for drop in task_forgetting(R) if drop is not None]
    return fmean(drops) if drops else None


def task_forgetting(R: ScoreMatrix) -> list[float | None]:
    """For each task: the best score it had before the end minus its score at the end; None where one of them is
    missing, as for the last task."""
    drops: list[float | None] = []
    for i, last in enumerate(R[-1]):
        before = [row[i] for row in R[i:-1]]
        scores = [score for score in before if score is not None]
        drops.append(max(scores) - last if scores and last is not None else None)
    return drops


def is_joint(R: ScoreMatrix) -> bool:
    """Whether all tasks were learned in one training: fewer rows than tasks."""
    return len(R) < len(R[0])


def summary(R: ScoreMatrix, *, lower_is_better: bool = False) -> dict[str, float | None]:
    """ACC, AAA, BWT and forgetting of a matrix; of a joint training, which has one row, ACC alone.

    Forgetting is positive where a task became worse.
    """
    if is_joint(R):
        scores = [score for score in R[-1] if score is not None]
        return {"ACC": fmean(scores), "AAA": None, "BWT": None, "forgetting": None}
    better = [[-x if lower_is_better and x is not None else x for x in row] for row in R]
    return {
        "ACC": average_accuracy(R),
        "AAA": average_anytime_accuracy(R),
        "BWT": backward_transfer(R),
        "forgetting": forgetting(better),
    }


def _scores(R: ScoreMatrix, t: int) -> list[float]:
    return [_at(R, t, i) for i in range(t + 1)]


def _at(R: ScoreMatrix, t: int, i: int) -> float:
    score = R[t][i]
    if score is None:
        raise ValueError(f"R[{t}][{i}] was not evaluated")
    return score
