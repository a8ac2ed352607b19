from __future__ import annotations

from nmprune.architectures import DenseLinear
from nmprune.run.description import self_description
from nmprune.version import VERSION


def test_numbers_are_collapsed_and_counted():
    dense = [
        DenseLinear("lm_head", (8, 4), "head: dense"),
        *(DenseLinear(f"l.{i}.k", (8, 4), "excluded") for i in (0, 1)),
    ]
    found = self_description("2 kept of 4", {"name": "wanda"}, "abc", ["l.0.up", "l.1.up", "l.0.experts.3.w"], dense)
    assert found == {
        "version": VERSION,
        "pattern": "2 kept of 4",
        "group_axis": "input features",
        "method": {"name": "wanda"},
        "mask_checksum": "sha256:abc",
        "pruned": {"l.*.up": 2, "l.*.experts.*.w": 1},
        "dense": [
            {"linears": "lm_head", "count": 1, "reason": "head: dense"},
            {"linears": "l.*.k", "count": 2, "reason": "excluded"},
        ],
    }
