"""Several processes of one run (torch.distributed): who writes, what is summed. Alone, everything is a plain call.

An expected error is raised by one process, which says why; the others raise OtherProcessError and stop too.
"""

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, distributed

from pm_hf.errors import InputError
from pm_hf.text import printable

Result = TypeVar("Result")


PATIENCE = timedelta(days=7)  # how long a process waits for another that merges, scores or writes


class Failure(NamedTuple):
    """What a process tells the others of its error."""

    process: int
    text: str
    bad_input: bool


class OtherProcessError(RuntimeError):
    """Another process failed, so this one stops too; the message names that process's error.

    bad_input: whether that error is an InputError.
    """

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure)
        self.bad_input = failure.bad_input

    def __str__(self) -> str:
        """The message."""
        return f"process {self.args[0].process} failed: {self.args[0].text}"


class _Channel:
    """The processes' own group for small objects, and how deep this process is in a function that it reports on."""

    depth = 0
    group: tuple[Any, Any] = (None, None)  # the default group when it was made, the group


def process_count() -> int:
    """Number of processes of the run, 1 without a process group."""
    return distributed.get_world_size() if _grouped() else 1


def process_index() -> int:
    """This process's number, 0 is the one that writes."""
    return distributed.get_rank() if _grouped() else 0


def interruptible() -> bool:
    """Whether an exception raised now reaches every process: alone, or inside what the two functions below run."""
    return process_count() == 1 or _Channel.depth > 0


def on_main_process(function: Callable[[], Result]) -> Result:
    """Run `function` in process 0 alone; every process gets its result, which must pickle.

    Where it raises, process 0 raises its error and the others OtherProcessError. The others wait for days if need be.
    `function` must not communicate between processes itself.
    """
    if process_count() == 1:
        return function()
    result = None
    try:
        if process_index() == 0:
            with _reported():
                result = function()
    except BaseException as error:
        with suppress(RuntimeError):  # the others may be gone already
            _from_main([None, _failure(error)])
        raise
    result, failure = _from_main([result, None])
    if failure is not None:
        raise OtherProcessError(failure)
    return result


def log_line(text: str) -> None:
    """One line on stderr, of the main process."""
    if process_index() == 0:
        print(printable(text), file=sys.stderr, flush=True)


def on_all_processes(function: Callable[[], Result]) -> Result:
    """Run `function` in every process; where one raises, all do, so that none waits for it for ever.

    The first process that failed raises its error, the others OtherProcessError. `function` must not communicate
    between processes itself.
    """
    if process_count() == 1:
        return function()
    result, error = None, None
    try:
        with _reported():
            result = function()
    except BaseException as caught:
        error = caught
    failures = gather(None if error is None else _failure(error))
    failure = next((failure for failure in failures if failure), None)
    if failure is None:
        return result  # type: ignore[return-value]
    if error is not None and failure.process == process_index():
        raise error
    raise OtherProcessError(failure) from error


def gather(value: Result) -> list[Result]:
    """`value` of every process, in their order; it must pickle."""
    values: list[Any] = [value] * process_count()
    if process_count() > 1:
        distributed.all_gather_object(values, value, group=_channel())
    return values


def any_process(flag: bool) -> bool:
    """Whether `flag` is set in any process."""
    if process_count() == 1:
        return flag
    highest = torch.tensor(int(flag))
    distributed.all_reduce(highest, distributed.ReduceOp.MAX, group=_channel())
    return bool(highest)


def sum_over_processes(tensors: Mapping[str, Tensor]) -> None:
    """Replace each tensor by its sum over the processes; all must have the same names and shapes."""
    if process_count() == 1:
        return
    for name in sorted(tensors):
        distributed.all_reduce(tensors[name], group=_channel() if tensors[name].device.type == "cpu" else None)


def _grouped() -> bool:
    return distributed.is_available() and distributed.is_initialized()


def _channel() -> Any:
    """A gloo group of all processes, made once: NCCL neither carries objects without a GPU nor waits for long."""
    default = distributed.group.WORLD
    if _Channel.group[0] is not default:
        backend = "gloo" if distributed.is_gloo_available() else None
        _Channel.group = (default, distributed.new_group(backend=backend, timeout=PATIENCE))
    return _Channel.group[1]


def _from_main(box: list[Any]) -> list[Any]:
    distributed.broadcast_object_list(box, src=0, group=_channel())
    return box


def _failure(error: BaseException) -> Failure:
    return Failure(process_index(), f"{type(error).__name__}: {error}", isinstance(error, InputError))


@contextmanager
def _reported() -> Iterator[None]:
    """While this runs, the other processes are told of an exception."""
    _Channel.depth += 1
    try:
        yield
    finally:
        _Channel.depth -= 1
