"""Several processes: one writes, sums are over all, and where one fails all end."""

import os
import signal
import time
from datetime import timedelta

import pytest
import torch
from helpers.processes import run
from torch import distributed

from pm_hf.distributed import (
    OtherProcessError,
    any_process,
    gather,
    interruptible,
    on_all_processes,
    on_main_process,
    process_count,
    process_index,
    sum_over_processes,
)
from pm_hf.errors import InputError
from pm_hf.training.callbacks import Stop, StoppedError, stop_on_sigterm


def outcome(function):
    """What a call returns, or its error as (kind, message, bad input or None)."""
    try:
        return function()
    except BaseException as error:
        return type(error).__name__, str(error), getattr(error, "bad_input", None)


def fails(*ranks, kind=InputError):
    """A function that raises in these processes and returns the rank in the others."""

    def function():
        if process_index() in ranks:
            raise kind(f"no good in {process_index()}")
        return process_index()

    return function


def joined(function):
    """`function` after the process has joined the others."""

    def work(rank):
        distributed.init_process_group("gloo", timeout=timedelta(seconds=5))
        return function(rank)

    return work


def both(function, folder):
    """What `function` returned in each of two processes."""
    ended = run(joined(function), folder, seconds=60)
    assert [end.code for end in ended] == [0, 0], [end.stderr for end in ended]
    return [end.value for end in ended]


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """What two processes found, one dict each."""

    def work(rank):
        found = {"count": (process_count(), process_index())}
        found["on_main"] = on_main_process(lambda: f"from {process_index()}")
        found["on_main fails"] = outcome(lambda: on_main_process(fails(0)))
        found["on_main fails at work"] = outcome(lambda: on_main_process(fails(0, kind=OSError)))
        found["together"] = on_all_processes(process_index)
        for name, ranks in (("0", (0,)), ("1", (1,)), ("both", (0, 1))):
            found[f"{name} fails"] = outcome(lambda ranks=ranks: on_all_processes(fails(*ranks)))
        found["gather"] = gather({"rank": rank})
        found["any"] = [any_process(False), any_process(rank == 1), any_process(True)]
        sums = {"b": torch.arange(3.0) + rank, "a": torch.ones(2, 2, dtype=torch.float64) * 10**rank}
        sum_over_processes(sums)
        found["sums"] = {name: value.tolist() for name, value in sums.items()}
        return found | {"still": on_all_processes(lambda: "here")}

    return both(work, tmp_path_factory.mktemp("told"))


def test_processes_know_their_number(told):
    assert [found["count"] for found in told] == [(2, 0), (2, 1)]


def test_what_process_0_returns_is_everybodys(told):
    assert [found["on_main"] for found in told] == ["from 0", "from 0"]
    assert [found["together"] for found in told] == [0, 1]


def test_an_error_of_process_0_is_its_own_and_ends_the_other_by_its_name(told):
    for name in ("on_main fails", "0 fails", "both fails"):
        assert told[0][name] == ("InputError", "no good in 0", None)
        assert told[1][name] == ("OtherProcessError", "process 0 failed: InputError: no good in 0", True)
    assert told[1]["on_main fails at work"] == ("OtherProcessError", "process 0 failed: OSError: no good in 0", False)


def test_an_error_of_process_1_ends_process_0(told):
    assert told[0]["1 fails"] == ("OtherProcessError", "process 1 failed: InputError: no good in 1", True)
    assert told[1]["1 fails"] == ("InputError", "no good in 1", None)
    assert [found["still"] for found in told] == ["here", "here"]


def test_values_are_gathered_in_order_and_summed(told):
    for found in told:
        assert found["gather"] == [{"rank": 0}, {"rank": 1}]
        assert found["any"] == [False, True, True]
        assert found["sums"] == {"b": [1.0, 3.0, 5.0], "a": [[11.0, 11.0], [11.0, 11.0]]}


def test_the_others_wait_longer_than_the_groups_timeout(tmp_path):
    def work(rank):
        distributed.init_process_group("gloo", timeout=timedelta(seconds=1))
        return on_main_process(lambda: time.sleep(2) or "done")

    assert [end.value for end in run(work, tmp_path, seconds=60)] == ["done", "done"]


@pytest.mark.parametrize("dead", [0, 1])
def test_a_process_that_dies_leaves_none_waiting(tmp_path, dead):
    def work(rank):
        on_all_processes(lambda: None)
        if rank == dead:
            os.kill(os.getpid(), signal.SIGKILL)
        return on_main_process(lambda: time.sleep(0.2))

    ended = run(joined(work), tmp_path, seconds=60)
    assert ended[dead].code == -signal.SIGKILL
    assert ended[1 - dead].code == 1
    assert ended[1 - dead].error


def terminated_between_functions(rank):
    """SIGTERM to process 1 where nobody could be told: it waits for the next check."""
    with stop_on_sigterm() as stop:
        if rank == 1:
            signal.raise_signal(signal.SIGTERM)
        return outcome(lambda: on_all_processes(process_index)), outcome(stop.check)


def terminated_at_work(rank):
    """SIGTERM to process 0 while it works and process 1 waits."""
    with stop_on_sigterm():
        return outcome(lambda: on_main_process(lambda: signal.raise_signal(signal.SIGTERM) or time.sleep(9)))


def test_sigterm_to_one_process_ends_all_at_the_next_check(tmp_path):
    first, second = both(terminated_between_functions, tmp_path)
    assert (first[0], second[0]) == (0, 1)
    message = str(StoppedError())
    assert first[1] == ("OtherProcessError", f"process 1 failed: StoppedError: {message}", False)
    assert second[1] == ("StoppedError", message, None)


def test_sigterm_to_the_process_at_work_ends_it_at_once(tmp_path):
    first, second = both(terminated_at_work, tmp_path)
    assert first == ("StoppedError", str(StoppedError()), None)
    assert second[0] == "OtherProcessError"


def test_a_training_stops_everywhere_where_one_process_was_asked(tmp_path):
    class Control:
        should_save = should_training_stop = False

    def work(rank):
        stop, control = Stop(), Control()
        stop.on_train_begin()
        stop.asked = rank == 1
        stop.on_step_end(None, None, control)
        return control.should_save, control.should_training_stop, outcome(stop.on_train_end)[0]

    # each was asked through the other, the first one says so
    assert both(work, tmp_path) == [(True, True, "StoppedError"), (True, True, "OtherProcessError")]


def test_alone_everything_is_a_plain_call():
    sums = {"a": torch.ones(2)}
    sum_over_processes(sums)
    assert sums["a"].tolist() == [1, 1]
    assert (process_count(), process_index(), interruptible()) == (1, 0, True)
    assert (on_main_process(lambda: "here"), on_all_processes(lambda: "here"), gather(3)) == ("here", "here", [3])
    assert (any_process(False), any_process(True)) == (False, True)
    for call in (on_main_process, on_all_processes):
        with pytest.raises(InputError, match="no good in 0"):
            call(fails(0))
    assert not issubclass(OtherProcessError, InputError)
