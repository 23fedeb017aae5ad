"""Memory of this process: the peak that a block of code really takes, and giving back what nothing needs any more."""

import ctypes
import gc
import re
import sys
import threading
from pathlib import Path
from types import TracebackType

import torch

STATUS, FIELD = Path("/proc/self/status"), re.compile(r"^RssAnon:\s+(\d+) kB$", re.MULTILINE)
INTERVAL = 0.005  # seconds


class PeakMemory:
    """Context manager that samples the process's RssAnon every 5 ms in a thread of its own.

    start_mb: MiB when the block began. peak_mb: largest sample so far, in MiB; it may be read inside the block and
    after it. Both count the whole process, imports included: the block's own part is their difference. Pages of a
    mapped file (safetensors' safe_open) do not count, nor does a peak shorter than 5 ms. None where /proc does not
    tell (other systems than Linux).
    """

    def __init__(self) -> None:
        self.start_mb: float | None = None
        self.peak_mb: float | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="PeakMemory", daemon=True)

    def __enter__(self) -> "PeakMemory":
        self.start_mb = self.peak_mb = anonymous_mb()
        if self.start_mb is not None:
            self._thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._thread.ident is not None:
            self._stop.set()
            self._thread.join()
            self._sample()

    def _run(self) -> None:
        while not self._stop.wait(INTERVAL):
            self._sample()

    def _sample(self) -> None:
        self.peak_mb = max(self.peak_mb or 0.0, anonymous_mb() or 0.0)


def anonymous_mb() -> float | None:
    """Anonymous resident memory of this process now, in MiB; None where /proc does not tell."""
    try:
        found = FIELD.search(STATUS.read_text(encoding="ascii", errors="replace"))
    except OSError:
        return None
    return int(found[1]) / 1024 if found else None


def release_memory() -> None:
    """Free objects that only refer to each other, CUDA's cached blocks, and pages that glibc keeps for later."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)
