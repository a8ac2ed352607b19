from __future__ import annotations

from dataclasses import replace

from nmprune.report import role_table, totals
from nmprune.results import DenseResult, LinearResult, Results


def linear(
    layer: int, role: str, shape: tuple[int, int], error: float | None, **notes: float | int | str
) -> LinearResult:
    name = f"layers.{layer}.{role}"
    return LinearResult(name, layer, role, f"{name}.weight", shape, 0.5, 64, 1.5, error, notes=notes)


RESULTS = Results(
    model="models/m",
    model_fingerprint="f",
    method={"name": "sparsegpt", "damping": 0.01},
    pattern="2:4",
    pattern_words="2 kept of 4",
    updates_weights=True,
    calibration={"source": "wikitext2", "split": "train", "n_sequences": 8, "seq_len": 32, "seed": 3, "n_tokens": 256},
    weights_in_linears=224,
    weights_kept=112,
    parameters=448,
    global_sparsity=0.25,
    mask_checksum="c",
    seconds={"solve": 4.5, "write": 0.5},
    sessions=2,
    peak_memory=3 << 20,
    device_peak_memory=None,
    machine={},
    linears=(
        linear(0, "up", (8, 8), 0.1),
        linear(0, "down", (4, 8), None),
        linear(1, "up", (8, 8), 0.3, damping_steps=1, dead_inputs=2),
        linear(1, "down", (8, 8), None, fallback="magnitude"),
    ),
    dense=(DenseResult("lm_head", (4, 4), "head: dense"), DenseResult("embed", (4, 4), "embedding: dense")),
)


def test_one_row_per_role_with_means_and_sums():
    table = role_table(RESULTS)
    assert table.title == "models/m: 2:4 (2 kept of 4) by sparsegpt"
    assert table.rows == (
        ("up", "2", "8 x 8", "50.0%", "0.2000", "3.00 s", "1 needed more damping, 1 with dead inputs"),
        ("down", "2", "2 shapes", "50.0%", "", "3.00 s", "1 by magnitude: too few tokens"),
    )
    assert table.total[:4] == ("all", "4", "2 shapes", "50.0%")


def test_held_out_errors_have_their_column_where_there_are_some():
    linears = [
        replace(one, held_out_error=held) for one, held in zip(RESULTS.linears, (0.2, None, 0.5, None), strict=True)
    ]
    table, without = role_table(replace(RESULTS, linears=tuple(linears))), role_table(RESULTS)
    assert table.columns[4:6] == ("output error>", "held-out error>") and "held-out error>" not in without.columns
    assert [row[4:6] for row in (*table.rows, table.total)] == [("0.2000", "0.3500"), ("", ""), ("0.2000", "0.3500")]
    assert {len(row) for row in (*table.rows, table.total)} == {len(table.columns)} == {8}
    assert {len(row) for row in (*without.rows, without.total)} == {len(without.columns)} == {7}


def test_totals():
    found = dict(totals(RESULTS).rows)
    assert found["global sparsity"] == "25.00% of 448 parameters"
    assert found["weights"] == "112 of 224 kept, and moved by the method"
    assert found["dense"] == "head: dense (1); embedding: dense (1)"
    assert found["calibration"] == "wikitext2 (train), 8 x 32 tokens, seed 3"
    assert found["time"] == "5.00 s (solve 4.50 s, write 0.50 s)"
    assert found["peak memory"] == "3.0 MiB above the start"
    assert found["sessions"] == "2: the run was resumed"


def test_totals_of_a_frozen_method_without_calibration():
    found = dict(totals(replace(RESULTS, updates_weights=False, calibration=None, sessions=1, peak_memory=None)).rows)
    assert found["weights"] == "112 of 224 kept, each as it was"
    assert found["calibration"] == "none needed"
    assert not {"sessions", "peak memory", "peak on the device"} & found.keys()
