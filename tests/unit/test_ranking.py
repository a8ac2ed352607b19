from __future__ import annotations

import pytest
import torch

from nmprune import ranking

SHAPE = (3, 11)


def group(members: int) -> torch.Tensor:
    """Few values, so that many are equal."""
    return torch.randint(-1, 2, (*SHAPE, members), generator=torch.Generator().manual_seed(members)).float()


def best(values: list[float], n: int) -> set[int]:
    return set(sorted(range(len(values)), key=lambda i: (-values[i], i))[:n])


@pytest.mark.parametrize(("n", "members"), [(2, 4), (1, 1), (3, 8), (4, 9), (5, 32)])  # counted, and sorted from 9 on
def test_the_largest_are_on_top_and_of_equals_the_lower_index(n, members):
    values = group(members)
    found = ranking.top(values, n)
    assert found.dtype == torch.bool and found.shape == values.shape
    for row, kept in zip(values.flatten(0, 1).tolist(), found.flatten(0, 1), strict=True):
        assert set(kept.nonzero().flatten().tolist()) == best(row, n)


@pytest.mark.parametrize("members", [1, 4, 7])
def test_ranks_count_who_is_ahead(members):
    values = group(members)
    ranks = torch.stack(ranking.ranks(values.unbind(-1)), -1)
    assert ranks.dtype == torch.int8
    assert torch.equal(ranks.long(), values.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1))
