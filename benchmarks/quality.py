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
from evaluation import evaluation_windows, perplexities
from measurement import (
    Ledger,
    Table,
    add_device_flag,
    add_text_flags,
    device_of,
    device_peak,
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
from nmprune.checkpoint import Checkpoint, locate
from nmprune.evaluate.layer_error import layer_errors
from nmprune.methods import METHODS
from nmprune.run.folder import RunFolder
from nmprune.run.permuted_base import permuted_base
from nmprune.run.tokens import load_tokenizer
from nmprune.stream import DecoderModel, select

TEXTS = ("wikitext2", "c4")
PHASES = ("forward", "statistics", "solve")
HELD_OUT_WINDOWS = 4


def main() -> None:
    arguments = read_arguments()
    torch.set_num_threads(arguments.threads)
    find_data()
    ledger = Ledger("quality", arguments)
    texts = {name: evaluation_windows(arguments, name) for name in arguments.texts}
    unseen = held_out_windows(arguments)
    on = " ".join(sorted(texts))
    size = {"windows": arguments.max_windows, "seq_len": arguments.seq_len, "texts": on}
    calibration = text_source(arguments.calibration)
    with tempfile.TemporaryDirectory(prefix="nmprune-quality-", dir=arguments.folder) as place:
        key = {"model": arguments.model, "method": "dense", **size}
        ledger.row(key, lambda: {"perplexity": perplexities(locate(arguments.model), texts, device_of(arguments))})
        for method in arguments.methods:
            for seed in arguments.seeds:
                key = {"model": arguments.model, "method": method, "pattern": arguments.pattern}
                key |= {"calibration": calibration, "n_sequences": arguments.n_sequences, "seed": seed, **size}
                ledger.row(key, partial(measure, Path(place), key, arguments, texts, unseen))
    show(ledger)


def read_arguments() -> argparse.Namespace:
    made = parser(__doc__ or "")
    add_device_flag(made)
    add_text_flags(made, n_sequences=16)
    made.add_argument(
        "--methods",
        nargs="*",
        default=list(METHODS),
        help="rows; with steps: wanda+polish, descent+reconstruct, sparsegpt+allocate; with settings: hyperprune:network=false",
    )
    made.add_argument("--pattern", default="2:4", help="N kept of M")
    made.add_argument("--seeds", nargs="*", type=int, default=[0], help="calibration windows; one row each")
    made.add_argument("--texts", nargs="*", default=list(TEXTS), help="texts to evaluate on")
    made.add_argument("--max-windows", type=int, default=16, help="windows of each text")
    made.add_argument("--folder", type=Path, help="where runs are written (a temporary folder, deleted afterwards)")
    return made.parse_args()


def held_out_windows(arguments: argparse.Namespace) -> Tensor:
    """For output errors of linears: text that neither calibrates nor is evaluated."""
    tokenizer = load_tokenizer(locate(arguments.model))
    source = text_source(arguments.calibration)
    text = load_text("builtin" if source == "random" else source, "choose")
    return consecutive_windows(text, tokenizer, arguments.seq_len, HELD_OUT_WINDOWS)


def held_out_error(run: Path, unseen: Tensor, device: torch.device) -> float:
    """Mean over linears of the relative squared output error on unseen text."""
    folder = RunFolder(run)
    recipe, pruned = folder.read_recipe(), DecoderModel.open(folder.model, allow_sparse=True, device=device)
    base = Checkpoint.open(locate(recipe.model))
    if folder.permutation_file.is_file():
        base = permuted_base(folder, recipe, base)
    errors = layer_errors(base, pruned, select(pruned, recipe.pattern, recipe.exclude), unseen)
    return sum(errors.values()) / len(errors)


def measure(
    place: Path, key: dict[str, Any], arguments: argparse.Namespace, texts: dict[str, Tensor], unseen: Tensor
) -> dict[str, Any]:
    """Prune in a fresh process, evaluate, delete."""
    model = locate(arguments.model)
    windows, origin = token_windows(model, key["calibration"], key["n_sequences"], key["seq_len"], key["seed"])
    tokens = save_windows(windows, origin, place / f"tokens-{key['seed']}")
    run = place / "run"
    words = ["--model", model, "--method", key["method"], "--pattern", key["pattern"], "--tokens", tokens, "--out", run]
    words += ["--n-sequences", key["n_sequences"], "--seq-len", key["seq_len"], "--device", arguments.device]
    device = device_of(arguments)
    pruned = run_child(sys.executable, "nmprune_run.py", ["prune", *words], arguments.threads)
    found = {
        "perplexity": perplexities(run / "model", texts, device),
        "held_out_error": held_out_error(run, unseen, device),
    }
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
            if row["key"]["method"] == "dense" or row["values"]["run"]["updates_weights"] == moves
        ]
        columns = [
            "method",
            "pattern",
            "calibration",
            "seed",
            "device",
            *(f"token perplexity, {labels[name]}" for name in names),
        ]
        columns += [
            "output error",
            "on unseen text",
            "global sparsity",
            "run (s)",
            *PHASES,
            "peak (MiB)",
            "device peak (MiB)",
        ]
        tables.append(Table(title, columns, rows))
    sizes = {(row["key"]["windows"], row["key"]["seq_len"]) for row in ledger.rows}
    notes = [
        f"Perplexity: first {n} windows of {length} tokens of each text, +- standard error." for n, length in sizes
    ]
    origins = {row["values"]["calibration"] for row in ledger.rows if "calibration" in row["values"]}
    notes += [f"Calibrated on {origin}." for origin in sorted(origins)]
    notes.append(
        "Output error: mean over linears of ||X (W' - W)^T||^2 / ||X W^T||^2, X the linear's inputs in the pruned model: on "
        f"the calibration tokens, and on {HELD_OUT_WINDOWS} windows of the same source that nothing was calibrated on. Methods "
        "that aim at the dense model's output (descent, reconstruct) make up for earlier layers and do not minimise it. "
        "Phases in seconds."
    )
    guarded = [one for row in ledger.rows if (one := row["values"].get("run", {}).get("guarded")) is not None]
    if guarded:
        share = f"{min(guarded):.0%} to {max(guarded):.0%}"
        notes.append(f"Reconstruct's held-out guard took the new weights of {share} of the linears.")
    for row in ledger.rows:
        accepted = row["values"].get("run", {}).get("layers_accepted")
        if accepted:
            key = row["key"]
            which = f"{key['method']}, {key['pattern']}, {key['n_sequences']} sequences, seed {key['seed']}"
            notes.append(
                f"Guard of {which}: learned masks taken in {accepted.count(True)} of {len(accepted)} decoder layers."
            )
    notes.append("Head and embedding stay dense, and no other linear. Run: everything after the imports.")
    ledger.show("One-shot methods on the same tokens", tables, notes)


def cells(row: dict[str, Any], names: list[str]) -> list[str]:
    key, values = row["key"], row["values"]
    scores = [values["perplexity"].get(name) for name in names]
    shown = [f"{one['value']:,.1f} +- {one['error']:,.1f}" if one else "" for one in scores]
    if key["method"] == "dense":
        return [
            "dense",
            "",
            "",
            "",
            key.get("device", "cpu"),
            *shown,
            "0",
            "0",
            "0.0%",
            "",
            *["" for _ in PHASES],
            "",
            "",
        ]
    run = values["run"]
    calibration = f"{key['calibration']}, {key['n_sequences']} x {key['seq_len']}"
    errors = [run["output_error"], values["held_out_error"]]
    numbers = ["" if one is None else f"{one:.4f}" for one in errors]
    numbers += [f"{run['global_sparsity']:.1%}", f"{run['run_seconds']:,.0f}"]
    numbers += [f"{run['phases'].get(phase, 0):,.1f}" for phase in PHASES]
    return [
        key["method"],
        key["pattern"],
        calibration,
        str(key["seed"]),
        key.get("device", "cpu"),
        *shown,
        *numbers,
        mebibytes(run["peak_memory"]),
        device_peak(run),
    ]


if __name__ == "__main__":
    main()
