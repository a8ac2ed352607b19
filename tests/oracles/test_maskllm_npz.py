"""Masks as MaskLLM's own compression tool writes them; see section E of the oracles' README."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from nmprune.checkpoint import read_npz, write_npz
from nmprune.pattern import Pattern
from shared_data import shared


def test_reads_and_writes_what_maskllm_publishes(tmp_path: Path) -> None:
    golden = shared("oracles/E_maskllm_masks.npz")
    expected = {k.removesuffix(".mask"): v for k, v in load_file(golden.with_suffix(".safetensors")).items()}
    shapes = {
        key.removesuffix(".mask"): tuple(shape)
        for key, shape in json.loads(golden.with_suffix(".json").read_text())["shapes"].items()
    }
    masks = read_npz(golden, shapes, Pattern(2, 4))
    assert set(masks.masks) == set(expected) == set(shapes)
    for name, mask in expected.items():
        assert torch.equal(masks.mask(name), mask)
    write_npz(tmp_path / "ours.npz", masks)
    with np.load(golden, allow_pickle=False) as theirs, np.load(tmp_path / "ours.npz", allow_pickle=False) as ours:
        assert set(ours.files) == set(theirs.files)
        for key in theirs.files:
            assert np.array_equal(ours[key], theirs[key])
            assert ours[key].dtype == theirs[key].dtype
