from __future__ import annotations

from nmprune.architectures import DenseLinear
from nmprune.pattern import Pattern
from nmprune.run.description import self_description, words_of
from nmprune.version import VERSION


def test_numbers_are_collapsed_and_counted():
    dense = [
        DenseLinear("lm_head", (8, 4), "head: dense"),
        *(DenseLinear(f"l.{i}.k", (8, 4), "excluded") for i in (0, 1)),
    ]
    pruned = dict.fromkeys(["l.0.up", "l.1.up", "l.0.experts.3.w"], Pattern(2, 4))
    found = self_description(pruned, {"name": "wanda"}, "abc", dense)
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


def test_mixed_patterns_are_said_linear_by_linear_and_experts_of_a_kind_together():
    one, two = Pattern(1, 4), Pattern(2, 4)
    pruned = {
        "l.0.up": two,
        "l.1.up": one,
        **{f"l.0.experts.{e}.w": two for e in range(3)},
        "l.1.experts.0.w": two,
        "l.1.experts.1.w": one,
    }
    found = self_description(pruned, {"name": "wanda"}, "abc", [])
    assert found["pattern"] == words_of([two, one]) == "mixed: 1 kept of 4, 2 kept of 4"
    assert found["patterns"] == {
        "l.0.up": "2:4",
        "l.1.up": "1:4",
        "l.0.experts.*.w": "2:4",
        "l.1.experts.0.w": "2:4",
        "l.1.experts.1.w": "1:4",
    }
    assert found["pruned"] == {"l.*.up": 2, "l.*.experts.*.w": 5}
