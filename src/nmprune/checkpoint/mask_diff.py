"""What two mask files have in common, tensor by tensor."""

from __future__ import annotations

import math
from dataclasses import dataclass

from nmprune.checkpoint.mask_file import MaskFile, TensorMask, as_rows
from nmprune.errors import InputError


@dataclass(frozen=True)
class TensorDiff:
    """One tensor in both files.

    Attributes:
        name: of the tensor.
        n_groups: groups compared; where the patterns' groups differ, of their least common multiple.
        n_groups_differ: groups in which at least one weight is kept by one mask only.
        n_kept_both: weights kept by both.
        n_kept_a: weights kept by the first mask.
        n_kept_b: weights kept by the second mask.
        same_pattern: whether both masks keep the same N of M.
    """

    name: str
    n_groups: int
    n_groups_differ: int
    n_kept_both: int
    n_kept_a: int
    n_kept_b: int
    same_pattern: bool = True

    @property
    def share_in_common(self) -> float:
        """Weights kept by both over the mean of what each keeps, 0..1; equal patterns: the share of kept weights."""
        return 2 * self.n_kept_both / (self.n_kept_a + self.n_kept_b)


@dataclass(frozen=True)
class MaskDiff:
    """Two mask files compared.

    Attributes:
        tensors: those in both, in the order of the names.
        only_in_a: names that only the first file has, sorted.
        only_in_b: names that only the second file has, sorted.
    """

    tensors: tuple[TensorDiff, ...]
    only_in_a: tuple[str, ...]
    only_in_b: tuple[str, ...]

    @property
    def total(self) -> TensorDiff:
        """The sums over all tensors in both files, named "total"."""
        fields = ("n_groups", "n_groups_differ", "n_kept_both", "n_kept_a", "n_kept_b")
        sums = {field: sum(getattr(tensor, field) for tensor in self.tensors) for field in fields}
        return TensorDiff("total", **sums, same_pattern=all(tensor.same_pattern for tensor in self.tensors))

    @property
    def same(self) -> bool:
        """True where both files mask the same tensors in the same way."""
        return not (self.only_in_a or self.only_in_b or self.total.n_groups_differ)


def diff(a: MaskFile, b: MaskFile) -> MaskDiff:
    """Compare two mask files.

    Raises:
        InputError: a tensor in both has different shapes or group axes: the files belong to different models.
    """
    tensors = tuple(
        _diff_tensor(name, a.masks[name], b.masks[name]) for name in sorted(a.masks.keys() & b.masks.keys())
    )
    return MaskDiff(
        tensors, tuple(sorted(a.masks.keys() - b.masks.keys())), tuple(sorted(b.masks.keys() - a.masks.keys()))
    )


def _diff_tensor(name: str, a: TensorMask, b: TensorMask) -> TensorDiff:
    if (a.shape, a.group_axis) != (b.shape, b.group_axis):
        raise InputError(
            f"mask of {name}: shape {a.shape} with groups along axis {a.group_axis}, against {b.shape} along "
            f"{b.group_axis}. The two mask files belong to different models."
        )
    mask_a, mask_b = as_rows(a.unpack(), a.group_axis), as_rows(b.unpack(), b.group_axis)
    group = math.lcm(a.pattern.group, b.pattern.group)
    differs = (mask_a != mask_b).unflatten(-1, (-1, group)).any(-1)
    counts = ((mask_a & mask_b).sum(), mask_a.sum(), mask_b.sum())
    both, kept_a, kept_b = (int(count) for count in counts)
    return TensorDiff(name, differs.numel(), int(differs.sum()), both, kept_a, kept_b, a.pattern == b.pattern)
