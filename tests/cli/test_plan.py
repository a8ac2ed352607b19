from __future__ import annotations


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
    found = document("plan", base, "--time", "--out", tmp_path, "--n-sequences", 2, "--seq-len", 16)
    assert found["total_seconds"] > 0


def test_a_device_that_is_not_here(document, base):
    found = document("plan", base, "--n-sequences", 2, "--seq-len", 16, "--device-memory", "1KB")
    assert not found["fits"]
    assert found["device_memory"] == 1000
