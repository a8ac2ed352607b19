from __future__ import annotations

import pytest
import torch

from nmprune.checkpoint import apply_mask, as_integers


@pytest.mark.parametrize(
    "dtype",
    [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.int8],
)
def test_masked_is_plus_zero_and_kept_is_untouched(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    raw = torch.randint(0, 256, (64 * dtype.itemsize,), generator=generator).to(torch.uint8)
    weight = raw.view(dtype).reshape(8, 8)  # NaN, infinity and -0.0 among them
    before = weight.clone()
    mask = torch.rand(8, 8, generator=generator) < 0.5
    pruned = as_integers(apply_mask(weight, mask))
    assert apply_mask(weight, mask).dtype == dtype
    assert (pruned[~mask] == 0).all()
    assert torch.equal(pruned[mask], as_integers(weight)[mask])
    assert torch.equal(as_integers(weight), as_integers(before))


def test_negative_weights_infinity_and_nan_leave_no_trace() -> None:
    weight = torch.tensor([-1.0, -0.0, float("inf"), float("nan")])
    assert as_integers(apply_mask(weight, torch.zeros(4, dtype=torch.bool))).tolist() == [0, 0, 0, 0]


def test_transposed_views_work() -> None:
    weight = torch.randn(4, 6, generator=torch.Generator().manual_seed(1)).T
    mask = torch.ones(6, 4, dtype=torch.bool)
    assert torch.equal(apply_mask(weight, mask), weight)


def test_wrong_masks_are_our_bug() -> None:
    with pytest.raises(ValueError, match="expected bool, equal shapes"):
        apply_mask(torch.ones(2, 4), torch.ones(4, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match="expected bool"):
        apply_mask(torch.ones(2, 4), torch.ones(2, 4))
