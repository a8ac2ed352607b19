from __future__ import annotations

import json


def test_a_plan_from_the_config_alone(call, document, base, tmp_path):
    (tmp_path / "config.json").write_bytes((base / "config.json").read_bytes())
    words = ("plan", tmp_path, "--method", "sparsegpt", "--n-sequences", 4, "--seq-len", 16)
    result = call(*words, "--no-time")
    assert result.exit_code == 0, result.output
    assert "mlp.down_proj" in result.stdout
    assert "timing" not in result.stderr
    found = document(*words, "--no-time")
    assert (found["n_layers"], found["pattern"], found["parameters"]) == (2, "2 kept of 4", 24736)
    assert found["fits"]
    assert found["seconds"] is None


def test_a_plan_with_a_time(document, base, tmp_path):
    found = document(
        "plan", base, "--method", "wanda", "--time", "--out", tmp_path, "--n-sequences", 2, "--seq-len", 16
    )
    assert found["total_seconds"] > 0


def test_a_device_that_is_not_here(document, base):
    found = document("plan", base, "--method", "wanda", "--n-sequences", 2, "--seq-len", 16, "--device-memory", "1KB")
    assert not found["fits"]
    assert found["device_memory"] == 1000


def test_a_model_that_is_sparse_already(call, document, base, tmp_path):
    config = json.loads((base / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "nmprune": {"pattern": "2 kept of 4"}}))
    words = ("plan", tmp_path, "--method", "wanda", "--n-sequences", 2, "--seq-len", 16, "--no-time")
    refused = call(*words)
    assert refused.exit_code == 2
    assert "is sparse already: its config.json says so" in refused.stderr
    assert "--allow-sparse" in refused.stderr
    assert document(*words, "--allow-sparse")["n_layers"] == 2


def test_two_sums_per_input_take_twice_the_memory_of_one(document, base):
    def statistics(method):
        words = ("plan", base, "--method", method, "--n-sequences", 2, "--seq-len", 16, "--no-time")
        found = document(*words)["memory"]
        return next(parts["statistics"] for parts in found.values() if "statistics" in parts)

    assert statistics("dsnot") == 2 * statistics("wanda")


def test_mixed_patterns_are_planned(call, document, base):
    words = ("plan", base, "--method", "wanda", "--n-sequences", 2, "--seq-len", 16, "--no-time")
    mixed = ("--allocate", "1:4,2:4,dense", "--density", "0.4", "--allocate-rule", "owl")
    found = document(*words, *mixed)
    assert found["pattern"] == "mixed: 1 kept of 4, 2 kept of 4, or dense, 40.00% kept in all"
    assert "allocation" in found["memory"]
    assert found["layer_passes"] == document(*words)["layer_passes"] + 2
    refused = call(*words, "--allocate", "2:4")
    assert refused.exit_code == 2
    assert "not applicable: with one pattern there is nothing to allocate" in refused.stderr
