"""`nmprune prune`: a run, from the command line."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from nmprune.cli import options
from nmprune.cli import recipe_flags as flags
from nmprune.cli.console import Output
from nmprune.cli.machine_flags import machine
from nmprune.cli.progress import ProgressView
from nmprune.cli.quiet_libraries import quiet_libraries

Out = Annotated[
    Path | None,
    typer.Option(help="The run folder.", metavar="DIR", show_default="runs/<model>_<method>_<pattern>"),
]


def prune(
    model: flags.ModelOrRecipe,
    given: flags.RecipeFlags,
    out: Out = None,
    device: options.Device = options.DEVICE,
    hidden_budget: options.HiddenBudget = options.HIDDEN_BUDGET,
    threads: options.Threads = options.THREADS,
    scratch: options.Scratch = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> int:
    """Prune a language model to N:M, one decoder layer in memory at a time.

    The run folder then holds model/ (loads in transformers as it is), masks.safetensors, results.json and recipe.yaml.
    Killed or interrupted, the same command goes on after the last finished layer; on a finished run it changes nothing.

    Examples:

      # a small real model, Wanda, 2 of every 4 weights kept
      nmprune prune smollm2-135m --method wanda --pattern 2:4 --out runs/first

      # SparseGPT moves the kept weights to make up for the others; real text
      nmprune prune models/llama --method sparsegpt --calibration c4 --n-sequences 128

      # one of its hyper-parameters (see `nmprune list methods`)
      nmprune prune models/llama --method sparsegpt --set method.damping=0.05

      # all but the down projections
      nmprune prune models/llama --exclude '*.down_proj'

      # a recipe, with one thing changed
      nmprune prune recipes/smollm2_wanda_2x4.yaml --seed 1 --out runs/seed1

    Exit codes: 0 done, 2 something you can put right, 130 Ctrl-C, 1 a bug of ours.
    """
    output = Output(json, quiet)
    recipe = flags.read_recipe(model, given)
    how = machine(device, hidden_budget, threads, scratch)
    place = out or flags.default_out(recipe)
    if out is None:
        output.note(f"no --out given: the run folder is {place}")

    from nmprune.report import pruning_tables
    from nmprune.run import RunFolder, prune_run

    if not debug:
        quiet_libraries()
    folder = RunFolder(place)
    was_finished = folder.finished
    with ProgressView(output) as view:
        results = prune_run(recipe, place, how, report=view.show)
    output.result(
        {"run": place, "model": folder.model, "already_finished": was_finished, "results": results},
        pruning_tables(results),
    )
    run = shlex.quote(str(place))
    output.hints(
        {
            f"nmprune verify {run}": "prove it against the dense model",
            f"nmprune evaluate {run}": "token perplexity, dense beside pruned",
        }
    )
    return 0
