from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from nmprune.checkpoint import MaskFile, TensorMask, read_npz, write_npz
from nmprune.errors import InputError
from nmprune.masks import from_scores
from nmprune.pattern import Pattern

P24 = Pattern(2, 4)
SHAPES = {"a.weight": (3, 4), "b.weight": (8, 5), "unmasked.weight": (2, 2)}


@pytest.fixture
def masks() -> MaskFile:
    generator = torch.Generator().manual_seed(0)
    a = from_scores(torch.rand(3, 4, generator=generator), P24)
    b = from_scores(torch.rand(5, 8, generator=generator), P24).T.contiguous()
    entries = {"a.weight": TensorMask.from_mask(a, P24), "b.weight": TensorMask.from_mask(b, P24, -2)}
    return MaskFile(entries, "wanda", "model", "f", "1")


def test_round_trip_and_equal_bytes(masks: MaskFile, tmp_path: Path) -> None:
    write_npz(tmp_path / "m.npz", masks)
    back = read_npz(tmp_path / "m.npz", SHAPES, P24, {"b.weight": -2})
    assert sorted(back.masks) == ["a.weight", "b.weight"]
    for name in back.masks:
        assert torch.equal(back.mask(name), masks.mask(name))
    write_npz(tmp_path / "again.npz", masks)
    assert (tmp_path / "again.npz").read_bytes() == (tmp_path / "m.npz").read_bytes()


def test_numpy_sees_packbits(masks: MaskFile, tmp_path: Path) -> None:
    write_npz(tmp_path / "m.npz", masks)
    with np.load(tmp_path / "m.npz", allow_pickle=False) as arrays:
        assert sorted(arrays.files) == ["a.weight.mask", "b.weight.mask"]
        assert np.array_equal(arrays["a.weight.mask"], np.packbits(masks.mask("a.weight").numpy()))


def test_keys_without_weight_are_understood(masks: MaskFile, tmp_path: Path) -> None:
    np.savez(tmp_path / "m.npz", **{"a.mask": masks.masks["a.weight"].packed.numpy()})
    assert list(read_npz(tmp_path / "m.npz", SHAPES, P24).masks) == ["a.weight"]


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({}, "holds no masks"),
        ({"ghost.weight.mask": np.zeros(2, np.uint8)}, "key 'ghost.weight.mask' names no tensor of the checkpoint"),
        ({"a.weight": np.zeros(2, np.uint8)}, "key 'a.weight' names no tensor"),
        ({"a.weight.mask": np.zeros(9, np.uint8)}, "mask of a.weight: 9 values of torch.uint8, shape (3, 4) needs 2"),
        ({"a.weight.mask": np.zeros(2, np.float32)}, "2 values of torch.float32"),
        ({"a.weight.mask": np.zeros(2, np.uint8)}, "3 of 3 groups along axis -1 do not keep exactly 2 kept of 4"),
        ({"a.weight.mask": np.array([None, 1], dtype=object)}, "Pickled arrays are refused"),
        ({"a.weight.mask": np.array(["x"])}, "cannot be read as an npz of packed masks"),
    ],
)
def test_other_content(tmp_path: Path, arrays: dict[str, np.ndarray], words: str) -> None:
    np.savez(tmp_path / "m.npz", **arrays)
    with pytest.raises(InputError) as caught:
        read_npz(tmp_path / "m.npz", SHAPES, P24)
    assert str(tmp_path / "m.npz") in str(caught.value)
    assert words in str(caught.value)


def test_other_files(tmp_path: Path, masks: MaskFile) -> None:
    with (tmp_path / "bare.npz").open("wb") as stream:
        np.save(stream, np.zeros(2, np.uint8))
    (tmp_path / "text.npz").write_text("no zip")
    write_npz(tmp_path / "cut.npz", masks)
    (tmp_path / "cut.npz").write_bytes((tmp_path / "cut.npz").read_bytes()[:-30])
    for name in ("bare.npz", "text.npz", "cut.npz", "absent.npz"):
        with pytest.raises(InputError, match=rf"{name}: cannot be read as an npz"):
            read_npz(tmp_path / name, SHAPES, P24)
