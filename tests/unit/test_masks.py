import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from nmprune import masks
from nmprune.errors import InputError
from nmprune.pattern import Pattern

PATTERNS = [Pattern.parse(text) for text in ("1:2", "2:4", "1:4", "3:4", "4:8", "7:8", "2:9", "8:16", "5:32")]


def slow_mask(scores, pattern):
    """The definition, one group at a time: sort by (-score, index), keep the first N."""
    flat = scores.reshape(-1, pattern.group).tolist()
    rows = []
    for group in flat:
        best = sorted(range(pattern.group), key=lambda i, group=group: (-group[i], i))[: pattern.kept]
        rows.append([i in best for i in range(pattern.group)])
    return torch.tensor(rows).reshape(scores.shape)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_from_scores_is_the_definition_ties_included(pattern, data):
    shape = (data.draw(st.integers(1, 4)), pattern.group * data.draw(st.integers(1, 3)))
    # few different values: ties in nearly every group; -0.0 and 0.0 are equal
    values = st.sampled_from([-2.0, -1.0, -0.0, 0.0, 1e-30, 1.0, 3e38])
    scores = torch.from_numpy(data.draw(hnp.arrays(np.float32, shape, elements=values)))
    mask = masks.from_scores(scores, pattern)
    assert mask.dtype == torch.bool
    assert torch.equal(mask, slow_mask(scores, pattern))
    assert masks.n_wrong_groups(mask, pattern) == 0


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("fill", [0.0, -1.0, 5.0])
def test_equal_scores_keep_the_lowest_indices(pattern, fill):
    mask = masks.from_scores(torch.full((3, 2 * pattern.group), fill), pattern)
    expected = torch.arange(pattern.group) < pattern.kept
    assert torch.equal(mask, expected.repeat(2).expand(3, -1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.int64])
def test_any_real_dtype(dtype):
    scores = torch.randint(-9, 9, (4, 16), generator=torch.Generator().manual_seed(0)).to(dtype)
    for pattern in (Pattern(2, 4), Pattern(8, 16)):
        assert torch.equal(masks.from_scores(scores, pattern), slow_mask(scores, pattern))


def test_strided_scores_and_leading_axes():
    scores = torch.randn(2, 8, 3, generator=torch.Generator().manual_seed(0))
    turned = scores.transpose(1, 2)
    assert torch.equal(masks.from_scores(turned, Pattern(2, 4)), slow_mask(turned.contiguous(), Pattern(2, 4)))
    assert masks.from_scores(torch.zeros(0, 8), Pattern(2, 4)).shape == (0, 8)
    assert masks.from_scores(torch.zeros(4), Pattern(2, 4)).tolist() == [True, True, False, False]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("pattern", [Pattern(2, 4), Pattern(8, 16)], ids=str)
def test_scores_that_are_not_finite(bad, pattern):
    scores = torch.ones(3, 16)
    scores[1, 5] = bad
    with pytest.raises(InputError, match="1 of 48 scores are NaN or infinite"):
        masks.from_scores(scores, pattern)


def test_width_that_is_not_a_whole_number_of_groups():
    for function in (masks.from_scores, masks.n_wrong_groups):
        with pytest.raises(InputError, match="in_features 10 is not a multiple of 4"):
            function(torch.zeros(2, 10), Pattern(2, 4))


def test_all_finite():
    assert masks.all_finite(torch.tensor([0.0, -3e38])) and masks.all_finite(torch.zeros(0))
    for bad in (float("nan"), float("inf"), -float("inf")):
        assert not masks.all_finite(torch.tensor([[1.0, 2.0], [bad, 3.0]]))


def test_n_wrong_groups_and_density():
    mask = torch.tensor([[1, 1, 0, 0, 1, 1, 1, 0], [0, 1, 0, 1, 0, 0, 0, 0]], dtype=torch.bool)
    assert masks.n_wrong_groups(mask, Pattern(2, 4)) == 2
    assert masks.density(mask) == 7 / 16


@pytest.mark.parametrize("pattern", [Pattern(2, 4), Pattern(1, 4), Pattern(3, 5), Pattern(8, 16)], ids=str)
def test_candidates_follow_itertools(pattern):
    listed = masks.candidates(pattern)
    assert listed.shape == (pattern.n_candidates, pattern.group) and listed.dtype == torch.bool
    combinations = itertools.combinations(range(pattern.group), pattern.kept)
    assert [tuple(row.nonzero().flatten().tolist()) for row in listed[:500]] == list(
        itertools.islice(combinations, 500)
    )
    assert masks.n_wrong_groups(listed, pattern) == 0
    assert len(torch.unique(listed, dim=0)) == pattern.n_candidates


def test_too_many_candidates():
    with pytest.raises(InputError, match="601,080,390 candidate masks"):
        masks.candidates(Pattern(16, 32))


@given(hnp.arrays(np.bool_, hnp.array_shapes(min_dims=1, max_dims=3, max_side=9)))
@settings(max_examples=40, deadline=None)
def test_packing_is_numpy_packbits_and_round_trips(array):
    mask = torch.from_numpy(array)
    bits = masks.pack(mask)
    assert bits.dtype == torch.uint8
    assert bits.tolist() == np.packbits(array.reshape(-1)).tolist()
    back = masks.unpack(bits, tuple(array.shape))
    assert back.dtype == torch.bool and torch.equal(back, mask)


def test_packing_strided_and_empty():
    mask = torch.rand(6, 5, generator=torch.Generator().manual_seed(0)) < 0.5
    assert torch.equal(masks.unpack(masks.pack(mask.T), (5, 6)), mask.T)
    assert masks.unpack(masks.pack(torch.zeros(0, 4, dtype=torch.bool)), (0, 4)).shape == (0, 4)


def test_packed_bits_that_do_not_fit():
    bits = masks.pack(torch.ones(3, 4, dtype=torch.bool))
    with pytest.raises(InputError, match=r"packed mask has 2 values of torch.uint8; shape \(3, 8\) needs 3 bytes"):
        masks.unpack(bits, (3, 8))
    with pytest.raises(InputError, match=r"packed mask has 2 values of torch\.int64"):
        masks.unpack(bits.long(), (3, 4))
    bits[-1] |= 1
    with pytest.raises(InputError, match="bits set past its end"):
        masks.unpack(bits, (3, 4))
