"""`nmprune plan` against the runs that it plans: peak memory and seconds, each run in a fresh process after its plan."""

from __future__ import annotations

import argparse
import re
import shutil
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import random_llama
from measurement import (
    Ledger,
    Table,
    add_calibration_flags,
    add_device_flag,
    mebibytes,
    parser,
    run_child,
    save_windows,
    token_windows,
    verdict,
)

from nmprune.checkpoint import locate

MEMORY_TARGET, TIME_TARGET = 0.10, 0.30
PHASES = ("read", "forward", "statistics", "solve", "measure", "write")


def main() -> None:
    arguments = read_arguments()
    ledger = Ledger("plan_accuracy", arguments)
    with tempfile.TemporaryDirectory(prefix="nmprune-plan-", dir=arguments.folder) as place:
        for case in arguments.cases:
            key = case_key(arguments.model, case)
            ledger.row(key, partial(measure, Path(place), key, arguments))
        shape = random_llama.Shape(arguments.hidden, arguments.ffn, arguments.heads)
        for case in arguments.random_cases if arguments.random_layers else ():
            key = case_key(random_llama.describe(shape, arguments.random_layers), case)
            if arguments.dtype != "auto":
                key["dtype"] = arguments.dtype
            ledger.row(key, partial(measure, Path(place), key, arguments, shape))
    show(ledger)


def read_arguments() -> argparse.Namespace:
    made = parser(__doc__ or "")
    made.add_argument("--model", default="smollm2-135m", help="HF folder, .gguf file, hub id, or smollm2-135m")
    cases = ["wanda:16x512", "sparsegpt:16x512", "sparsegpt:32x512"]
    made.add_argument("--cases", nargs="*", type=case_type, default=cases, help="METHOD:SEQUENCESxTOKENS on the model")
    made.add_argument("--random-layers", type=int, default=4, help="depth of the random model; 0 = leave it out")
    random_cases = ["wanda:4x512", "sparsegpt:4x512"]
    made.add_argument(
        "--random-cases", nargs="*", type=case_type, default=random_cases, help="cases on the random model"
    )
    made.add_argument("--hidden", type=int, default=1024, help="hidden size of the random model")
    made.add_argument("--ffn", type=int, default=4096, help="feed-forward size of the random model")
    made.add_argument("--heads", type=int, default=16, help="attention heads of the random model")
    made.add_argument(
        "--folder", type=Path, help="where to write models and runs (a temporary folder, deleted afterwards)"
    )
    made.add_argument("--dtype", default="auto", help="what forwards compute in; auto: as the model was saved")
    add_device_flag(made)
    add_calibration_flags(made)
    return made.parse_args()


def case_type(text: str) -> str:
    if not re.fullmatch(r"[a-z]\w*:\d+x\d+", text):
        raise argparse.ArgumentTypeError(f"{text!r}; expected METHOD:SEQUENCESxTOKENS, such as wanda:16x512")
    return text


def case_key(model: str, case: str) -> dict[str, Any]:
    method, n_sequences, seq_len = re.split("[:x]", case)
    return {"model": model, "method": method, "n_sequences": int(n_sequences), "seq_len": int(seq_len)}


def measure(
    place: Path, key: dict[str, Any], arguments: argparse.Namespace, shape: random_llama.Shape | None = None
) -> dict[str, Any]:
    """Plan, then run; with a `shape` on a random model, written where it is not there yet."""
    model = place / "model" if shape is not None else locate(arguments.model)
    if shape is not None and not model.is_dir():
        random_llama.write(model, shape, arguments.random_layers)
    source = "random" if shape is not None else arguments.calibration
    windows, origin = token_windows(model, source, key["n_sequences"], key["seq_len"], arguments.seed)
    tokens = save_windows(windows, origin, place / "tokens")
    run = place / "run"
    words = ["--model", model, "--method", key["method"], "--tokens", tokens, "--out", run]
    words += ["--n-sequences", key["n_sequences"], "--seq-len", key["seq_len"]]
    words += ["--device", arguments.device, "--dtype", key.get("dtype", "auto")]
    planned = run_child(sys.executable, "nmprune_run.py", ["plan", *words], arguments.threads)
    measured = run_child(sys.executable, "nmprune_run.py", ["prune", *words], arguments.threads)
    shutil.rmtree(run)
    return {"planned": planned, "measured": measured, "calibration": origin}


def show(ledger: Ledger) -> None:
    rows, phase_rows = [], []
    for row in ledger.rows:
        key, planned, measured = row["key"], row["values"]["planned"], row["values"]["measured"]
        name = f"{key['model']}, {key['method']}, {key['n_sequences']} x {key['seq_len']}, {where(key)}"
        used = measured["device_peak_memory"] if "device" in key else measured["peak_memory"]
        memory = planned["peak_memory"] / used - 1
        seconds = sum(planned["phases"].values()) / measured["run_seconds"] - 1
        cells = [name, mebibytes(planned["peak_memory"]), mebibytes(used), f"{memory:+.1%}"]
        cells += [verdict(abs(memory) <= MEMORY_TARGET)]
        cells += [f"{sum(planned['phases'].values()):,.1f}", f"{measured['run_seconds']:,.1f}", f"{seconds:+.1%}"]
        rows.append([*cells, verdict(abs(seconds) <= TIME_TARGET)])
        phase_rows.append([name, *(_phase(planned, measured, phase) for phase in PHASES)])
        rest = measured["run_seconds"] - sum(measured["phases"].values())
        phase_rows[-1].append(f"- / {rest:,.1f}")
    columns = ["run", "planned (MiB)", "measured (MiB)", "error", f"target {MEMORY_TARGET:.0%}"]
    columns += ["planned (s)", "measured (s)", "error", f"target {TIME_TARGET:.0%}"]
    tables = [
        Table("Planned against measured", columns, rows),
        Table("Seconds by phase, planned / measured", ["run", *PHASES, "the rest"], phase_rows),
    ]
    notes = [
        "Memory: peak RSS of the run's process less its RSS after the imports; mapped pages count; on a GPU what torch allocated "
        "there at most. Seconds: the whole run after "
        "the imports. Error: planned / measured - 1; below zero: the run needed more than planned.",
        "Peak memory of results.json itself (made by the run, not by this command): "
        + ", ".join(_or_none(row["values"]["measured"]["peak_memory_in_results"]) for row in ledger.rows)
        + " MiB.",
        "Seconds that planning took: "
        + ", ".join(f"{row['values']['planned']['plan_seconds']:.1f}" for row in ledger.rows)
        + ".",
    ]
    ledger.show("How well a plan foretells its run", tables, notes)


def where(key: dict[str, Any]) -> str:
    """What a row was measured on, and in which dtype where that is not the model's own."""
    place = key.get("device") or f"threads {key['threads']}"
    return f"{place}, {key['dtype']}" if "dtype" in key else place


def _phase(planned: dict[str, Any], measured: dict[str, Any], phase: str) -> str:
    before = planned["phases"].get(phase)
    return f"{'-' if before is None else f'{before:,.1f}'} / {measured['phases'].get(phase, 0.0):,.1f}"


def _or_none(n_bytes: int | None) -> str:
    return "none" if n_bytes is None else mebibytes(n_bytes)


if __name__ == "__main__":
    main()
