"""What every committed result says about where it comes from."""

import os
import platform
import subprocess
from pathlib import Path

import torch

from pm_hf.environment import versions

ROOT = Path(__file__).parents[1]


def environment() -> dict[str, object]:
    """Versions, commit (with + when the tree differs from it), hardware."""
    return {"versions": versions(), "commit": commit(), "hardware": hardware()}


def commit() -> str:
    """Short hash of HEAD; a + says that tracked files other than results differ from it. PM_HF_COMMIT says it for a
    copy without a repository."""
    if "PM_HF_COMMIT" in os.environ:
        return os.environ["PM_HF_COMMIT"]
    git = ["git", "-C", str(ROOT)]
    head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
    status = [*git, "status", "--porcelain", "-uno", "--", ":/", ":(top,exclude)results"]
    dirty = subprocess.run(status, capture_output=True, text=True, check=True)
    return head.stdout.strip() + ("+" if dirty.stdout.strip() else "")


def hardware() -> str:
    """Processor, threads of a process, memory, and the GPU where torch has one."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{names[0] if names else platform.processor()}, {torch.get_num_threads()} threads, {memory:.0f} GiB{gpu}"
