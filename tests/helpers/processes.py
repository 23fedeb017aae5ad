"""Work in other processes, forked from the test's own: what is imported there is not imported again."""

import json
import os
import pickle
import shutil
import signal
import socket
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from pm_hf.cli import main
from pm_hf.training.trainer import PMTrainer

# plain gradient descent: Adam would blow rounding up where a gradient is nothing but rounding
PLAIN = {"training__optim": "sgd", "training__learning_rate": 1.0, "training__head_learning_rate": 0.3}
SHORT = {"groups": 2, "training__num_train_epochs": 2}
ODD = {"curvature__samples": 7}  # an odd number of rows: two equal shares would need one twice


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


def forked(work):
    """(status, what it wrote to stdout and stderr) of a child process that does `work`; status below 0: killed by that.

    A fork is a process of its own without the seconds that a new interpreter needs to import everything.
    """
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of a fork beside idle threads
        pid = os.fork()
    if pid == 0:
        code = 99
        try:
            os.dup2(writing, 1)
            os.dup2(writing, 2)
            sys.stdout = sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
            code = work() or 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    os.close(writing)
    with open(reading, encoding="utf-8") as pipe:
        text = pipe.read()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), text


def without_dropout(base, folder):
    """A copy of a base model without dropout, whose masks differ between the processes."""
    shutil.copytree(base, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def close(left, right, tolerance=2e-5):
    """Whether two {name: tensor} are equal up to rounding, in relation to the largest entry of each tensor."""
    assert left.keys() == right.keys()
    return all((left[name] - right[name]).abs().max() <= tolerance * left[name].abs().max() for name in left)


def stopped(path, folder):
    """How two processes end of which the second gets SIGTERM in the second step of the second task."""

    def work(rank):
        step = PMTrainer.training_step

        def stop(self, *args, **kwargs):
            if rank == 1 and "task-01" in self.args.output_dir and self.state.global_step == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            return step(self, *args, **kwargs)

        PMTrainer.training_step = stop
        return main(["train", "--config", str(path)])

    return run(work, folder)


# the program that stands in for the console script: hands over its arguments, folder and standard streams
CLIENT = """#!{python} -SE
import json, os, socket, sys
with socket.socket(socket.AF_UNIX) as server:
    server.connect("{address}")
    socket.send_fds(server, [json.dumps([os.getcwd(), sys.argv[1:]]).encode()], [0, 1, 2])
    answer = server.recv(16)
sys.exit(int(answer or 1))
"""


@contextmanager
def forked_pm_hf(folder: Path) -> Iterator[Path]:
    """A folder for PATH with a `pm-hf` that works while the block runs; folder: a new one with a short path."""
    folder.mkdir()
    address = folder / "socket"
    program = folder / "pm-hf"
    program.write_text(CLIENT.format(python=sys.executable, address=address))
    program.chmod(0o755)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(address))
        server.listen()
        thread = threading.Thread(target=_serve, args=(server,))
        thread.start()
        try:
            yield folder
        finally:
            server.shutdown(socket.SHUT_RDWR)
            thread.join()


def _serve(server: socket.socket) -> None:
    while True:
        try:
            client, _ = server.accept()
        except OSError:
            return
        with client:
            message, streams, *_ = socket.recv_fds(client, 2**20, 3)
            child = os.fork()
            if child == 0:
                _run(message, streams)
            for stream in streams:
                os.close(stream)
            client.sendall(str(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])).encode())


def _run(message: bytes, streams: list[int]) -> None:
    """The command; this process ends here."""
    code = 1
    try:
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", encoding="utf-8", closefd=False) for number in (1, 2))
        warnings.resetwarnings()
        folder, arguments = json.loads(message)
        os.chdir(folder)
        code = main(arguments)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
