"""What a run is made under: versions, threads, processes, device, memory."""

import ctypes
import gc
import platform
import re
import sys
import threading
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil
import torch

from pm_hf.distributed import process_count

try:
    import resource
except ImportError:  # not a Unix
    resource = None  # type: ignore[assignment]

PACKAGES = ("pm_hf", "torch", "transformers", "peft", "accelerate", "datasets", "evaluate", "safetensors")


def versions(packages: Sequence[str] = PACKAGES) -> dict[str, str]:
    """{package: version} of pm_hf and what it stands on, and Python's; packages not installed are left out."""
    installed = {"python": platform.python_version()}
    for package in packages:
        try:
            # reading a package's metadata takes milliseconds, so an imported one is asked first
            installed[package] = getattr(sys.modules.get(package), "__version__", None) or version(package)
        except PackageNotFoundError:
            continue
    return installed


ROUNDING, BATCH = "equal up to rounding only", "the global batch is another"


def conditions(*more: str) -> dict[str, Any]:
    """What this process runs under, as step.json keeps it. more: further packages whose versions matter."""
    cuda = torch.cuda.is_available()
    return {
        "threads": torch.get_num_threads(),
        "processes": process_count(),
        "device": torch.cuda.get_device_name() if cuda else f"cpu {torch.backends.cpu.get_cpu_capability()}",
        "versions": versions((*PACKAGES, *more)),
    }


def changed_conditions(now: Mapping[str, Any], before: Mapping[str, Any]) -> list[str]:
    """What is to be said where work that was begun under other conditions goes on; [] where they are the same.

    Conditions that only one of the two knows are not compared.
    """
    now, before = ({**made, **made.get("versions", {})} for made in (now, before))
    differing = [key for key in now if key != "versions" and now[key] != before.get(key, now[key])]
    effects = {key: BATCH if key == "processes" else ROUNDING for key in differing}
    return [
        ", ".join(f"{key} {now[key]} instead of {before[key]}" for key in differing if effects[key] == effect)
        + f": {effect}"
        for effect in dict.fromkeys(effects.values())
    ]


PROCESS_STATUS, ANONYMOUS_MEMORY = Path("/proc/self/status"), re.compile(r"^RssAnon:\s+(\d+) kB$", re.MULTILINE)


SAMPLE_INTERVAL = 0.005  # seconds


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
        while not self._stop.wait(SAMPLE_INTERVAL):
            self._sample()

    def _sample(self) -> None:
        self.peak_mb = max(self.peak_mb or 0.0, anonymous_mb() or 0.0)


def anonymous_mb() -> float | None:
    """Anonymous resident memory of this process now, in MiB; None where /proc does not tell."""
    try:
        line = ANONYMOUS_MEMORY.search(PROCESS_STATUS.read_text(encoding="ascii", errors="replace"))
    except OSError:
        return None
    return int(line[1]) / 1024 if line else None


def process_peak_memory_mb() -> float | None:
    """Largest resident memory of this process since it began, in MiB; None where the system does not tell."""
    if resource is None:  # Windows
        peak = getattr(psutil.Process().memory_info(), "peak_wset", None)
        return None if peak is None else peak / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)  # bytes there, KiB elsewhere


def release_memory() -> None:
    """Free objects that only refer to each other, CUDA's cached blocks, and pages that glibc keeps for later."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)
