"""The standard table: token perplexity of every one-shot method at equal calibration tokens, dense and Wanda beside it."""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measurement import (
    Ledger,
    Table,
    add_text_flags,
    find_data,
    mebibytes,
    parser,
    run_child,
    save_windows,
    text_source,
    token_windows,
)
from torch import Tensor

from nmprune.calibration import consecutive_windows, load_text
from nmprune.checkpoint import locate
from nmprune.evaluate.perplexity import summarise
from nmprune.evaluate.streamed import streamed_nlls
from nmprune.methods import METHODS
from nmprune.run.tokens import load_tokenizer
from nmprune.stream import DecoderModel

TEXTS = ("wikitext2", "c4")


def main() -> None:
    arguments = read_arguments()
    torch.set_num_threads(arguments.threads)
    find_data()
    ledger = Ledger("quality", arguments)
    texts = {name: evaluation_windows(arguments, name) for name in arguments.texts}
    on = " ".join(sorted(texts))
    size = {"windows": arguments.max_windows, "seq_len": arguments.seq_len, "texts": on}
    calibration = text_source(arguments.calibration)
    with tempfile.TemporaryDirectory(prefix="nmprune-quality-", dir=arguments.folder) as place:
        key = {"model": arguments.model, "method": "dense", **size}
        ledger.row(key, lambda: perplexities(locate(arguments.model), texts))
        for method in arguments.methods:
            for seed in arguments.seeds:
                key = {"model": arguments.model, "method": method, "pattern": arguments.pattern}
                key |= {"calibration": calibration, "n_sequences": arguments.n_sequences, "seed": seed, **size}
                ledger.row(key, partial(measure, Path(place), key, arguments, texts))
    show(ledger)


def read_arguments() -> argparse.Namespace:
    made = parser(__doc__ or "")
    add_text_flags(made, n_sequences=16)
    made.add_argument("--methods", nargs="*", default=list(METHODS), choices=list(METHODS), help="rows")
    made.add_argument("--pattern", default="2:4", help="N kept of M")
    made.add_argument("--seeds", nargs="*", type=int, default=[0], help="calibration windows; one row each")
    made.add_argument("--texts", nargs="*", default=list(TEXTS), help="texts to evaluate on")
    made.add_argument("--max-windows", type=int, default=16, help="windows of each text")
    made.add_argument("--folder", type=Path, help="where runs are written (a temporary folder, deleted afterwards)")
    return made.parse_args()


def evaluation_windows(arguments: argparse.Namespace, name: str) -> Tensor:
    tokenizer = load_tokenizer(locate(arguments.model))
    return consecutive_windows(load_text(name, "evaluation"), tokenizer, arguments.seq_len, arguments.max_windows)


def perplexities(folder: Path, texts: dict[str, Tensor]) -> dict[str, Any]:
    """Text -> perplexity and its standard error."""
    model = DecoderModel.open(folder, allow_sparse=True)
    found = {}
    for name, windows in texts.items():
        text = load_text(name, "evaluation")
        one = summarise(streamed_nlls(model, windows), text, windows.shape[1])
        found[name] = {"label": text.label, "value": one.value, "error": one.value_error, "n_windows": one.n_windows}
    return {"perplexity": found}


def measure(
    place: Path, key: dict[str, Any], arguments: argparse.Namespace, texts: dict[str, Tensor]
) -> dict[str, Any]:
    """Prune in a fresh process, evaluate, delete."""
    model = locate(arguments.model)
    windows, origin = token_windows(model, key["calibration"], key["n_sequences"], key["seq_len"], key["seed"])
    tokens = save_windows(windows, origin, place / f"tokens-{key['seed']}")
    run = place / "run"
    words = ["--model", model, "--method", key["method"], "--pattern", key["pattern"], "--tokens", tokens, "--out", run]
    words += ["--n-sequences", key["n_sequences"], "--seq-len", key["seq_len"]]
    pruned = run_child(sys.executable, "nmprune_run.py", ["prune", *words], arguments.threads)
    found = perplexities(run / "model", texts)
    shutil.rmtree(run)
    return {**found, "run": pruned, "calibration": origin}


def show(ledger: Ledger) -> None:
    names = list(dict.fromkeys(name for row in ledger.rows for name in row["values"]["perplexity"]))
    labels = {name: one["label"] for row in ledger.rows for name, one in row["values"]["perplexity"].items()}
    tables = []
    for title, moves in (("Frozen weights", False), ("Updated weights", True)):
        rows = [
            cells(row, names)
            for row in ledger.rows
            if row["key"]["method"] == "dense" or METHODS[row["key"]["method"]].updates_weights == moves
        ]
        columns = ["method", "pattern", "calibration", "seed", *(f"token perplexity, {labels[name]}" for name in names)]
        columns += ["global sparsity", "run (s)", "solve (s)", "peak (MiB)"]
        tables.append(Table(title, columns, rows))
    sizes = {(row["key"]["windows"], row["key"]["seq_len"]) for row in ledger.rows}
    notes = [
        f"Perplexity: first {n} windows of {length} tokens of each text, +- standard error." for n, length in sizes
    ]
    origins = {row["values"]["calibration"] for row in ledger.rows if "calibration" in row["values"]}
    notes += [f"Calibrated on {origin}." for origin in sorted(origins)]
    notes.append("Head and embedding stay dense, and no other linear. Run: everything after the imports.")
    ledger.show("One-shot methods on the same tokens", tables, notes)


def cells(row: dict[str, Any], names: list[str]) -> list[str]:
    key, values = row["key"], row["values"]
    scores = [values["perplexity"].get(name) for name in names]
    shown = [f"{one['value']:,.1f} +- {one['error']:,.1f}" if one else "" for one in scores]
    if key["method"] == "dense":
        return ["dense", "", "", "", *shown, "0.0%", "", "", ""]
    run = values["run"]
    calibration = f"{key['calibration']}, {key['n_sequences']} x {key['seq_len']}"
    numbers = [f"{run['global_sparsity']:.1%}", f"{run['run_seconds']:,.0f}", f"{run['phases'].get('solve', 0):,.1f}"]
    return [
        key["method"],
        key["pattern"],
        calibration,
        str(key["seed"]),
        *shown,
        *numbers,
        mebibytes(run["peak_memory"]),
    ]


if __name__ == "__main__":
    main()
