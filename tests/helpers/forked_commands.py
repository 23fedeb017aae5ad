"""`pm-hf` for shell scripts, run in a fork of the test's process: what is imported there is not imported again."""

import json
import os
import socket
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pm_hf.cli import main

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
