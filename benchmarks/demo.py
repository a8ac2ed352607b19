"""`make demo`: prune a real model by three methods with the commands that a user would type, and show what came of it."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from nmprune.checkpoint import DEMO_MODEL, locate
from nmprune.report import Table
from nmprune.report.quantities import duration, size
from nmprune.results import Results

ROOT = Path(__file__).resolve().parents[1]
MODEL_IN_WORDS = {DEMO_MODEL: "SmolLM2-135M-Instruct (Q4_1, dequantised)"}
METHODS = ("magnitude", "wanda", "sparsegpt")
PROMPT = "The best way to learn a new language is"
NEW_TOKENS = 30

console = Console(highlight=False)


@dataclass(frozen=True)
class Settings:
    """What the demo does; the defaults are what `make demo` runs."""

    model: str = DEMO_MODEL
    out: str = "runs/demo"
    n_sequences: int = 16
    seq_len: int = 512
    max_windows: int = 16


@dataclass(frozen=True)
class Texts:
    """Text sources as the commands take them."""

    calibration: str
    evaluation: str


def main() -> None:
    settings = read_settings()
    os.chdir(ROOT)
    texts = find_texts()
    start = time.monotonic()
    console.print(
        f"Pruning {settings.model} to 2:4 by {', '.join(METHODS)}: 2 of every 4 weights stay. Stop it when you like: the "
        "same command goes on where it was."
    )
    for method in METHODS:
        nmprune(
            *("prune", settings.model, "--method", method, "--pattern", "2:4", "--out", f"{settings.out}/{method}"),
            *("--calibration", texts.calibration, "--n-sequences", settings.n_sequences),
            *("--seq-len", settings.seq_len, "--seed", 0),
        )
    nmprune("verify", f"{settings.out}/sparsegpt")
    show_table(settings, {method: evaluate(f"{settings.out}/{method}", texts, settings) for method in METHODS})
    show_continuations(settings)
    show_next_steps(settings, time.monotonic() - start)


def read_settings() -> Settings:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in vars(Settings()).items():
        parser.add_argument("--" + name.replace("_", "-"), type=type(default), default=default)
    return Settings(**vars(parser.parse_args()))


def find_texts() -> Texts:
    """Real text where it lies on this machine, else Python's own help texts; nothing is downloaded for the demo."""
    beside = ROOT.parent / "shared" / "data"
    if "NMPRUNE_DATA" not in os.environ and beside.is_dir():
        os.environ["NMPRUNE_DATA"] = str(beside)
    data = Path(os.environ.get("NMPRUNE_DATA", "/nonexistent"))
    has_c4 = (data / "calibration" / "c4_sample.jsonl").is_file()
    has_wikitext2 = (data / "wikitext2" / "wiki.test.raw").is_file()
    texts = Texts("c4" if has_c4 else "builtin", "wikitext2" if has_wikitext2 else "builtin")
    if "builtin" in (texts.calibration, texts.evaluation):
        console.print(
            "C4 or WikiText-2 is not in $NMPRUNE_DATA, so Python's own help texts stand in: one part calibrates, a "
            "held-out part is measured. docs/calibration.md says how to give real text."
        )
    return texts


def nmprune(*arguments: object, capture: bool = False) -> str:
    """Run a command of the CLI as a user would; its own messages tell what went wrong, if anything does."""
    words = [str(argument) for argument in arguments]
    console.print(f"\n[bold]$ nmprune {escape(shlex.join(words))}[/bold]", soft_wrap=True)
    sys.stdout.flush()
    program = Path(sys.executable).with_name("nmprune")
    done = subprocess.run([str(program), *words], stdout=subprocess.PIPE if capture else None, text=True, check=False)
    if done.returncode:
        sys.exit(done.returncode)
    return done.stdout or ""


def evaluate(run: str, texts: Texts, settings: Settings) -> dict[str, Any]:
    """The JSON document of `nmprune evaluate`: the dense and the pruned model on the same windows."""
    size_flags = ("--seq-len", settings.seq_len, "--max-windows", settings.max_windows)
    return json.loads(nmprune("evaluate", run, "--text", texts.evaluation, *size_flags, "--json", capture=True))


def show_table(settings: Settings, measured: dict[str, dict[str, Any]]) -> None:
    """Dense and pruned models, one row each."""
    rows: list[tuple[str, ...]] = []
    for method, found in measured.items():
        results = Results.read(Path(settings.out) / method / "results.json")
        dense, pruned = (model["perplexity"] for model in found["models"])
        if not rows:
            rows.append(("dense", "", *perplexity_cells(dense), "0.0%", "", ""))
        rows.append(
            (
                method,
                "updated" if results.updates_weights else "frozen",
                *perplexity_cells(pruned),
                f"{results.global_sparsity:.1%}",
                duration(sum(results.seconds.values())),
                "" if results.peak_memory is None else size(results.peak_memory),
            )
        )
    name = MODEL_IN_WORDS.get(settings.model, settings.model)
    columns = ("", "weights", "perplexity>", "error>", "sparsity>", "time>", "memory>")
    text = f"{found['text']} ({found['split']}), {found['n_windows']} windows of {found['seq_len']} tokens"
    console.print()
    console.print(Table(f"{name}, 2:4: token perplexity on {text}", columns, tuple(rows)).rich())
    if results.calibration:
        c = results.calibration
        console.print(f"Calibrated on {c['source']} ({c['split']}), {c['n_sequences']} x {c['seq_len']} tokens.")
    console.print(
        "Perplexity: lower is better; its standard error. Sparsity: removed, of all parameters. Time and memory: of pruning; "
        "peak memory of the process less what it had used before."
    )


def perplexity_cells(perplexity: dict[str, Any]) -> tuple[str, str]:
    error = perplexity["value_error"]
    return f"{perplexity['value']:.1f}", "" if error is None else f"± {error:.1f}"


def show_continuations(settings: Settings) -> None:
    """One prompt continued greedily by the dense and by the SparseGPT model, both loaded as plain transformers does it."""
    transformers_logging.disable_progress_bar()
    folders = {"dense": locate(settings.model), "sparsegpt 2:4": Path(settings.out) / "sparsegpt" / "model"}
    console.print(f"\nThe same prompt, continued greedily by {NEW_TOKENS} tokens: [bold]{PROMPT}[/bold] ...")
    for name, folder in folders.items():
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder)
        inputs = tokenizer(PROMPT, return_tensors="pt", return_token_type_ids=False)
        with torch.inference_mode():
            ids = model.generate(**inputs, do_sample=False, max_new_tokens=NEW_TOKENS)
        text = tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        console.print(f"[bold]{name:14}[/bold] ... {escape(' '.join(text.split()))}")


def show_next_steps(settings: Settings, seconds: float) -> None:
    """Where to look next."""
    run = f"{settings.out}/sparsegpt"
    console.print(
        f"\nDone in {duration(seconds)}. A file of zeros is not faster or smaller by itself: the table shows what pruning costs."
    )
    console.print(
        f"""
Where to look next
  {run}/model/    a Hugging Face folder; plain transformers loads it
  {run}/          README.md: its model card; results.json: every number
  .venv/bin/nmprune --help     every command; nmprune list: methods, texts, models
  .venv/bin/nmprune prune YOUR_MODEL --method sparsegpt --out runs/mine
  examples/                    the same from Python
  docs/README.md               methods, formats, text sources""",
        soft_wrap=True,
    )


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\nStopped. What is finished is kept: make demo goes on from there.")
