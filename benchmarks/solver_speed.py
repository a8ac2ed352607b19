"""The solvers alone: seconds of one linear, seconds per 10^9 weight-columns, and the operations that take them."""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from measurement import Ledger, Table, median_and_spread, parser
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from nmprune.methods import Pruned, create
from nmprune.pattern import Pattern
from nmprune.refine import Reconstruct
from nmprune.stats import InputStats, Statistic, StatsAccumulator

SOLVERS = ("sparsegpt", "alps", "descent", "reconstruct")
SHAPES = ("192x576", "576x576", "1536x576", "576x1536", "2048x2048")  # SmolLM2-135M's, and a larger one
NEEDS: frozenset[Statistic] = frozenset({"input_gram", "held_out_gram", "cross_gram"})
TOKENS_PER_INPUT, HELD_OUT = 4, 16  # one token in 16 is held out
# What the profiler's operations are, by the first word of their names; whatever is not named here goes element by element.
KINDS = {
    "products": ("mm", "addmm", "bmm", "mv", "addmv", "dot", "linalg_vecdot"),
    "factorising": ("linalg_cholesky_ex", "_linalg_eigh", "linalg_solve_triangular"),
    "choosing": (
        "topk",
        "sort",
        "min",
        "max",
        "amin",
        "amax",
        "aminmax",
        "gather",
        "scatter",
        "index_select",
        "argmin",
    ),
}
REST, BETWEEN = "element by element", "between operations"
VIEWS = (
    "slice",
    "select",
    "as_strided",
    "split",
    "unbind",
    "t",
    "transpose",
    "view",
    "reshape",
    "unflatten",
    "diagonal",
)

Solve = Callable[[InputStats], Pruned]


def main() -> None:
    arguments = read_arguments()
    ledger = Ledger("solver_speed", arguments)
    torch.set_num_threads(arguments.threads)
    for shape in arguments.shapes:
        for solver in arguments.solvers:
            key = {"solver": solver, "shape": shape, "pattern": arguments.pattern, "repeats": arguments.repeats}
            ledger.row(key, partial(measure, key))
    show(ledger)


def read_arguments() -> argparse.Namespace:
    made = parser(__doc__ or "")
    made.set_defaults(threads=1)
    made.add_argument("--solvers", nargs="+", choices=SOLVERS, default=SOLVERS, help="methods and steps")
    made.add_argument("--shapes", nargs="+", default=SHAPES, help="OUTxIN")
    made.add_argument("--pattern", default="2:4", help="N kept of M")
    made.add_argument("--repeats", type=int, default=5, help="timed solves, after one that warms up")
    return made.parse_args()


def measure(key: dict[str, Any]) -> dict[str, Any]:
    """Time a solver on one matrix: with statistics that it meets first, and met before, as k and v do after q."""
    out_features, in_features = map(int, key["shape"].split("x"))
    weight, stats = random_linear(out_features, in_features)
    solve = solver(key["solver"], weight, stats, Pattern.parse(key["pattern"]))
    pruned = solve(fresh(stats))  # thread pools and code paths warm
    first, again = [], []
    for _ in range(key["repeats"]):
        met = fresh(stats)
        first.append(seconds_of(solve, met))
        again.append(seconds_of(solve, met))
    return {
        "seconds": first,
        "seconds_again": again,
        "shares": shares(solve, fresh(stats)),
        "notes": pruned.notes,
        "torch_threads": torch.get_num_threads(),
    }


def random_linear(out_features: int, in_features: int) -> tuple[Tensor, InputStats]:
    """A weight, and statistics of correlated inputs, with other inputs in the dense model and some tokens held out."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(in_features, in_features, generator=generator) * in_features**-0.5 + torch.eye(in_features)
    accumulator = StatsAccumulator(in_features, NEEDS)
    n_tokens = TOKENS_PER_INPUT * in_features
    for n, held_out in ((n_tokens - n_tokens // HELD_OUT, False), (n_tokens // HELD_OUT, True)):
        dense_TI = torch.randn(n, in_features, generator=generator) @ mixing
        inputs_TI = dense_TI + 0.3 * torch.randn(n, in_features, generator=generator)
        accumulator.add(inputs_TI, dense_TI, held_out)
    return torch.randn(out_features, in_features, generator=generator), accumulator.result()


def fresh(stats: InputStats) -> InputStats:
    """The same statistics, nothing derived from them yet."""
    return dataclasses.replace(stats)


def solver(name: str, weight: Tensor, stats: InputStats, pattern: Pattern) -> Solve:
    """What is timed, with its defaults; reconstruct gets Wanda's mask, which is made before."""
    if name == "reconstruct":
        masked = create("wanda").prune(weight, stats, pattern)
        return lambda met: Reconstruct().refine(weight, masked, met, pattern)
    method = create(name)
    return lambda met: method.prune(weight, met, pattern)


def seconds_of(solve: Solve, stats: InputStats) -> float:
    start = time.perf_counter()
    solve(stats)
    return time.perf_counter() - start


def shares(solve: Solve, stats: InputStats) -> dict[str, float]:
    """Kind of operation -> share of the wall clock of one solve under torch's profiler, which adds to small operations."""
    with profile(activities=[ProfilerActivity.CPU]):
        torch.ones(1)  # the profiler's own first use
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        total = seconds_of(solve, stats)
    found: defaultdict[str, float] = defaultdict(float)
    for operation in profiler.key_averages():
        if operation.key.startswith("aten::") and operation.key.removeprefix("aten::") not in VIEWS:
            found[kind_of(operation.key)] += operation.self_cpu_time_total / 1e6 / total
    found[BETWEEN] = max(0.0, 1 - sum(found.values()))
    return dict(found)


def kind_of(operation: str) -> str:
    """The heading of an operation such as "aten::addmm_"."""
    name = operation.removeprefix("aten::").rstrip("_")
    return next((kind for kind, names in KINDS.items() if name in names), REST)


def show(ledger: Ledger) -> None:
    rows, share_rows = [], []
    for row in ledger.rows:
        key, values = row["key"], row["values"]
        out_features, in_features = map(int, key["shape"].split("x"))
        work = out_features * in_features**2 / 1e9
        name = [f"{key['solver']} {key['pattern']}", key["shape"], str(key["threads"])]
        times = [median_and_spread([1000 * one for one in values[part]]) for part in ("seconds", "seconds_again")]
        rate = [f"{statistics.median(values[part]) / work:.3f}" for part in ("seconds", "seconds_again")]
        rows.append([*name, *times, *rate, rounds(values["notes"])])
        kinds = (*KINDS, REST, BETWEEN)
        share_rows.append([*name, *(f"{values['shares'].get(kind, 0.0):.0%}" for kind in kinds)])
    heads = ["solver", "out x in", "threads", "solve (ms)", "input seen before (ms)"]
    tables = [
        Table("Solver speed", [*heads, "s per 10^9 weight-columns", "input seen before", "rounds"], rows),
        Table("Where the time goes", [*heads[:3], *KINDS, REST, BETWEEN], share_rows),
    ]
    notes = [
        "One linear from weight and statistics to its result, at the solver's defaults. Random weights and correlated random "
        f"inputs, {TOKENS_PER_INPUT} tokens per input. Median (smallest to largest). Reconstruct works on Wanda's mask.",
        "weight-columns: out x in x in, the weights times the columns that each of them depends on.",
        "input seen before: what depends on the input alone (a factorisation, a split) is there already, as for k and v after q.",
        "rounds: sweeps of descent, iterations of the others that their stopping rules took.",
        "Where the time goes: shares of one solve's wall clock under torch's profiler. products: matrix products. choosing: "
        "sorting, comparing, picking. Element by element: with copies. Between operations: Python, views, the profiler itself.",
    ]
    ledger.show("Solver speed", tables, notes)


def rounds(notes: dict[str, float | int | str]) -> str:
    """What a solver says of how often it went round."""
    names = {"sweeps": "sweeps", "iterations": "ADMM", "cg_iterations": "CG", "reconstruct_iterations": "CG"}
    return ", ".join(f"{notes[key]} {word}" for key, word in names.items() if key in notes) or "1 pass"


if __name__ == "__main__":
    main()
