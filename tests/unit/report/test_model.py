from __future__ import annotations

from nmprune.report import ModelFacts, RoleFacts, model_tables

FACTS = ModelFacts(
    model="m",
    folder="",
    model_type="llama",
    n_layers=2,
    dtype="BF16",
    parameters=400,
    linears=(RoleFacts("mlp.up_proj", 2, (16, 10), "mlp.gate_proj", "layers.0.mlp.up_proj.weight"),),
    dense={"lm_head": (1, "head: dense")},
    patterns={"2:4": None, "8:16": "mlp.up_proj (in 10)"},
    pruned={"pattern": "2 kept of 4", "method": {"name": "wanda"}, "version": "0.1.0"},
)


def test_overview_linears_and_dense():
    overview, linears, dense = model_tables(FACTS)
    found = dict(overview.rows)
    assert found["parameters"] == "400, 80.0% of them in prunable linears"
    assert found["patterns that fit"] == "2:4"
    assert found["that do not"] == "8:16: mlp.up_proj (in 10)"
    assert found["pruned already"] == "2 kept of 4 by wanda (nmprune 0.1.0)"
    assert found["weights in"] == "not here: read from the config alone"
    assert linears.rows == (("mlp.up_proj", "2", "16 x 10", "mlp.gate_proj"),)
    assert dense.rows == (("lm_head", "1", "head: dense"),)
