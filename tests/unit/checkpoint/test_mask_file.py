from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from nmprune.checkpoint import MaskFile, TensorMask, as_rows, checksum, read_masks, write_masks
from nmprune.errors import InputError
from nmprune.masks import from_scores
from nmprune.pattern import Pattern

P24 = Pattern(2, 4)


def legal(shape: tuple[int, ...], pattern: Pattern = P24, group_axis: int = -1, seed: int = 0) -> Tensor:
    scores = torch.rand(shape, generator=torch.Generator().manual_seed(seed))
    if group_axis == -1:
        return from_scores(scores, pattern)
    return from_scores(scores.transpose(-1, -2), pattern).transpose(-1, -2).contiguous()


def mask_file(**masks: TensorMask) -> MaskFile:
    return MaskFile(masks, method="wanda", model="a/b", fingerprint="ab" * 32, nmprune_version="0.1.0")


@pytest.fixture
def mixed() -> MaskFile:
    """Patterns, axes and numbers of axes of every kind; sizes that do not fill their last byte."""
    p12 = Pattern(1, 2)
    return mask_file(
        plain=TensorMask.from_mask(legal((3, 8)), P24),
        other=TensorMask.from_mask(legal((5, 6), p12, seed=1), p12),
        conv1d=TensorMask.from_mask(legal((8, 3), P24, -2, seed=2), P24, -2),
        experts=TensorMask.from_mask(legal((2, 4, 3), P24, -2, seed=3), P24, -2),
    )


def test_masks_of_a_reordered_model_say_so_and_older_readers_refuse_them(mixed: MaskFile, tmp_path: Path) -> None:
    write_masks(tmp_path / "m.safetensors", replace(mixed, permutation="cd" * 32))
    assert read_masks(tmp_path / "m.safetensors").permutation == "cd" * 32
    assert metadata_of(tmp_path / "m.safetensors")["format_version"] == "2"


def test_round_trip(mixed: MaskFile, tmp_path: Path) -> None:
    write_masks(tmp_path / "m.safetensors", mixed)
    back = read_masks(tmp_path / "m.safetensors")
    assert list(back.masks) == sorted(mixed.masks)
    for name, entry in mixed.masks.items():
        assert torch.equal(back.mask(name), entry.unpack())
        assert back.mask(name).shape == entry.shape
        assert (back.masks[name].pattern, back.masks[name].group_axis) == (entry.pattern, entry.group_axis)
    assert (back.method, back.model, back.fingerprint, back.nmprune_version) == ("wanda", "a/b", "ab" * 32, "0.1.0")
    assert back.patterns() == [Pattern(1, 2), P24]
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]


@given(
    rows=st.integers(1, 5),
    groups=st.integers(1, 5),
    pattern=st.sampled_from(["2:4", "4:8", "1:4", "3:4", "1:2", "8:16", "1:3"]),
    group_axis=st.sampled_from([-1, -2]),
    experts=st.sampled_from([(), (3,)]),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_any_legal_mask_packs_and_counts(
    rows: int, groups: int, pattern: str, group_axis: int, experts: tuple[int, ...], seed: int
) -> None:
    p = Pattern.parse(pattern)
    matrix = (rows, groups * p.group) if group_axis == -1 else (groups * p.group, rows)
    mask = legal((*experts, *matrix), p, group_axis, seed)
    entry = TensorMask.from_mask(mask, p, group_axis)  # type: ignore[arg-type]
    entry.check("w")
    assert torch.equal(entry.unpack(), mask)
    n_rows = rows * (3 if experts else 1)
    assert entry.n_groups == n_rows * groups
    assert entry.n_kept == entry.n_groups * p.kept == int(mask.sum())
    assert as_rows(mask, group_axis).shape == (n_rows, groups * p.group)


def test_the_safetensors_library_reads_it_and_the_bits_are_packbits(mixed: MaskFile, tmp_path: Path) -> None:
    import numpy as np

    write_masks(tmp_path / "m.safetensors", mixed)
    with safe_open(tmp_path / "m.safetensors", "pt") as file:
        metadata = file.metadata()
        assert sorted(file.keys()) == sorted(mixed.masks)
        for name, entry in mixed.masks.items():
            bits = file.get_tensor(name)
            assert bits.dtype == torch.uint8
            assert np.array_equal(bits.numpy(), np.packbits(entry.unpack().numpy()))
    assert metadata["format"] == "nmprune-masks"
    assert metadata["format_version"] == "1"
    described = json.loads(metadata["masks"])
    assert described["plain"] == {"shape": [3, 8], "kept": 2, "group": 4, "group_axis": -1}
    assert described["experts"] == {"shape": [2, 4, 3], "kept": 2, "group": 4, "group_axis": -2}


def test_equal_masks_give_equal_bytes(mixed: MaskFile, tmp_path: Path) -> None:
    backwards = mask_file(**dict(reversed(mixed.masks.items())))
    write_masks(tmp_path / "a", mixed)
    write_masks(tmp_path / "b", backwards)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert checksum(tmp_path / "a") == hashlib.sha256((tmp_path / "a").read_bytes()).hexdigest()
    with pytest.raises(InputError, match="cannot be read"):
        checksum(tmp_path / "absent")


def test_density_is_counted(mixed: MaskFile) -> None:
    kept = sum(int(entry.unpack().sum()) for entry in mixed.masks.values())
    assert mixed.density() == kept / sum(entry.unpack().numel() for entry in mixed.masks.values()) == 0.5


def test_unknown_tensor(mixed: MaskFile) -> None:
    with pytest.raises(InputError, match=r"no mask for tensor 'plian' among 4. Did you mean 'plain'"):
        mixed.mask("plian")


def test_no_masks_at_all(tmp_path: Path) -> None:
    write_masks(tmp_path / "m", mask_file())
    assert read_masks(tmp_path / "m").masks == {}


# -- masks that are not legal ------------------------------------------------------------------------------------------


def test_three_of_four_is_found() -> None:
    mask = legal((3, 8))
    mask[1, :4] = torch.tensor([True, True, True, False])
    file = mask_file(w=TensorMask.from_mask(mask, P24))
    assert file.masks["w"].n_wrong_groups() == 1
    with pytest.raises(InputError, match=r"mask of w: 1 of 6 groups along axis -1 do not keep exactly 2 kept of 4"):
        file.check()


def test_the_axis_matters() -> None:
    mask = legal((8, 4), P24, -2, seed=5)
    TensorMask.from_mask(mask, P24, -2).check("w")
    with pytest.raises(InputError, match="groups along axis -1"):
        TensorMask.from_mask(mask, P24, -1).check("w")


def test_dense_rows_are_wholly_kept_and_not_counted(tmp_path: Path) -> None:
    mask = legal((6, 8))
    mask[2:5] = True
    entry = TensorMask.from_mask(mask, P24, dense_rows=((2, 5),))
    entry.check("w")
    assert (entry.n_groups, entry.n_kept) == (6, 3 * 4 + 3 * 8)
    write_masks(tmp_path / "m", mask_file(w=entry))
    assert read_masks(tmp_path / "m").masks["w"].dense_rows == ((2, 5),)
    with pytest.raises(InputError, match="6 of 12 groups"):
        TensorMask.from_mask(mask, P24).check("w")
    with pytest.raises(InputError, match="2 of 12 groups"):  # row 1 is declared dense and is not
        TensorMask.from_mask(mask, P24, dense_rows=((1, 5),)).check("w")


def test_dense_expert_of_a_transposed_tensor() -> None:
    mask = legal((3, 4, 2), P24, -2)
    mask[1] = True
    TensorMask.from_mask(mask, P24, -2, dense_rows=((2, 4),)).check("w")


@pytest.mark.parametrize("spans", [((4, 7),), ((3, 3),), ((2, 1),), ((0, 3), (2, 4)), ((-1, 2),)])
def test_dense_rows_that_cannot_be(spans: tuple[tuple[int, int], ...]) -> None:
    with pytest.raises(InputError, match=r"expected sorted, disjoint ranges within 0\.\.6"):
        TensorMask.from_mask(torch.ones(6, 8, dtype=torch.bool), P24, dense_rows=spans).check("w")


def test_shapes_that_cannot_be() -> None:
    bits = torch.zeros(1, dtype=torch.uint8)
    for shape, axis in [((8,), -1), ((2, 0), -1), ((2, 4), 0), ((1, 2, 1, 4), -1)]:
        with pytest.raises(InputError, match="expected 2 or 3 axes"):
            TensorMask(bits, shape, P24, axis).check("w")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="in_features 6 is not a multiple of 4"):
        TensorMask(bits, (1, 6), P24).check("w")
    with pytest.raises(InputError, match="needs 4 packed bytes"):
        TensorMask(bits, (4, 8), P24).check("w")


# -- files that are not mask files -------------------------------------------------------------------------------------


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return dict(file.metadata())


def described(**change: Any) -> str:
    return json.dumps({"w": {"shape": [2, 4], "kept": 2, "group": 4, "group_axis": -1} | change})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format": "pt"}, "no mask file: its metadata says format 'pt'"),
        ({"format_version": "3"}, "mask format version '3'; this nmprune reads versions 1 and 2"),
        ({"format_version": "2"}, "mask format version 2 with permutation ''"),
        ({"permutation": "ab"}, "mask format version 1 with permutation 'ab'"),
        ({"masks": "{"}, "not valid JSON"),
        ({"masks": "3"}, "not valid JSON"),
        ({"masks": '["w"]'}, "only in the metadata or only among the tensors"),
        ({"masks": "{}"}, "1 names are only in the metadata or only among the tensors"),
        ({"masks": '{"w": 3}'}, "mask of w: cannot read its description"),
        ({"masks": described(shape=3)}, "cannot read its description"),
        ({"masks": described(kept=2.0)}, "a number is not whole"),
        ({"masks": described(dense_rows=[[1]])}, "cannot read its description"),
        ({"masks": described(kept=4)}, "mask of w: pattern 4:4 is not possible"),
        ({"masks": described(shape=[4, 4])}, "mask of w: 1 values of torch.uint8, shape (4, 4) needs 2 packed bytes"),
        ({"masks": described(kept=1)}, "mask of w: 2 of 2 groups along axis -1 do not keep exactly 1 kept of 4"),
        ({"masks": described(shape=[1, 4])}, "bits set past its end"),
    ],
)
def test_damaged_files(tmp_path: Path, change: dict[str, str], words: str) -> None:
    path = tmp_path / "m.safetensors"
    mask = torch.tensor([[True, True, False, False], [False, False, True, True]])
    write_masks(path, mask_file(w=TensorMask.from_mask(mask, P24)))
    save_file({"w": TensorMask.from_mask(mask, P24).packed}, path, metadata=metadata_of(path) | change)
    with pytest.raises(InputError) as caught:
        read_masks(path)
    assert str(path) in str(caught.value)
    assert words in str(caught.value)


def test_missing_metadata_and_wrong_dtype(tmp_path: Path) -> None:
    path = tmp_path / "m"
    write_masks(path, mask_file(w=TensorMask.from_mask(torch.tensor([[True, True, False, False]]), P24)))
    metadata = metadata_of(path)
    save_file({"w": torch.zeros(1)}, path, metadata=metadata)
    with pytest.raises(InputError, match="mask of w is F32, expected packed bits in U8"):
        read_masks(path)
    del metadata["method"]
    save_file({"w": torch.zeros(1)}, path, metadata=metadata)
    with pytest.raises(InputError, match="its metadata lacks method"):
        read_masks(path)


def test_truncated_and_absent(mixed: MaskFile, tmp_path: Path) -> None:
    path = tmp_path / "m"
    with pytest.raises(InputError, match="cannot be read"):
        read_masks(path)
    write_masks(path, mixed)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(InputError, match="truncated"):
        read_masks(path)


def test_failed_write_keeps_the_old_file(mixed: MaskFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno
    import os

    path = tmp_path / "m"
    write_masks(path, mask_file())
    before = path.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match="the disk is full"):
        write_masks(path, mixed)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_checking_reads_the_bits_once() -> None:
    whole = TensorMask.from_mask(torch.tensor([[True, True, False, False]]), P24)
    reads = []

    def read() -> torch.Tensor:
        reads.append(1)
        return whole.packed

    lazy = TensorMask(read, whole.shape, P24)
    lazy.check_structure()
    assert len(reads) == 1
    lazy.check("w")
    assert len(reads) == 2
