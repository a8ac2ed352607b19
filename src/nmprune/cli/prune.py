"""`nmprune prune`: a run, from the command line."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from nmprune.cli import options
from nmprune.cli import recipe_flags as flags
from nmprune.cli.announce import announce
from nmprune.cli.console import Output
from nmprune.cli.machine_flags import MachineFlags
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
    *,
    on: MachineFlags,
    checkpoint_minutes: options.CheckpointMinutes = options.CHECKPOINT_MINUTES,
    json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> int:
    """Prune a language model to N:M, one decoder layer in memory at a time.

    The run folder then holds model/ (loads in transformers as it is), masks.safetensors, results.json and recipe.yaml.
    Killed or interrupted, the same command goes on after the last finished layer; on a finished run it changes nothing.

    Examples:

      # a small real model; --effort good, the default, picks the method: what it will do and need is said first
      nmprune prune smollm2-135m --out runs/first

      # a small real model, Wanda, 2 of every 4 weights kept
      nmprune prune smollm2-135m --method wanda --pattern 2:4 --out runs/first

      # SparseGPT moves the kept weights to make up for the others; real text
      nmprune prune models/llama --method sparsegpt --calibration c4 --n-sequences 128

      # one of its hyper-parameters (see `nmprune list methods`)
      nmprune prune models/llama --method sparsegpt --set method.damping=0.05

      # masks learned end to end, from the dense model (see docs/training.md: tokens, time, memory)
      nmprune prune models/llama --method maskllm --preset best --n-sequences 512

      # all but the down projections
      nmprune prune models/llama --exclude '*.down_proj'

      # a recipe, with one thing changed
      nmprune prune recipes/smollm2_wanda_2x4.yaml --seed 1 --out runs/seed1

      # several processes share the run and find the same masks (docs/scale.md)
      torchrun --nproc-per-node 4 -m nmprune prune models/llama --method sparsegpt --out runs/llama

    Exit codes: 0 done, 2 something you can put right, 130 Ctrl-C, 1 a bug of ours.
    """
    from nmprune.distributed import is_main_process

    output = Output(json, quiet or not is_main_process())
    recipe = flags.read_recipe(model, given)
    how = on.machine(checkpoint_minutes)
    place = out or flags.default_out(recipe)
    if out is None:
        output.note(f"no --out given: the run folder is {place}")

    from nmprune.report import pruning_tables
    from nmprune.run import RunFolder, prune_run

    if not debug:
        quiet_libraries()
    folder = RunFolder(place)
    was_finished = folder.finished
    effort = flags.chosen_effort(model, given)
    if effort is not None and not folder.is_run:
        announce(output, effort, recipe, how, place)
    with ProgressView(output) as view:
        results = prune_run(recipe, place, how, report=view.show)
    if not is_main_process():
        return 0
    output.result(
        {"run": place, "model": folder.model, "already_finished": was_finished, "results": results},
        pruning_tables(results),
    )
    run = shlex.quote(str(place))
    output.hints(
        {
            f"nmprune verify {run}": "prove it against the dense model",
            f"nmprune evaluate {run}": "token perplexity, dense beside pruned",
            **({f"nmprune curves {run}": "what the learner said, drawn"} if folder.metrics_file.is_file() else {}),
        }
    )
    return 0
