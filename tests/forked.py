"""Several processes of one run, forked from the test's own process: what is imported there is not imported again."""

import os
import pickle
import socket
import sys
import time
import traceback
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any


@dataclass(frozen=True)
class Ended:
    """How one process ended: what it returned, or its error as text, its exit code, what it wrote."""

    value: Any
    error: str | None
    code: int | None
    stderr: str
    stdout: str


def run(function, folder, count=2, seconds=100) -> list[Ended]:
    """`function(rank)` in `count` processes with the environment that a launcher gives them."""
    folder.mkdir(parents=True, exist_ok=True)
    port, fork = _port(), get_context("fork")
    processes = [fork.Process(target=_work, args=(function, folder, rank, count, port)) for rank in range(count)]
    for process in processes:
        process.start()
    until = time.monotonic() + seconds
    for process in processes:
        process.join(max(0.0, until - time.monotonic()))
    late = [rank for rank, process in enumerate(processes) if process.is_alive()]
    for rank in late:
        processes[rank].kill()
        processes[rank].join()
    assert not late, f"processes {late} hang: {[(folder / f'{rank}.err').read_text() for rank in late]}"
    return [_ended(folder, rank, process.exitcode) for rank, process in enumerate(processes)]


def _work(function, folder, rank, count, port) -> None:
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    places = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
    os.environ |= {name: str(value) for name, value in (numbers | places).items()}
    sys.stdout, sys.stderr = ((folder / f"{rank}.{end}").open("w", encoding="utf-8") for end in ("out", "err"))
    os.dup2(sys.stdout.fileno(), 1)
    os.dup2(sys.stderr.fileno(), 2)
    value, error = None, None
    try:
        value = function(rank)
    except BaseException as caught:
        traceback.print_exc()
        error = f"{type(caught).__name__}: {caught}"
    sys.stdout.flush()
    sys.stderr.flush()
    (folder / f"{rank}.pickle").write_bytes(pickle.dumps((value, error)))
    os._exit(0 if error is None else 1)


def _ended(folder, rank, code) -> Ended:
    path = folder / f"{rank}.pickle"
    value, error = pickle.loads(path.read_bytes()) if path.exists() else (None, None)
    return Ended(value, error, code, *((folder / f"{rank}.{end}").read_text() for end in ("err", "out")))


def _port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
