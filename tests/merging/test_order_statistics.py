"""The streamed order statistic against a sort."""

import pytest
import torch

from pm_hf.merging.order_statistics import kth_largest


def magnitudes(blocks) -> torch.Tensor:
    return torch.cat([block.float().abs().flatten() for block in blocks]).sort(descending=True).values


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_every_place_is_the_sorted_one(seed):
    generator = torch.Generator().manual_seed(seed)
    blocks = [torch.randn(5, 7, generator=generator), 1e-6 * torch.randn(3, 2, generator=generator), torch.ones(4)]
    expected = magnitudes(blocks)
    assert [kth_largest(lambda: blocks, k + 1) for k in range(45)] == expected.tolist()


def test_zeros_subnormal_and_neighbouring_numbers_are_ordered_exactly():
    next_to_one = 1 + 2.0**-23
    values = torch.tensor([[0.0, -0.0, 1e-45, -1e-45, 3e-39, 1.0, -1.0, 3.4e38, -2.0, next_to_one]])
    expected = [3.4e38, 2.0, next_to_one, 1.0, 1.0, 3e-39, 1e-45, 1e-45, 0.0, 0.0]
    assert [kth_largest(lambda: [values], k + 1) for k in range(10)] == torch.tensor(expected).tolist()


def test_the_blocks_are_read_twice_and_may_be_empty():
    asked = []

    def blocks():
        asked.append(True)
        yield torch.zeros(0, 3)
        yield torch.tensor([3.0, -4.0], dtype=torch.float64)

    assert kth_largest(blocks, 1) == 4.0
    assert len(asked) == 2
