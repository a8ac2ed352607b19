"""Peak memory against depth: one decoder layer shape at several depths, pruned whole, masks and model written."""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import Any

import random_llama
from measurement import Ledger, Table, mebibytes, parser, run_child, save_windows, token_windows, verdict

TARGET = 0.10


def main() -> None:
    arguments = read_arguments()
    ledger = Ledger("depth_memory", arguments)
    shape = random_llama.Shape(arguments.hidden, arguments.ffn, arguments.heads)
    with tempfile.TemporaryDirectory(prefix="nmprune-depth-", dir=arguments.folder) as place:
        for n_layers in arguments.layers:
            for method in arguments.method:
                key = {
                    "method": method,
                    "layers": n_layers,
                    "hidden": shape.hidden,
                    "ffn": shape.ffn,
                    "n_sequences": arguments.n_sequences,
                    "seq_len": arguments.seq_len,
                }
                ledger.row(key, partial(measure, Path(place), shape, key, arguments.threads))
            shutil.rmtree(Path(place) / "model", ignore_errors=True)
    show(ledger)


def read_arguments() -> argparse.Namespace:
    made = parser(__doc__ or "")
    made.add_argument("--layers", type=int, nargs="+", default=[4, 16, 64], help="depths")
    made.add_argument("--method", nargs="+", default=["wanda", "sparsegpt"], help="methods")
    made.add_argument("--hidden", type=int, default=1024, help="hidden size")
    made.add_argument("--ffn", type=int, default=4096, help="feed-forward size")
    made.add_argument("--heads", type=int, default=16, help="attention heads")
    made.add_argument("--n-sequences", type=int, default=4, help="calibration windows of random token ids")
    made.add_argument("--seq-len", type=int, default=128, help="tokens per window")
    made.add_argument("--folder", type=Path, help="where to write the models (a temporary folder, deleted afterwards)")
    return made.parse_args()


def measure(place: Path, shape: random_llama.Shape, key: dict[str, Any], threads: int) -> dict[str, Any]:
    """Prune in a fresh process; the model of this depth is written where it is not there yet."""
    model = place / "model"
    if not model.is_dir():
        random_llama.write(model, shape, key["layers"])
    windows, origin = token_windows(model, "random", key["n_sequences"], key["seq_len"], 0)
    tokens = save_windows(windows, origin, place / "tokens")
    run = place / "run"
    words = ["prune", "--model", model, "--method", key["method"], "--tokens", tokens, "--out", run]
    words += ["--n-sequences", key["n_sequences"], "--seq-len", key["seq_len"]]
    found = run_child(sys.executable, "nmprune_run.py", words, threads)
    if not (run / "results.json").is_file() or not (run / "model").is_dir():
        sys.exit(f"{run} is not a finished run")
    shutil.rmtree(run)
    return {**found, "layer_bytes": shape.layer_bytes}


def show(ledger: Ledger) -> None:
    groups: defaultdict[tuple[Any, ...], list[dict[str, Any]]] = defaultdict(list)
    for row in ledger.rows:
        settings = ("method", "hidden", "ffn", "n_sequences", "seq_len", "threads", "processor")
        groups[tuple(row["key"][name] for name in settings)].append(row)
    rows, spreads = [], []
    for group in groups.values():
        group.sort(key=lambda row: row["key"]["layers"])
        peaks = [row["values"]["peak_memory"] for row in group]
        for row in group:
            key, values = row["key"], row["values"]
            cells = [key["method"], str(key["layers"]), mebibytes(values["layer_bytes"])]
            cells += [mebibytes(values["layer_bytes"] * key["layers"]), mebibytes(values["peak_memory"])]
            cells += [f"{values['peak_memory'] / peaks[0]:.3f}", f"{values['run_seconds']:,.0f}", str(key["threads"])]
            rows.append(cells)
        if len(group) > 1:
            growth = (max(peaks) - min(peaks)) / min(peaks)
            depths = ", ".join(str(row["key"]["layers"]) for row in group)
            size = mebibytes(group[0]["values"]["layer_bytes"])
            cells = [group[0]["key"]["method"], size, depths, f"{growth:.1%}", verdict(growth <= TARGET)]
            spreads.append(cells)
    columns = ["method", "layers", "layer (MiB)", "linears (MiB)", "peak (MiB)", "to fewest", "seconds", "threads"]
    tables = [Table("Peak memory against depth", columns, rows)]
    if spreads:
        heads = ["method", "layer (MiB)", "depths", "(max - min) / min", f"target <= {TARGET:.0%}"]
        tables.append(Table("Do the peaks stay together?", heads, spreads))
    notes = [
        "Peak: highest RSS of a fresh process that makes the whole run (all layers, masks, pruned model written and read back) "
        "less its RSS after the imports. Mapped pages count.",
        "Linears: fp32 bytes of all layers' linears, what holding the whole model would take. Random weights and tokens.",
    ]
    ledger.show("Memory and depth", tables, notes)


if __name__ == "__main__":
    main()
