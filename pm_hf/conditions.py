"""What a run's rounding depends on besides its settings: threads, processes, device, versions."""

from collections.abc import Mapping
from typing import Any

import torch

from pm_hf.processes import process_count
from pm_hf.versions import versions

ROUNDING, BATCH = "equal up to rounding only", "the global batch is another"


def conditions() -> dict[str, Any]:
    """Those of this process, as step.json keeps them."""
    cuda = torch.cuda.is_available()
    return {
        "threads": torch.get_num_threads(),
        "processes": process_count(),
        "device": torch.cuda.get_device_name() if cuda else f"cpu {torch.backends.cpu.get_cpu_capability()}",
        "versions": versions(),
    }


def changed(now: Mapping[str, Any], before: Mapping[str, Any]) -> list[str]:
    """What is to be said where work that was begun under other conditions goes on; [] where they are the same.

    Conditions that only one of the two knows are not compared.
    """
    left, right = ({**found, **found.get("versions", {})} for found in (now, before))
    differing = [key for key in left if key != "versions" and left[key] != right.get(key, left[key])]
    effects = {key: BATCH if key == "processes" else ROUNDING for key in differing}
    return [
        ", ".join(f"{key} {left[key]} instead of {right[key]}" for key in differing if effects[key] == effect)
        + f": {effect}"
        for effect in dict.fromkeys(effects.values())
    ]
