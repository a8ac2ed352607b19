"""Our side of the measured child processes: prune a model, plan a run, or solve one matrix again and again."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path

import torch
import transformers
from measurement import Peak, answer, since_started, versions
from safetensors.torch import load_file, save_file

from nmprune.checkpoint import locate_config
from nmprune.methods.sparsegpt import SparseGPT
from nmprune.pattern import Pattern
from nmprune.report.quantities import mean
from nmprune.run import Machine, Recipe, prune_run
from nmprune.run.plan import plan
from nmprune.stats import InputStats

MIXED = {"patterns": ["1:4", "2:4", "3:4", "dense"]}  # under the budget of --pattern
STEPS: dict[str, object] = {"permute": "all", "allocate": MIXED, "allocate_owl": {**MIXED, "rule": "owl"}}


def main() -> None:
    made = argparse.ArgumentParser(description=__doc__)
    made.add_argument("what", choices=("prune", "plan", "solver"))
    made.add_argument("--model", help="HF folder")
    made.add_argument("--method", default="wanda", help="with settings and steps: descent:shrinkage=1+reconstruct")
    made.add_argument("--pattern", default="2:4")
    made.add_argument("--tokens", type=Path, help="calibration.safetensors")
    made.add_argument("--recipe", type=Path, help="a recipe, which then says all of this but --model")
    made.add_argument("--n-sequences", type=int, default=32)
    made.add_argument("--seq-len", type=int, default=512)
    made.add_argument("--out", type=Path, help="run folder, or the file of solver results")
    made.add_argument("--matrices", type=Path, help="weight and gram for the solver")
    made.add_argument("--report", type=Path, help="where the numbers go")
    made.add_argument("--threads", type=int, default=0)
    made.add_argument("--device", default="cpu")
    made.add_argument("--dtype", default="auto")
    arguments = made.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if arguments.what == "solver":
        answer_solver(arguments)
    else:
        found = run_prune(arguments) if arguments.what == "prune" else run_plan(arguments)
        arguments.report.write_text(json.dumps({**found, "versions": versions()}))


def recipe_of(arguments: argparse.Namespace) -> Recipe:
    if arguments.recipe:
        return Recipe.from_yaml(arguments.recipe)
    calibration = {
        "source": str(arguments.tokens or "builtin"),
        "n_sequences": arguments.n_sequences,
        "seq_len": arguments.seq_len,
    }
    spec, *parts = arguments.method.split("+")  # descent+reconstruct, hyperprune:network=false, sparsegpt+allocate
    name, _, settings = spec.partition(":")
    given = dict(one.split("=", 1) for one in settings.split(",")) if settings else {}
    steps = {part.removesuffix("_owl"): STEPS.get(part, "true") for part in parts}
    return Recipe.from_dict(
        {
            "model": arguments.model,
            "method": {"name": name, **given},
            "pattern": arguments.pattern,
            "calibration": calibration,
            "dtype": arguments.dtype,
            **steps,
        }
    )


def import_model_code(folder: Path) -> None:
    """transformers loads a family's code at first use: that is an import, too."""
    for name in json.loads((folder / "config.json").read_text()).get("architectures") or ():
        getattr(transformers, name)


def run_prune(arguments: argparse.Namespace) -> dict[str, object]:
    import_model_code(locate_config(arguments.model))
    import_seconds = since_started()
    peak = Peak()
    start = time.perf_counter()
    results = prune_run(recipe_of(arguments), arguments.out, Machine(arguments.device, threads=arguments.threads))
    return {
        "import_seconds": import_seconds,
        "run_seconds": time.perf_counter() - start,
        "phases": results.seconds,
        "peak_memory": peak.bytes(),
        "peak_memory_in_results": results.peak_memory,
        "device_peak_memory": results.device_peak_memory,
        "weights_in_linears": results.weights_in_linears,
        "weights_kept": results.weights_kept,
        "global_sparsity": results.global_sparsity,
        "updates_weights": results.updates_weights,
        "output_error": mean(one.output_error for one in results.linears),
        "layers_accepted": [one.accepted for one in results.learned_layers],
        "guarded": mean(one.notes.get("reconstruct_taken") for one in results.linears),
    }


def run_plan(arguments: argparse.Namespace) -> dict[str, object]:
    start = time.perf_counter()
    made = plan(recipe_of(arguments), Machine(arguments.device, threads=arguments.threads), out=arguments.out)
    return {
        "plan_seconds": time.perf_counter() - start,
        "phases": made.seconds,
        "peak_memory": made.peak_memory,
        "memory": made.memory,
        "linears": [dataclasses.asdict(one) for one in made.linears],
    }


def answer_solver(arguments: argparse.Namespace) -> None:
    """Solve once per line of input; "save" writes the last result."""
    matrices = load_file(arguments.matrices)
    weight, gram = matrices["weight"], matrices["gram"]
    pattern = Pattern.parse(arguments.pattern)
    pruned = None
    for line in sys.stdin:
        if line.strip() == "save":
            assert pruned is not None and pruned.weight is not None
            save_file({"weight": pruned.weight.contiguous()}, arguments.out)
            answer(versions())
            continue
        stats = InputStats(len(gram), None, gram.clone())  # fresh: a factor is kept with its statistics
        start = time.perf_counter()
        pruned = SparseGPT().prune(weight, stats, pattern)
        answer({"seconds": time.perf_counter() - start})


if __name__ == "__main__":
    main()
