from __future__ import annotations

import pytest
import torch

from nmprune.prepare.owl import keep_ratios, outlier_share


def test_outliers_are_counted_over_all_linears_of_a_layer():
    scores = [torch.tensor([[1.0, 1.0, 1.0, 13.0]]), torch.tensor([[1.0, 1.0], [1.0, 13.0]])]  # mean 4
    assert outlier_share(lambda: scores, 3) == 2 / 8
    assert outlier_share(lambda: scores, 3.25) == 0  # exactly at the threshold is none
    assert outlier_share(list, 5) == 0


def test_ratios_span_twice_lambda_and_meet_the_density():
    found = keep_ratios([0.01, 0.03, 0.02], [10, 10, 10], 0.5, 0.08)
    assert found == pytest.approx([0.42, 0.58, 0.5])
    uneven = keep_ratios([0.01, 0.03, 0.02], [10, 30, 20], 0.4, 0.1)
    assert sum(r * n for r, n in zip(uneven, [10, 30, 20], strict=True)) == pytest.approx(0.4 * 60)
    assert max(uneven) - min(uneven) == pytest.approx(0.2)


def test_equal_layers_get_the_density():
    assert keep_ratios([0.02, 0.02], [5, 7], 0.5, 0.08) == [0.5, 0.5]
