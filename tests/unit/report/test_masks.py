from __future__ import annotations

import torch

from nmprune.checkpoint import MaskFile, TensorMask, diff
from nmprune.pattern import Pattern
from nmprune.report import diff_tables, mask_tables, role_of

P = Pattern(2, 4)
FIRST, LAST = torch.tensor([[True, True, False, False]]), torch.tensor([[False, False, True, True]])


def masks(**entries: torch.Tensor) -> MaskFile:
    named = {name.replace("__", "."): TensorMask.from_mask(mask, P) for name, mask in entries.items()}
    return MaskFile(named, "wanda", "m", "f" * 64, "0.1.0")


def test_role_of():
    assert role_of("model.layers.3.mlp.up_proj.weight") == "mlp.up_proj"
    assert role_of("model.layers.3.mlp.experts.7.down_proj.weight") == "mlp.experts.*.down_proj"
    assert role_of("lm_head.weight") == "lm_head"


def test_differences_add_up_per_role():
    a = masks(layers__0__up=FIRST, layers__1__up=FIRST, layers__0__down=FIRST, layers__0__gate=FIRST)
    b = masks(layers__0__up=FIRST, layers__1__up=LAST, layers__0__down=FIRST)
    table, only = diff_tables("A", "B", diff(a, b))
    assert {row[0]: row[1:] for row in table.rows} == {
        "up": ("2", "2", "1", "50.00%", "50.00%", ""),
        "down": ("1", "1", "0", "0.00%", "100.00%", ""),
    }
    assert table.total == ("all", "3", "3", "1", "33.33%", "66.67%", "")
    assert only.rows == (("A", "layers.*.gate", "1"),)


def test_files_without_a_tensor_in_common():
    (only,) = diff_tables("A", "B", diff(masks(layers__0__up=FIRST), masks(layers__0__down=FIRST)))
    assert only.rows == (("A", "layers.*.up", "1"), ("B", "layers.*.down", "1"))


def test_a_mask_file():
    origin, table = mask_tables("runs/x/masks.safetensors", masks(layers__0__up=FIRST, layers__1__up=LAST))
    assert dict(origin.rows)["pattern"] == "2 kept of 4"
    assert table.rows == (("up", "2", "8", "50.0%", ""),)


def test_mixed_patterns_are_counted():
    only_first = torch.tensor([[True, False, False, False]])
    entries = {f"layers.{i}.up": TensorMask.from_mask(FIRST, P) for i in range(2)}
    entries["layers.2.up"] = TensorMask.from_mask(only_first, Pattern(1, 4))
    mixed = MaskFile(entries, "wanda", "m", "f" * 64, "0.1.0")
    origin, table = mask_tables("runs/x/masks.safetensors", mixed)
    assert dict(origin.rows)["pattern"] == "1 kept of 4, 2 kept of 4"
    assert table.rows == (("up", "3", "12", "41.7%", "1:4: 1, 2:4: 2"),)
    same = masks(layers__0__up=FIRST, layers__1__up=FIRST, layers__2__up=FIRST)
    found = diff(mixed, same)
    (differences,) = diff_tables("A", "B", found)
    assert differences.rows == (("up", "3", "3", "1", "33.33%", "90.91%", "1"),)
    assert [one.same_pattern for one in found.tensors] == [True, True, False] and not found.total.same_pattern
