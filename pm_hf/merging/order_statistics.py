"""The k-th largest magnitude of numbers that come in blocks: exact in float32, in memory that does not grow.

Magnitudes of floats are ordered like their bits. A first pass over the blocks counts the upper 16 of the 31 bits, a
second one the lower 15 of those numbers that share their upper bits with the one looked for.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

LOW_BITS = 15


HIGH_BINS, LOW_BINS = 1 << 16, 1 << LOW_BITS


def kth_largest(blocks: Callable[[], Iterable[Tensor]], count: int) -> float:
    """The `count`-th largest |x| (from 1) in float32 of all numbers in the blocks, which are asked for twice."""
    high = sum((count_bits(block) for block in blocks()), torch.zeros(HIGH_BINS, dtype=torch.int64))
    within, place = descend(high, count)
    low = sum((count_bits(block, within) for block in blocks()), torch.zeros(LOW_BINS, dtype=torch.int64))
    return magnitude(within, descend(low, place)[0])


def count_bits(block: Tensor, within: int | None = None) -> Tensor:
    """Histogram of |x| by its upper bits, or by the lower bits of the numbers whose upper bits are `within`; int64."""
    bits = block.float().abs().flatten().view(torch.int32)
    high = bits >> LOW_BITS
    if within is None:
        return torch.bincount(high, minlength=HIGH_BINS)
    return torch.bincount(bits[high == within] & (LOW_BINS - 1), minlength=LOW_BINS)


def descend(histogram: Tensor, count: int) -> tuple[int, int]:
    """(bin that holds the `count`-th largest number, its place among the largest of that bin)."""
    above = histogram.flip(0).cumsum(0)
    steps = int((above < count).sum())
    return len(histogram) - 1 - steps, count - (int(above[steps - 1]) if steps else 0)


def magnitude(high: int, low: int) -> float:
    """The float32 with these upper and lower bits."""
    return float(torch.tensor(high << LOW_BITS | low, dtype=torch.int32).view(torch.float32))
