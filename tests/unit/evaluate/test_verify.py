from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from checkpoint_folders import write_folder
from nmprune.checkpoint import Checkpoint, MaskFile, TensorMask, apply_mask, as_integers
from nmprune.evaluate.verify import Finding, VerifyReport, verify
from nmprune.masks import from_scores
from nmprune.pattern import Pattern

P24 = Pattern(2, 4)
KEPT = "kept weights that differ from the base"
NOT_ZERO = "masked weights that are not +0.0"
VALUES = "values that differ from the base"
LINEARS = ("linear", "twin", "conv1d", "experts")
Change = Callable[[dict[str, Tensor]], object]


def mask_of(weight: Tensor, axis: int) -> Tensor:
    scores = weight.float().abs()
    return from_scores(scores, P24) if axis == -1 else from_scores(scores.mT, P24).mT.contiguous()


@dataclass(frozen=True)
class Pair:
    """A base on disk, its masks, and the tensors of a correctly pruned copy, which a test then spoils."""

    folder: Path
    base: Checkpoint
    masks: MaskFile
    pruned: dict[str, Tensor]

    def verify(self, change: Change | None = None, updates_weights: bool = False, **masks: TensorMask) -> VerifyReport:
        tensors = {name: t.clone() for name, t in self.pruned.items()}
        if change is not None:
            change(tensors)
        n = len(list(self.folder.iterdir()))
        pruned = Checkpoint.open(write_folder(self.folder / str(n), {"model.safetensors": tensors}))
        return verify(
            self.base, pruned, replace(self.masks, masks=self.masks.masks | masks), updates_weights=updates_weights
        )

    def masked(self, name: str) -> tuple[Tensor, ...]:
        return torch.nonzero(~self.masks.mask(name), as_tuple=True)

    def kept(self, name: str) -> tuple[Tensor, ...]:
        return torch.nonzero(self.masks.mask(name), as_tuple=True)


def first(index: tuple[Tensor, ...]) -> tuple[int, ...]:
    return tuple(int(axis[0]) for axis in index)


def last(index: tuple[Tensor, ...]) -> tuple[int, ...]:
    return tuple(int(axis[-1]) for axis in index)


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    generator = torch.Generator().manual_seed(0)
    dense = {
        "linear": torch.randn(6, 8, generator=generator).bfloat16(),
        "twin": torch.randn(6, 8, generator=generator).bfloat16(),
        "conv1d": torch.randn(8, 5, generator=generator),
        "experts": torch.randn(3, 8, 5, generator=generator).half(),
        "embed": torch.randn(9, 4, generator=generator),
        "norm": torch.tensor([1.0, -0.0, float("nan"), float("inf")]),
    }
    dense["linear"][0, :4] = 0.0  # real checkpoints hold zeros, among them kept ones
    axes = {"linear": -1, "twin": -1, "conv1d": -2, "experts": -2}
    masks = {n: TensorMask.from_mask(mask_of(dense[n], axis), P24, axis) for n, axis in axes.items()}  # type: ignore[arg-type]
    base = Checkpoint.open(write_folder(tmp_path / "base", {"model.safetensors": dense}))
    pruned = {n: apply_mask(t, masks[n].unpack()) if n in masks else t for n, t in dense.items()}
    return Pair(tmp_path, base, MaskFile(masks, "m", "model", "", ""), pruned)


def test_a_correct_checkpoint_passes(pair: Pair) -> None:
    report = pair.verify()
    assert report.ok
    n_weights = 48 + 48 + 40 + 120
    assert (report.n_tensors, report.n_masks, report.n_groups, report.n_masked) == (
        6,
        4,
        n_weights // 4,
        n_weights // 2,
    )


def test_progress_adds_up(pair: Pair) -> None:
    steps: list[int] = []
    verify(pair.base, pair.base, MaskFile({}, "", "", "", ""), on_progress=steps.append)
    assert sum(steps) == pair.base.nbytes


@pytest.mark.parametrize("name", LINEARS)
def test_one_ulp_in_a_kept_weight(pair: Pair, name: str) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        as_integers(tensors[name])[first(pair.kept(name))] += 1

    assert pair.verify(change).findings == (Finding(name, KEPT, 1),)


@pytest.mark.parametrize("name", LINEARS)
@pytest.mark.parametrize("value", [1e-3, -0.0, float("nan")])
def test_anything_but_plus_zero_in_a_masked_place(pair: Pair, name: str, value: float) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[name][first(pair.masked(name))] = value

    assert pair.verify(change).findings == (Finding(name, NOT_ZERO, 1),)
    assert pair.verify(change, updates_weights=True).findings == (Finding(name, NOT_ZERO, 1),)


def test_sign_of_a_kept_zero(pair: Pair) -> None:
    index = first(pair.kept("linear"))
    assert pair.pruned["linear"][index] == 0

    def change(tensors: dict[str, Tensor]) -> None:
        tensors["linear"][index] = -0.0

    assert pair.verify(change).findings == (Finding("linear", KEPT, 1),)


def test_swapped_tensors(pair: Pair) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors["linear"], tensors["twin"] = tensors["twin"], tensors["linear"]

    report = pair.verify(change)
    assert {finding.tensor for finding in report.findings} == {"linear", "twin"}
    assert {finding.what for finding in report.findings} == {KEPT, NOT_ZERO}


def test_missing_tensor(pair: Pair) -> None:
    for name in ("embed", "linear"):
        report = pair.verify(lambda tensors, name=name: tensors.pop(name))
        assert report.findings == (Finding(name, "missing from the pruned checkpoint"),)
        assert report.n_tensors == 5


def test_extra_tensor(pair: Pair) -> None:
    report = pair.verify(lambda tensors: tensors.update(extra=torch.ones(2)))
    assert report.findings == (Finding("extra", "not in the base"),)


@pytest.mark.parametrize("name", ["embed", "linear"])
def test_other_shape_or_dtype(pair: Pair, name: str) -> None:
    for change in (lambda t: t.reshape(2, -1), lambda t: t.double()):
        report = pair.verify(lambda tensors, change=change: tensors.update({name: change(tensors[name])}))
        assert [(f.tensor, f.what) for f in report.findings] == [(name, "shape or dtype differs from the base")]
        assert "base" in report.findings[0].detail


def test_tensors_without_a_mask_are_compared_bit_by_bit(pair: Pair) -> None:
    def nan_payload(tensors: dict[str, Tensor]) -> None:
        as_integers(tensors["norm"])[2] += 0x010101  # several bytes of one value are one finding
        tensors["norm"][1] = 0.0  # the base has -0.0

    assert pair.verify(nan_payload).findings == (Finding("norm", VALUES, 2),)
    assert pair.verify(nan_payload, updates_weights=True).findings == (Finding("norm", VALUES, 2),)


@pytest.mark.parametrize("name", LINEARS)
def test_a_mask_with_three_of_four(pair: Pair, name: str) -> None:
    entry = pair.masks.masks[name]
    mask = entry.unpack()
    mask[last(pair.masked(name))] = True
    wrong = TensorMask.from_mask(mask, P24, entry.group_axis)
    found = {(f.what, f.count) for f in pair.verify(**{name: wrong}).findings}
    # the weight there is +0.0 and the wrong mask says it was kept
    assert found == {("groups that do not keep exactly N of M", 1), (KEPT, 1)}


@pytest.mark.parametrize("name", ["conv1d", "experts"])
def test_groups_run_along_the_masks_axis(pair: Pair, name: str) -> None:
    wrong_axis = replace(pair.masks.masks[name], group_axis=-1)  # 5 input features: no whole group of 4
    report = pair.verify(**{name: wrong_axis})
    assert (report.findings[0].tensor, report.findings[0].what) == (name, "mask does not fit the tensor")
    assert "in_features 5 is not a multiple of 4" in report.findings[0].detail


def test_masks_that_belong_to_another_model(pair: Pair) -> None:
    other = TensorMask.from_mask(mask_of(torch.ones(2, 4), -1), P24)
    found = [(f.tensor, f.what) for f in pair.verify(ghost=other, twin=other).findings]
    assert found[0] == ("ghost", "mask without a tensor in the base")
    assert found[1] == ("twin", "mask does not fit the tensor")
    assert found[2] == ("twin", VALUES)  # a mask that does not fit excuses nothing


def test_a_forgotten_mask_is_no_excuse(pair: Pair) -> None:
    pruned = Checkpoint.open(write_folder(pair.folder / "p", {"model.safetensors": pair.pruned}))
    masks = {n: m for n, m in pair.masks.masks.items() if n != "twin"}
    report = verify(pair.base, pruned, replace(pair.masks, masks=masks))
    assert [(f.tensor, f.what) for f in report.findings] == [("twin", VALUES)]


def test_the_dense_checkpoint_is_not_pruned(pair: Pair) -> None:
    report = verify(pair.base, pair.base, pair.masks)
    assert {f.tensor for f in report.findings} == set(LINEARS)
    assert {f.what for f in report.findings} == {NOT_ZERO}


# -- methods that move weights -----------------------------------------------------------------------------------------


def test_moved_weights_are_allowed_where_the_method_may_move_them(pair: Pair) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        for name in LINEARS:
            tensors[name][pair.kept(name)] *= 1.5

    assert pair.verify(change, updates_weights=True).ok
    assert {f.what for f in pair.verify(change).findings} == {KEPT}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", LINEARS)
def test_moved_weights_must_be_finite(pair: Pair, name: str, value: float) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[name][first(pair.kept(name))] = value

    report = pair.verify(change, updates_weights=True)
    assert report.findings == (Finding(name, "kept weights that are NaN or infinite", 1),)


def test_rows_that_stay_dense_may_not_move(pair: Pair) -> None:
    mask = pair.masks.mask("linear")
    mask[2:4] = True
    entry = TensorMask.from_mask(mask, P24, dense_rows=((2, 4),))
    dense = pair.base.read("linear")

    def correct(tensors: dict[str, Tensor]) -> None:
        tensors["linear"] = apply_mask(dense, mask)

    def moved(tensors: dict[str, Tensor]) -> None:
        correct(tensors)
        tensors["linear"][2:4] += 1

    assert pair.verify(correct, linear=entry).ok
    assert pair.verify(correct, updates_weights=True, linear=entry).ok
    expected = Finding("linear", "weights of rows that stay dense that differ from the base", 16)
    assert pair.verify(moved, updates_weights=True, linear=entry).findings == (expected,)
    assert pair.verify(moved, linear=entry).findings == (Finding("linear", KEPT, 16),)


def test_tensors_that_may_change_need_only_be_finite(pair: Pair) -> None:
    tensors = pair.pruned | {"embed": pair.pruned["embed"] + 1}
    moved = Checkpoint.open(write_folder(pair.folder / "moved", {"model.safetensors": tensors}))
    assert verify(pair.base, moved, pair.masks, may_change=["embed"]).ok
    assert [f.what for f in verify(pair.base, moved, pair.masks).findings] == [VALUES]
    tensors["embed"][0] = float("nan")
    broken = Checkpoint.open(write_folder(pair.folder / "broken", {"model.safetensors": tensors}))
    report = verify(pair.base, broken, pair.masks, may_change=["embed"])
    assert report.findings == (Finding("embed", "values that are NaN or infinite", 4),)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_eight_bit_floats(tmp_path: Path, dtype: torch.dtype) -> None:
    dense = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))
    mask = mask_of(dense, -1)
    weight = dense.to(dtype)
    base = Checkpoint.open(write_folder(tmp_path / "b", {"model.safetensors": {"w": weight}}))
    pruned = Checkpoint.open(write_folder(tmp_path / "p", {"model.safetensors": {"w": apply_mask(weight, mask)}}))
    masks = MaskFile({"w": TensorMask.from_mask(mask, P24)}, "", "", "", "")
    assert verify(base, pruned, masks).ok
    assert verify(base, pruned, masks, updates_weights=True).ok
    assert [f.count for f in verify(base, base, masks).findings] == [16]
