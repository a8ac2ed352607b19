from __future__ import annotations

import pytest
import torch

from nmprune.checkpoint import MaskFile, TensorMask, diff
from nmprune.errors import InputError
from nmprune.masks import from_scores
from nmprune.pattern import Pattern

P24 = Pattern(2, 4)
FIRST = [True, True, False, False]
LAST = [False, False, True, True]
MIDDLE = [False, True, True, False]


def file(**masks: TensorMask) -> MaskFile:
    return MaskFile(masks, "m", "model", "", "")


def entry(rows: list[list[bool]], pattern: Pattern = P24) -> TensorMask:
    return TensorMask.from_mask(torch.tensor(rows), pattern)


def test_counts() -> None:
    a = file(w=entry([FIRST + FIRST, FIRST + LAST]), same=entry([FIRST]), left=entry([FIRST]))
    b = file(w=entry([FIRST + LAST, MIDDLE + LAST]), same=entry([FIRST]), right=entry([LAST]))
    result = diff(a, b)
    assert (result.only_in_a, result.only_in_b) == (("left",), ("right",))
    same, w = result.tensors
    assert (w.name, w.n_groups, w.n_groups_differ, w.n_kept_both) == ("w", 4, 2, 5)
    assert w.share_in_common == 5 / 8
    assert (same.name, same.n_groups_differ, same.share_in_common) == ("same", 0, 1.0)
    assert (result.total.n_groups, result.total.n_groups_differ, result.total.share_in_common) == (5, 2, 7 / 10)
    assert not result.same


def test_equal_files_are_the_same() -> None:
    a = file(w=entry([FIRST, LAST]))
    assert diff(a, a).same
    assert diff(file(), file()).same


def test_other_pattern_compares_over_the_common_group() -> None:
    p48 = Pattern(4, 8)
    result = diff(file(w=entry([FIRST + FIRST])), file(w=entry([FIRST + FIRST], p48))).tensors[0]
    assert (result.n_groups, result.n_groups_differ, result.share_in_common) == (1, 0, 1.0)


def test_transposed_groups_run_along_their_axis() -> None:
    mask = from_scores(torch.rand(3, 8, generator=torch.Generator().manual_seed(0)), P24)
    other = mask.clone()
    other[1, :4] = ~other[1, :4]
    a, b = (file(w=TensorMask.from_mask(m.T.contiguous(), P24, -2)) for m in (mask, other))
    assert (diff(a, b).total.n_groups, diff(a, b).total.n_groups_differ) == (6, 1)


def test_different_models() -> None:
    with pytest.raises(InputError, match=r"mask of w: shape \(1, 4\) .* against \(2, 4\) .* different models"):
        diff(file(w=entry([FIRST])), file(w=entry([FIRST, FIRST])))
