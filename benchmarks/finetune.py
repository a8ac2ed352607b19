"""Finetuning that keeps its masks: token perplexity against the dense model's, before and after, in a stated time."""

from __future__ import annotations

import argparse
import json
import shutil
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
    find_data,
    mebibytes,
    parser,
    text_source,
    verdict,
)
from torch import Tensor

from nmprune.checkpoint import locate
from nmprune.run import Machine, Recipe, prune_run
from nmprune.run.finetune import finetune_run
from nmprune.run.verify import verify_run
from nmprune.train.finetune_settings import FinetuneRecipe

TARGET = 2.0  # times the dense model's perplexity, with distillation
LORA_RANK = 16
VARIANTS: dict[str, dict[str, Any]] = {
    "kl": {"loss": "kl"},
    "lm": {"loss": "lm"},
    "kl+norms": {"loss": "kl", "also": ("norms",)},
    f"kl+lora{LORA_RANK}": {"loss": "kl", "lora": LORA_RANK},
}


def main() -> None:
    arguments = read_arguments()
    torch.set_num_threads(arguments.threads)
    find_data()
    ledger = Ledger("finetune", arguments)
    texts = {name: evaluation_windows(arguments, name) for name in arguments.texts}
    common = {"model": arguments.model, "windows": arguments.max_windows, "texts": " ".join(sorted(texts))}
    common["seq_len"] = arguments.seq_len
    ledger.row(
        {**common, "what": "dense"},
        lambda: {"perplexity": perplexities(locate(arguments.model), texts, device_of(arguments))},
    )
    with tempfile.TemporaryDirectory(prefix="nmprune-finetune-", dir=arguments.folder) as place:
        start = arguments.start or Path(place, "start")
        before = {"method": arguments.method, "pattern": arguments.pattern, "n_sequences": arguments.n_sequences}
        before |= {"calibration": text_source(arguments.calibration), "seed": arguments.seed}
        named = {"start": str(arguments.start)} if arguments.start else before
        ledger.row({**common, "what": "start", **named}, partial(measure_start, arguments, start, texts))
        for variant in arguments.variants:
            key = {**common, "what": variant, **named, "lr": arguments.lr, "minutes": arguments.minutes}
            key |= {"steps": arguments.steps, "batch_size": arguments.batch_size}
            key["text"] = text_source(arguments.calibration)
            ledger.row(key, partial(measure, arguments, variant, start, Path(place, "tuned"), texts))
    show(ledger)


def read_arguments() -> argparse.Namespace:
    made = parser(__doc__ or "")
    add_device_flag(made)
    add_text_flags(made, n_sequences=64)
    made.add_argument("--start", type=Path, help="a finished run to start from, in place of pruning one")
    made.add_argument("--method", default="descent+reconstruct", help="what prunes the start")
    made.add_argument("--pattern", default="2:4", help="N kept of M")
    made.add_argument("--variants", nargs="*", choices=list(VARIANTS), default=["kl"], help="rows")
    made.add_argument("--minutes", type=float, default=30.0, help="of training, each")
    made.add_argument("--steps", type=int, default=0, help="of training at most, each; 0 = until the time is up")
    made.add_argument("--lr", type=float, default=FinetuneRecipe.lr, help="learning rate")
    made.add_argument("--batch-size", type=int, default=FinetuneRecipe.batch_size, help="windows per step")
    made.add_argument("--texts", nargs="*", default=["wikitext2", "c4"], help="texts to evaluate on")
    made.add_argument("--max-windows", type=int, default=16, help="windows of each text")
    made.add_argument("--folder", type=Path, help="where runs are written (a temporary folder, deleted afterwards)")
    return made.parse_args()


def pruned(arguments: argparse.Namespace, run: Path) -> Path:
    """The start, pruned where it is not there yet."""
    if not (run / "results.json").is_file():
        method, *steps = arguments.method.split("+")
        calibration = {"source": text_source(arguments.calibration), "n_sequences": arguments.n_sequences}
        raw = {"model": str(locate(arguments.model)), "method": method, "pattern": arguments.pattern}
        raw |= {"seed": arguments.seed, "calibration": {**calibration, "seq_len": arguments.seq_len}}
        prune_run(
            Recipe.from_dict({**raw, **dict.fromkeys(steps, "true")}),
            run,
            Machine(arguments.device, threads=arguments.threads),
        )
    return run


def measure_start(arguments: argparse.Namespace, start: Path, texts: dict[str, Tensor]) -> dict[str, Any]:
    return {"perplexity": perplexities(pruned(arguments, start) / "model", texts, device_of(arguments))}


def measure(
    arguments: argparse.Namespace, variant: str, start: Path, out: Path, texts: dict[str, Tensor]
) -> dict[str, Any]:
    """Finetune, verify, evaluate, delete."""
    settings = FinetuneRecipe(
        text=text_source(arguments.calibration),
        seq_len=arguments.seq_len,
        minutes=arguments.minutes,
        steps=arguments.steps,
        lr=arguments.lr,
        batch_size=arguments.batch_size,
        **VARIANTS[variant],
    )
    results = finetune_run(
        pruned(arguments, start), settings, out, Machine(arguments.device, threads=arguments.threads)
    )
    found, proof = results.finetune, verify_run(out)
    assert found is not None and proof.report is not None
    curve = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    values = {
        "perplexity": perplexities(out / "model", texts, device_of(arguments)),
        "masks_intact": proof.ok,
        "n_masked": proof.report.n_masked,
        "n_tokens": found.n_tokens,
        "epochs": found.epochs,
        "steps": found.steps,
        "best_step": found.best_step,
        "seconds": found.seconds,
        "compute": found.compute,
        "held_out_before": found.held_out_before,
        "held_out_after": found.held_out_after,
        "peak_memory": results.peak_memory,
        "curve": [one for one in curve if "held_out_loss" in one],
    }
    shutil.rmtree(out)
    return values


def show(ledger: Ledger) -> None:
    names = list(dict.fromkeys(name for row in ledger.rows for name in row["values"]["perplexity"]))
    labels = {name: one["label"] for row in ledger.rows for name, one in row["values"]["perplexity"].items()}
    dense = {of_model(row): row["values"]["perplexity"] for row in ledger.rows if row["key"]["what"] == "dense"}
    columns = ["what", "start", "device", *(f"token perplexity, {labels[name]}" for name in names)]
    columns += [f"x dense, {name}" for name in names] + [
        "masks intact",
        "tokens",
        "steps",
        "best",
        "time (s)",
        "peak (MiB)",
    ]
    rows = [cells(row, names, dense[of_model(row)]) for row in ledger.rows]
    curves = [
        [trained(row["key"]), str(one["step"]), f"{per_step(row) * one['step']:,}", f"{one['held_out_loss']:.4f}"]
        for row in ledger.rows
        for one in row["values"].get("curve", [])
    ]
    sizes = {(row["key"]["windows"], row["key"]["seq_len"]) for row in ledger.rows}
    notes = [
        f"Perplexity: first {n} windows of {length} tokens of each text, +- standard error." for n, length in sizes
    ]
    notes += [f"{line}." for line in targets(ledger, names, dense)]
    notes.append(
        "Trained on the calibration part of the text, judged by held-out windows of that part; best: the step whose weights were "
        "written. Masks intact: `nmprune verify` found nothing. kl: distilled from the dense model; lm: next tokens; learning "
        "rates are shares of a tensor's root mean square."
    )
    tables = [
        Table("Before and after", columns, rows),
        Table("Held-out loss", ["what", "step", "tokens", "loss"], curves),
    ]
    ledger.show("Finetuning with masks held", tables, notes)


def per_step(row: dict[str, Any]) -> int:
    """Tokens."""
    return row["key"]["batch_size"] * row["key"]["seq_len"]


def trained(key: dict[str, Any]) -> str:
    """How, and on which text."""
    return f"{key['what']} on {Path(key['text']).name}"


def of_model(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row["key"][name] for name in ("model", "windows", "seq_len", "texts"))


def targets(ledger: Ledger, names: list[str], dense: dict[tuple[Any, ...], Any]) -> list[str]:
    """Whether each row that distils stays below the target on every text."""
    lines = []
    for row in ledger.rows:
        if not row["key"]["what"].startswith("kl"):
            continue
        scores, anchor = row["values"]["perplexity"], dense[of_model(row)]
        worst = max(scores[name]["value"] / anchor[name]["value"] for name in names if name in scores)
        met = verdict(worst < TARGET and row["values"]["masks_intact"])
        lines.append(
            f"{trained(row['key'])}, {row['key']['minutes']:g} minutes, below {TARGET:g} x dense: {worst:.2f} x, {met}"
        )
    return lines


def cells(row: dict[str, Any], names: list[str], dense: dict[str, Any]) -> list[str]:
    key, values = row["key"], row["values"]
    scores = [values["perplexity"].get(name) for name in names]
    shown = [f"{one['value']:,.1f} +- {one['error']:,.1f}" if one else "" for one in scores]
    ratios = [
        f"{one['value'] / dense[name]['value']:.2f}" if one else "" for name, one in zip(names, scores, strict=True)
    ]
    start = key.get("start") or (f"{key['method']}, {key['n_sequences']} sequences" if "method" in key else "")
    what = f"{trained(key)}, lr {key['lr']:g}, {values['compute']}" if "lr" in key else key["what"]
    rest = [""] * 6
    if "steps" in values:
        rest = ["yes" if values["masks_intact"] else "NO", f"{values['n_tokens']:,}", str(values["steps"])]
        rest += [str(values["best_step"]), f"{values['seconds']:,.0f}"]
        rest.append("" if values["peak_memory"] is None else mebibytes(values["peak_memory"]))
    return [what, start, key.get("device", "cpu"), *shown, *ratios, *rest]


if __name__ == "__main__":
    main()
