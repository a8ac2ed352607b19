"""`nmprune plan`: what a run would do, need and take, without doing it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nmprune.cli import options
from nmprune.cli import recipe_flags as flags
from nmprune.cli.console import Output, plain
from nmprune.cli.machine_flags import MachineFlags
from nmprune.cli.quiet_libraries import quiet_libraries

Out = Annotated[
    Path, typer.Option(help="Where the run would be written: that disk is timed.", metavar="DIR", show_default="here")
]
DeviceMemory = Annotated[
    str | None,
    typer.Option(
        help="Ask about a device that is not here, such as 80GB: whether the run fits it. Gives no time.",
        metavar="SIZE",
        show_default=False,
    ),
]
Timed = Annotated[
    bool,
    typer.Option("--time/--no-time", help="Measure this machine for some seconds to estimate how long the run takes."),
]


def plan(
    model: flags.ModelOrRecipe,
    given: flags.RecipeFlags,
    out: Out = Path(),
    device_memory: DeviceMemory = None,
    time: Timed = True,
    device: options.Device = options.DEVICE,
    hidden_budget: options.HiddenBudget = options.HIDDEN_BUDGET,
    threads: options.Threads = options.THREADS,
    json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> int:
    """Say what a run would do, need and take: linears, memory, disk and time. No weights are read.

    It takes the flags of `nmprune prune`. Everything comes from config.json; the time comes from running one decoder layer
    with random weights, the statistics and the solver for a moment on this machine.

    Examples:

      # on this machine
      nmprune plan smollm2-135m --method sparsegpt

      # what the best effort would take
      nmprune plan smollm2-135m --effort best

      # does a 70B model fit one 80 GB card? (a folder with config.json is enough)
      nmprune plan models/llama-70b --method sparsegpt --n-sequences 128 --seq-len 2048 --device-memory 80GB

    Exit codes: 0 done (also where it does not fit), 2 something you can put right.
    """
    output = Output(json, quiet)
    recipe = flags.read_recipe(model, given)
    how = MachineFlags(device, hidden_budget, threads).machine()
    memory = None if device_memory is None else options.parse_size("--device-memory", device_memory)
    if not debug:
        quiet_libraries()

    from nmprune.report import plan_tables
    from nmprune.run.plan import plan as make

    if time and memory is None:
        output.note("timing this machine")
    made = make(recipe, how, out=out, device_memory=memory, timed=time)
    output.result({"fits": made.fits, "total_seconds": made.total_seconds, **plain(made)}, plan_tables(made))
    return 0
