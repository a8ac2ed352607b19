"""nmprune beside llmcompressor on the same token ids, each in its own process and virtual environment, taking turns.

With --solver: only the two SparseGPT solvers, on the same matrices.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections import defaultdict
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measurement import (
    ROOT,
    Ledger,
    Table,
    Worker,
    add_text_flags,
    find_data,
    median_and_spread,
    parser,
    run_child,
    save_windows,
    token_windows,
)
from safetensors.torch import load_file, save_file
from torch import Tensor

from nmprune.checkpoint import Checkpoint, locate
from nmprune.pattern import Pattern
from nmprune.results import Results
from nmprune.run.evaluate import Measure, evaluate
from nmprune.run.folder import RunFolder
from nmprune.run.machine import Machine
from nmprune.stream import default_batch_size

PATTERN = Pattern.parse("2:4")
OURS, PEER = "nmprune", "llmcompressor"
SCRIPTS = {OURS: "nmprune_run.py", PEER: "peer_llmcompressor_run.py"}
SHAPES = ["576x576", "1536x576", "576x1536", "2048x2048"]


def main() -> None:
    arguments = read_arguments()
    if not arguments.peers_python.is_file():
        sys.exit(f"{arguments.peers_python} is missing: `make peers` makes the peers' virtual environment.")
    if arguments.solver:
        compare_solvers(arguments)
    else:
        compare_runs(arguments)


def read_arguments() -> argparse.Namespace:
    made = parser(__doc__ or "")
    add_text_flags(made)
    made.add_argument(
        "--methods", nargs="+", choices=("wanda", "sparsegpt"), default=["wanda", "sparsegpt"], help="methods"
    )
    made.add_argument("--repeats", type=int, default=1, help="pairs of runs for each method")
    made.add_argument("--peer-batch-size", type=int, default=0, help="sequences per forward of the peer; 0 = as ours")
    made.add_argument("--perplexity", action="store_true", help="measure both results, dense beside them")
    made.add_argument("--text", default="wikitext2", help="text of --perplexity")
    made.add_argument("--max-windows", type=int, default=16, help="windows of --perplexity")
    made.add_argument("--solver", action="store_true", help="compare only the SparseGPT solvers")
    made.add_argument("--shapes", nargs="+", default=SHAPES, help="OUTxIN of --solver")
    made.add_argument("--solver-repeats", type=int, default=7, help="timed solves of each side, shape and thread count")
    made.add_argument("--solver-threads", type=int, nargs="+", default=[1, 2], help="thread counts of --solver")
    peers = ROOT / ".venv-peers" / "bin" / "python"
    made.add_argument("--peers-python", type=Path, default=peers, help="interpreter that has llmcompressor")
    made.add_argument("--folder", type=Path, help="where the runs are written (a temporary folder, deleted afterwards)")
    return made.parse_args()


# -- whole runs ---------------------------------------------------------------------------------------------------------


def compare_runs(arguments: argparse.Namespace) -> None:
    ledger = Ledger("peer_llmcompressor", arguments)
    batch_size = min(default_batch_size(arguments.seq_len), arguments.n_sequences)
    for repetition in range(arguments.repeats):
        for method in arguments.methods:
            key = {
                "model": arguments.model,
                "method": method,
                "n_sequences": arguments.n_sequences,
                "seq_len": arguments.seq_len,
                "calibration": arguments.calibration,
                "seed": arguments.seed,
                "peer_batch_size": arguments.peer_batch_size or batch_size,
                "repetition": repetition,
            }
            if arguments.perplexity:
                key["perplexity"] = f"{arguments.text}, {arguments.max_windows} windows"
            ledger.row(key, partial(measure_pair, key, batch_size, arguments))
    show_runs(ledger)


def measure_pair(key: dict[str, Any], batch_size: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Both sides once, the first of them in turn; then what they made, compared."""
    folder = locate(arguments.model)
    with tempfile.TemporaryDirectory(prefix="nmprune-peer-", dir=arguments.folder) as name:
        place = Path(name)
        windows, origin = token_windows(folder, key["calibration"], key["n_sequences"], key["seq_len"], key["seed"])
        tokens = save_windows(windows, origin, place / "tokens")
        read_once(folder)
        common = ["prune", "--model", folder, "--method", key["method"], "--tokens", tokens]
        words = {
            OURS: ["--out", place / OURS, "--n-sequences", key["n_sequences"], "--seq-len", key["seq_len"]],
            PEER: ["--out", place / PEER, "--batch-size", key["peer_batch_size"]],
        }
        python = {OURS: Path(sys.executable), PEER: arguments.peers_python}
        order = (OURS, PEER) if key["repetition"] % 2 == 0 else (PEER, OURS)
        found = {
            side: run_child(python[side], SCRIPTS[side], [*common, *words[side]], arguments.threads) for side in order
        }
        found[OURS] |= our_phases(found[OURS])
        comparison = compare_models(place / OURS, place / PEER)
        perplexity = measure_perplexity(place, arguments) if arguments.perplexity else None
    return {
        **found,
        "comparison": comparison,
        "perplexity": perplexity,
        "calibration": origin,
        "batch_size": batch_size,
    }


def read_once(folder: Path) -> None:
    """Bring the model's files into the system's cache, so that the first side does not pay for the second."""
    for file in folder.glob("*.safetensors"):
        with file.open("rb") as content:
            while content.read(1 << 24):
                pass


def our_phases(found: dict[str, Any]) -> dict[str, float]:
    """Our phases under the peer's headings: layers are read while pruning, so what is left is counted as pruning."""
    load, save = found["phases"].get("read", 0.0), found["phases"].get("write", 0.0)
    return {"load_seconds": load, "save_seconds": save, "prune_seconds": found["run_seconds"] - load - save}


def compare_models(ours: Path, peer: Path) -> dict[str, Any]:
    """Where both put zeros in the linears that we pruned.

    Zeros are compared and not masks: the peer writes none, and a weight that was zero before is zero whether kept or not.
    """
    results = Results.read(RunFolder(ours).results_file)
    mine, theirs = Checkpoint.open(RunFolder(ours).model), Checkpoint.open(peer)
    n_groups = n_equal = n_weights = n_mine = n_theirs = n_illegal = 0
    for linear in results.linears:
        a, b = mine.read(linear.tensor) != 0, theirs.read(linear.tensor) != 0
        groups_a, groups_b = a.unflatten(-1, (-1, PATTERN.group)), b.unflatten(-1, (-1, PATTERN.group))
        n_equal += int((groups_a == groups_b).all(-1).sum())
        n_illegal += int((groups_b.sum(-1) > PATTERN.kept).sum())
        n_groups += groups_a.shape[:-1].numel()
        n_weights += a.numel()
        n_mine += int(a.sum())
        n_theirs += int(b.sum())
    return {
        "linears": len(results.linears),
        "dense": [f"{one.name}: {one.reason}" for one in results.dense],
        "global_sparsity": results.global_sparsity,
        "groups_equal": n_equal / n_groups,
        "non_zero": {OURS: n_mine / n_weights, PEER: n_theirs / n_weights},
        "peer_groups_over_pattern": n_illegal,
    }


def measure_perplexity(place: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    find_data()
    measure = Measure(text=arguments.text, max_windows=arguments.max_windows)
    machine = Machine(threads=arguments.threads)
    found = evaluate(str(place / OURS), measure, machine)
    (place / PEER / "recipe.yaml").unlink(missing_ok=True)  # the peer's; our run folders have a file of that name
    peer = evaluate(str(place / PEER), measure, machine)
    if peer.windows_checksum != found.windows_checksum:
        sys.exit("the two models were measured on different windows: their tokenizers differ")
    values = {one.what: one.perplexity for one in found.models} | {PEER: peer.models[0].perplexity}
    return {
        "on": f"{found.text} {found.split}, {found.n_windows} windows of {found.seq_len} tokens, token perplexity",
        "dense": values["dense"].value,
        OURS: values["pruned"].value,
        PEER: values[PEER].value,
    }


def show_runs(ledger: Ledger) -> None:
    rows, ratios, quality = [], [], []
    for key, values in grouped(ledger, "repetition"):
        name = f"{key['model']}, {key['method']} 2:4, {key['n_sequences']} x {key['seq_len']}"
        for side in (OURS, PEER):
            batch = values[0]["batch_size"] if side == OURS else key["peer_batch_size"]
            parts = ("import_seconds", "load_seconds", "prune_seconds", "save_seconds", "wall_seconds")
            cells = [median_and_spread([one[side][part] for one in values]) for part in parts]
            memory = median_and_spread([one[side]["peak_memory"] / (1 << 20) for one in values], 0)
            rows.append([name, side, str(batch), str(key["threads"]), *cells, memory])
        cells = []
        for part in ("run_seconds", "wall_seconds", "peak_memory"):
            cells.append(median_and_spread([one[PEER][part] / one[OURS][part] for one in values], 2))
        ratios.append([name, str(len(values)), *cells])
        quality.append(quality_row(name, values[0]))
    heads = [
        "run",
        "side",
        "batch",
        "threads",
        "import (s)",
        "load (s)",
        "prune (s)",
        "save (s)",
        "total (s)",
        "peak (MiB)",
    ]
    quality_heads = [
        "run",
        "linears",
        "global sparsity",
        "groups equal",
        "non-zero ours",
        "non-zero peer",
        "dense",
        OURS,
        PEER,
    ]
    ratio_heads = ["run", "pairs", "seconds after imports", "total", "peak memory"]
    tables = [
        Table("Side by side", heads, rows),
        Table("llmcompressor / nmprune", ratio_heads, ratios, "Above 1: ours is better."),
        Table("What came out", quality_heads, quality),
    ]
    peers = {f"{name} {version}" for row in ledger.rows for name, version in row["values"][PEER]["versions"].items()}
    texts = {row["values"]["calibration"] for row in ledger.rows}
    measured = {row["values"]["perplexity"]["on"] for row in ledger.rows if row["values"]["perplexity"]}
    dense = {one.partition(":")[0] for row in ledger.rows for one in row["values"]["comparison"]["dense"]}
    notes = [
        f"calibration: {'; '.join(sorted(texts))}; the same token ids, in the same order, for both. fp32. Dense in both: "
        f"{', '.join(sorted(dense))}.",
        "load: ours reads a layer when its turn comes; the peer loads the model. save: ours is read back and compared. "
        "import: with the interpreter's start. total: the whole process. Peak: highest RSS less the RSS after the imports, "
        "mapped pages counted.",
        "groups equal: groups of 4 in which both results have their zeros in the same places. Last columns: perplexity "
        f"({'; '.join(sorted(measured)) or 'not measured: --perplexity'}).",
        f"the peer's versions: {', '.join(sorted(peers))}",
    ]
    ledger.show("nmprune beside llmcompressor", tables, notes)


def quality_row(name: str, values: dict[str, Any]) -> list[str]:
    comparison, perplexity = values["comparison"], values["perplexity"]
    cells = [name, str(comparison["linears"]), f"{comparison['global_sparsity']:.1%}"]
    cells += [f"{comparison['groups_equal']:.2%}", *(f"{comparison['non_zero'][side]:.2%}" for side in (OURS, PEER))]
    return cells + [f"{perplexity[one]:,.1f}" if perplexity else "-" for one in ("dense", OURS, PEER)]


def grouped(ledger: Ledger, without: str) -> list[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """(key, values of all rows that differ only in `without`)."""
    groups: defaultdict[tuple[Any, ...], list[dict[str, Any]]] = defaultdict(list)
    for row in ledger.rows:
        groups[tuple((name, value) for name, value in row["key"].items() if name != without)].append(row["values"])
    return [(dict(key), values) for key, values in groups.items()]


# -- solvers ------------------------------------------------------------------------------------------------------------


def compare_solvers(arguments: argparse.Namespace) -> None:
    ledger = Ledger("peer_llmcompressor_solver", arguments)
    for threads in arguments.solver_threads:
        for shape in arguments.shapes:
            key = {"shape": shape, "threads": threads, "repeats": arguments.solver_repeats}
            ledger.row(key, partial(measure_solver, key, arguments))
    show_solvers(ledger)


def measure_solver(key: dict[str, Any], arguments: argparse.Namespace) -> dict[str, Any]:
    """Both solvers on the same matrices, taking turns, one warm-up each."""
    out_features, in_features = map(int, key["shape"].split("x"))
    with tempfile.TemporaryDirectory(prefix="nmprune-solver-") as name, ExitStack() as stack:
        place = Path(name)
        matrices = random_matrices(out_features, in_features)
        save_file(matrices, place / "matrices.safetensors")
        python = {OURS: Path(sys.executable), PEER: arguments.peers_python}
        workers = {}
        for side in (OURS, PEER):
            words = ["solver", "--matrices", place / "matrices.safetensors", "--out", place / side]
            workers[side] = stack.enter_context(closing(Worker(python[side], SCRIPTS[side], words, key["threads"])))
        seconds: dict[str, list[float]] = {OURS: [], PEER: []}
        for repetition in range(arguments.solver_repeats + 1):
            for side, worker in workers.items():
                taken = worker.ask("solve")["seconds"]
                if repetition:
                    seconds[side].append(taken)
        used = {side: worker.ask("save") for side, worker in workers.items()}
        solved = {side: load_file(place / side)["weight"] for side in workers}
    return {
        "seconds": seconds,
        "output_error": {side: output_error(matrices, weight) for side, weight in solved.items()},
        "groups_equal": groups_equal(solved[OURS], solved[PEER]),
        "versions": used,
    }


def random_matrices(out_features: int, in_features: int) -> dict[str, Tensor]:
    """A weight, and the Gram matrix of correlated inputs, two tokens per input."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(in_features, in_features, generator=generator) * in_features**-0.5 + torch.eye(in_features)
    inputs = torch.randn(2 * in_features, in_features, generator=generator) @ mixing
    weight = torch.randn(out_features, in_features, generator=generator)
    return {"weight": weight, "gram": inputs.T @ inputs}


def output_error(matrices: dict[str, Tensor], weight: Tensor) -> float:
    """||X (W' - W)^T||^2 / ||X W^T||^2."""
    gram, dense = matrices["gram"].double(), matrices["weight"].double()
    error = weight.double() - dense
    return (((error @ gram) * error).sum() / ((dense @ gram) * dense).sum()).item()


def groups_equal(a: Tensor, b: Tensor) -> float:
    """Share of groups with zeros in the same places."""
    same = ((a != 0) == (b != 0)).unflatten(-1, (-1, PATTERN.group)).all(-1)
    return same.float().mean().item()


def show_solvers(ledger: Ledger) -> None:
    rows = []
    for row in ledger.rows:
        key, values = row["key"], row["values"]
        ours, peer = values["seconds"][OURS], values["seconds"][PEER]
        cells = [key["shape"], str(key["threads"]), str(len(ours))]
        cells += [median_and_spread([1000 * one for one in side]) for side in (ours, peer)]
        cells += [f"{statistics.median(peer) / statistics.median(ours):.2f}", f"{values['groups_equal']:.2%}"]
        rows.append(cells + [f"{values['output_error'][side]:.5f}" for side in (OURS, PEER)])
    heads = ["out x in", "threads", "solves", f"{OURS} (ms)", f"{PEER} (ms)", "peer / ours", "groups equal"]
    table = Table("SparseGPT solvers, 2:4", [*heads, f"error {OURS}", f"error {PEER}"], rows)
    peers = {f"{name} {version}" for row in ledger.rows for name, version in row["values"]["versions"][PEER].items()}
    notes = [
        "One linear from weight and Gram matrix to pruned weights: factorisation and sweep; damping 0.01, blocks of 128. Median "
        "(smallest to largest) in two processes taking turns. In a model ours factorises once for q, k, v and once for gate, up.",
        "error: ||X (W' - W)^T||^2 / ||X W^T||^2 on the tokens of that Gram matrix.",
        f"the peer's versions: {', '.join(sorted(peers))}",
    ]
    ledger.show("SparseGPT solvers of nmprune and llmcompressor", [table], notes)


if __name__ == "__main__":
    main()
