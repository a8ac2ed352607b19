"""The layer loop against the plain decoder-layer passes that it cannot avoid, alternating layer by layer in one process."""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measurement import Ledger, Table, add_text_flags, median_and_spread, parser, token_windows, verdict
from torch import Tensor, nn

from nmprune.checkpoint import locate
from nmprune.methods import create
from nmprune.pattern import Pattern
from nmprune.stream import (
    DecoderModel,
    LayerDone,
    LayerStep,
    StreamOptions,
    default_batch_size,
    prune_layers,
    select,
)
from nmprune.stream.calls import LayerCalls

TARGET = 1.15
PHASES = ("forward", "statistics", "solve", "measure", "read")
HIDDEN_BUDGET = 8 << 30


def main() -> None:
    arguments = read_arguments()
    ledger = Ledger("layer_loop", arguments)
    torch.set_num_threads(arguments.threads)
    folder = locate(arguments.model)
    batch_size = arguments.batch_size or default_batch_size(arguments.seq_len)
    for repetition in range(arguments.repeats):
        for method in arguments.methods:
            key = {
                "model": arguments.model,
                "method": method,
                "pattern": arguments.pattern,
                "n_sequences": arguments.n_sequences,
                "seq_len": arguments.seq_len,
                "batch_size": min(batch_size, arguments.n_sequences),
                "layers": arguments.layers or "all",
                "repetition": repetition,
            }
            ledger.row(key, partial(measure, folder, method, arguments))
    show(ledger)


def read_arguments() -> argparse.Namespace:
    made = parser(__doc__ or "")
    add_text_flags(made)
    made.add_argument("--methods", nargs="+", default=["wanda", "sparsegpt"], help="methods")
    made.add_argument("--pattern", default="2:4", help="N kept of M")
    made.add_argument("--batch-size", type=int, default=0, help="sequences per forward; 0 = the walker's own choice")
    made.add_argument("--layers", type=int, default=0, help="only the first so many decoder layers; 0 = all")
    made.add_argument("--repeats", type=int, default=1, help="repetitions of everything")
    return made.parse_args()


def measure(folder: Path, method: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Plain passes of layer l, then the walker's layer l, and so on; seconds of both by layer."""
    windows, origin = token_windows(
        folder, arguments.calibration, arguments.n_sequences, arguments.seq_len, arguments.seed
    )
    size = arguments.batch_size or default_batch_size(arguments.seq_len)
    pattern = Pattern.parse(arguments.pattern)
    walked, plain = DecoderModel.open(folder), DecoderModel.open(folder)
    options = StreamOptions(batch_size=size, hidden_budget=HIDDEN_BUDGET)
    steps = prune_layers(walked, windows, create(method), pattern, select(walked, pattern), options)
    hidden, calls = plain.embed(windows, size, HIDDEN_BUDGET)
    inputs, batches = hidden.all, hidden.batches(size)
    n_layers = min(arguments.layers or plain.n_layers, plain.n_layers)
    with plain.layer(0) as layer:
        run_plain(0, layer, calls, inputs, batches[:1])  # thread pools and code paths warm
    layers = []
    phases: defaultdict[str, float] = defaultdict(float)
    for index in range(n_layers):
        passes = 1 if index + 1 == plain.n_layers else 2
        with plain.layer(index) as layer:
            start = time.perf_counter()
            for _ in range(passes):
                run_plain(index, layer, calls, inputs, batches)
            plain_seconds = time.perf_counter() - start
        done, loop_seconds = walk_layer(steps)
        inputs = inputs if done.hidden is None else done.hidden
        layers.append({"passes": passes, "plain_seconds": plain_seconds, "loop_seconds": loop_seconds})
        for phase, seconds in done.seconds.items():
            phases[phase] += seconds
    steps.close()
    return {
        "layers": layers,
        "passes": sum(one["passes"] for one in layers),
        "plain_seconds": sum(one["plain_seconds"] for one in layers),
        "loop_seconds": sum(one["loop_seconds"] for one in layers),
        "phases": dict(phases),
        "calibration": origin,
        "torch_threads": torch.get_num_threads(),
    }


@torch.no_grad()
def run_plain(index: int, layer: nn.Module, calls: dict[int, LayerCalls], inputs: Tensor, batches: list[slice]) -> None:
    """One pass of the model's own decoder layer over all batches, with the arguments that the model gives it."""
    for batch in batches:
        calls[batch.stop - batch.start].run(index, layer, inputs[batch])


def walk_layer(steps: Iterator[LayerStep | LayerDone]) -> tuple[LayerDone, float]:
    """Let the walker go on to the end of its next layer; its wall clock."""
    start = time.perf_counter()
    for step in steps:
        if isinstance(step, LayerDone):
            return step, time.perf_counter() - start
    raise RuntimeError("the walker has no more layers")


def show(ledger: Ledger) -> None:
    groups: defaultdict[tuple[Any, ...], list[dict[str, Any]]] = defaultdict(list)
    for row in ledger.rows:
        groups[tuple(value for name, value in row["key"].items() if name != "repetition")].append(row)
    rows, phase_rows = [], []
    for group in groups.values():
        key, values = group[0]["key"], [row["values"] for row in group]
        tokens = f"{key['n_sequences']} x {key['seq_len']}, batch {key['batch_size']}"
        name = f"{key['model']}, {key['method']} {key['pattern']}"
        ratios = [one["loop_seconds"] / one["plain_seconds"] for one in values]
        by_layer = [layer["loop_seconds"] / layer["plain_seconds"] for one in values for layer in one["layers"]]
        cells = [name, tokens, str(key["threads"]), f"{values[0]['passes']} ({len(values[0]['layers'])} layers)"]
        cells += [median_and_spread([one["plain_seconds"] for one in values])]
        cells += [median_and_spread([one["loop_seconds"] for one in values])]
        cells += [median_and_spread(ratios, 3), median_and_spread(by_layer, 2)]
        rows.append([*cells, verdict(statistics.median(ratios) <= TARGET) if key["method"] == "wanda" else "none set"])
        parts = [median_and_spread([one["phases"].get(phase, 0.0) for one in values]) for phase in PHASES]
        rest = median_and_spread([one["loop_seconds"] - sum(one["phases"].values()) for one in values])
        share = median_and_spread([one["phases"].get("forward", 0.0) / one["plain_seconds"] for one in values], 3)
        phase_rows.append([name, tokens, str(key["threads"]), *parts, rest, share])
    columns = ["run", "tokens", "threads", "plain passes", "plain (s)", "layer loop (s)", "ratio", "ratio by layer"]
    heads = ["run", "tokens", "threads", *(f"{phase} (s)" for phase in PHASES), "the rest (s)", "forward / plain"]
    tables = [
        Table("The layer loop beside plain passes", [*columns, f"target <= {TARGET}"], rows),
        Table("Seconds of the layer loop by phase", heads, phase_rows),
    ]
    notes = [
        "Plain pass: the model's own decoder layer called batch by batch with the arguments that the model gives it, weights "
        "in memory, no hooks, on the same hidden states. 2L - 1 of them are unavoidable: every layer twice, the last once. "
        "Median (smallest to largest).",
        "Layer loop: wall clock of the walker from the token ids on, so with embedding, reading weights, statistics and "
        "solver; without writing. Plain passes of layer l and the walker's layer l take turns, so that drift cancels.",
        "Statistics: squared norms for wanda, Gram matrices for sparsegpt. Solve: the method itself. Measure: output error.",
    ]
    ledger.show("Layer loop", tables, notes)


if __name__ == "__main__":
    main()
