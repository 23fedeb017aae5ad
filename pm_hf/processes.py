"""Several processes of one run (torch.distributed): who writes, what is summed. Alone, everything is a plain call."""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from torch import Tensor, distributed

from pm_hf.errors import InputError

Result = TypeVar("Result")


class OtherProcessError(RuntimeError):
    """Another process failed, so this one stops too; the message names that process's error."""


def process_count() -> int:
    """Number of processes of the run, 1 without a process group."""
    return distributed.get_world_size() if _grouped() else 1


def process_index() -> int:
    """This process's number, 0 is the one that writes."""
    return distributed.get_rank() if _grouped() else 0


def on_main(function: Callable[[], Result]) -> Result:
    """Run `function` in process 0 alone; every process gets its result, which must pickle.

    Where it raises, process 0 raises its error and the others OtherProcessError. The others wait as long as the
    process group's timeout allows (`ddp_timeout` of TrainingArguments).
    """
    if process_count() == 1:
        return function()
    box: list[Any] = [None, None]  # result, what failed
    try:
        if process_index() == 0:
            box[0] = function()
    except BaseException as error:
        box[1] = f"{type(error).__name__}: {error}"
        raise
    finally:
        distributed.broadcast_object_list(box, src=0)
    if box[1] is not None:
        raise OtherProcessError(f"process 0 failed: {box[1]}")
    return box[0]


def together(function: Callable[[], Result]) -> Result:
    """Run `function` in every process; where one raises, all do, so that none waits for it for ever.

    `function` must not communicate between processes itself.
    """
    result, failed = None, None
    try:
        result = function()
    except BaseException as error:
        failed = error
    problems: list[Any] = [None] * process_count()
    if process_count() > 1:
        distributed.all_gather_object(problems, None if failed is None else f"{type(failed).__name__}: {failed}")
    if failed is not None:
        raise failed
    for index, problem in enumerate(problems):
        if problem is not None:
            raise OtherProcessError(f"process {index} failed: {problem}")
    return result  # type: ignore[return-value]


def any_process(flag: bool) -> bool:
    """Whether `flag` is set in any process."""
    if process_count() == 1:
        return flag
    flags: list[Any] = [None] * process_count()
    distributed.all_gather_object(flags, flag)
    return any(flags)


def sum_counts(count: int) -> int:
    """Sum over the processes of a number that must be positive in each; InputError in all where it is not."""
    counts: list[Any] = [count] * process_count()
    if process_count() > 1:
        distributed.all_gather_object(counts, count)
    if min(counts) < 1:
        raise InputError(f"each of {len(counts)} processes needs at least one example, found {counts}")
    return sum(counts)


def sum_over_processes(tensors: Mapping[str, Tensor]) -> None:
    """Replace each tensor by its sum over the processes; all must have the same names and shapes."""
    if process_count() == 1:
        return
    for name in sorted(tensors):
        distributed.all_reduce(tensors[name])


def _grouped() -> bool:
    return distributed.is_available() and distributed.is_initialized()
