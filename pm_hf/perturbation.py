"""The factor that scales the task's LoRA product in one training step (arXiv 2505.22389)."""

import hashlib
import math
from collections.abc import Sequence


def perturbation_problems(scale: float, probabilities: Sequence[float]) -> list[str]:
    """What is wrong with ε and the probabilities; empty if nothing is."""
    problems = []
    if not 0 <= scale < 1:
        problems.append(f"perturbation scale must be in [0, 1), found {scale}")
    if len(probabilities) != 3 or min(probabilities) < 0 or not math.isclose(sum(probabilities), 1, abs_tol=1e-6):
        problems.append(f"probabilities must be three values >= 0 that sum to 1, found {list(probabilities)}")
    elif not math.isclose(probabilities[1], probabilities[2], abs_tol=1e-9):
        problems.append(
            f"the probabilities of 1+ε and 1−ε must be equal, found {probabilities[1]} and {probabilities[2]}: "
            "otherwise a first-order term remains and the expected gradient is biased"
        )
    return problems


def perturbation_factor(
    scale: float, probabilities: Sequence[float], *, seed: int, task: int, step: int, micro_step: int, rank: int
) -> float:
    """The factor of one micro-step: a pure function of its arguments, so that resuming repeats it.

    A uniform number is taken from SHA-256, so no random generator is read or advanced.
    """
    digest = hashlib.sha256(f"{seed}/{task}/{step}/{micro_step}/{rank}".encode()).digest()
    uniform = int.from_bytes(digest[:8], "big") / 2**64
    if uniform < probabilities[0]:
        return 1.0
    return 1 + scale if uniform < probabilities[0] + probabilities[1] else 1 - scale
