from __future__ import annotations

import json
from pathlib import Path

import pytest

from nmprune.run import Recipe, prune_run

SETTINGS = {
    "prior": "wanda",
    "steps": 4,
    "hidden": 8,
    "layer_width": 3,
    "component_width": 3,
    "guard": False,
    "descend": 0,
}


@pytest.fixture(scope="module")
def learned(made, tmp_path_factory) -> Path:
    """A finished hyperprune run."""
    out = tmp_path_factory.mktemp("regenerate") / "run"
    calibration = {"source": "builtin", "n_sequences": 4, "seq_len": 16}
    raw = {"model": str(made[0]), "method": {"name": "hyperprune", **SETTINGS}, "calibration": calibration}
    prune_run(Recipe.from_dict(raw), out)
    return out


def test_it_shows_and_keeps(call, learned):
    result = call("regenerate", learned)
    assert result.exit_code == 0, result.output
    assert "prior wanda, continual term 0.1" in result.stdout
    assert "network = run" in result.stdout and "mlp.down_proj" in result.stdout and "loss, network" in result.stdout
    assert "of the groups as in the run" in result.stderr and "saved:" in result.stderr


def test_the_document_with_every_flag(document, learned, made, tmp_path):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    found = document(
        *("regenerate", learned, "--base", made[0], "--device", "cpu", "--hidden-budget", "1KB"),
        *("--scratch", scratch, "--threads", 1, "--quiet"),
    )
    saved = json.loads(Path(found["saved"]).read_text())
    assert all(found[key] == value for key, value in saved.items())
    assert len(saved["linears"]) == 14 and [one["layer"] for one in saved["layers"]] == [0, 1]
    assert 0 <= saved["agreement"] <= 1 and saved["prior_run"] is not None
    assert document("diff", learned, found["masks"])["total"]["n_groups"] == sum(
        one["groups"] for one in saved["linears"]
    )


def test_a_run_of_another_method(call, run):
    result = call("regenerate", run)
    assert result.exit_code == 2 and "only hyperprune has one network for all masks" in result.stderr
