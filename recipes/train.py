"""The main job: accelerate launch recipes/train.py --config FILE [key=value …]. The same as pm-hf train."""

import os
import sys

import psutil

from pm_hf.cli import main

COUNT = ("--num_processes", "--num-processes")
STARTED = ("LOCAL_RANK", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")  # set in one of several processes


def asked_for() -> int:
    """Processes in the command line of `accelerate launch --cpu`, which without MPI starts one all the same."""
    if os.environ.get("ACCELERATE_USE_CPU", "").lower() != "true" or any(name in os.environ for name in STARTED):
        return 1
    words = [part for word in parents_command() for part in word.split("=", 1)]
    counts = [value for name, value in zip(words, words[1:], strict=False) if name in COUNT]
    return int(counts[0]) if counts and counts[0].isdigit() else 1


def parents_command() -> list[str]:
    """Words of the command line that started this process, none where they cannot be read."""
    try:
        parent = psutil.Process().parent()
        return [] if parent is None else parent.cmdline()
    except psutil.Error:
        return []


if __name__ == "__main__":
    if (count := asked_for()) > 1:
        print(f"accelerate has started one process on the CPU; torchrun starts {count}", file=sys.stderr, flush=True)
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"]
        os.execv(sys.executable, [sys.executable, *launcher, *sys.argv])
    sys.exit(main(["train", *sys.argv[1:]]))
