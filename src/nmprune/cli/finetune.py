"""`nmprune finetune`: train a run's kept weights, masks held."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nmprune.cli import options
from nmprune.cli.console import Output, plain
from nmprune.cli.machine_flags import MachineFlags
from nmprune.cli.progress import ProgressView
from nmprune.cli.quiet_libraries import quiet_libraries
from nmprune.errors import InputError

if TYPE_CHECKING:
    from nmprune.run import Machine
    from nmprune.train.finetune_settings import FinetuneRecipe

_SUFFIXES = (".yaml", ".yml")


def finetune(
    run: Annotated[
        str,
        typer.Argument(
            metavar="RUN_DIR|RECIPE.yaml",
            help="A finished run, or the recipe.yaml of a finetuned one.",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path | None, typer.Option(help="The new run folder.", metavar="DIR", show_default="<RUN_DIR>_finetuned")
    ] = None,
    minutes: Annotated[
        float | None, typer.Option(help="Of training; 0 = until --steps are done.", show_default="30")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="At most so many; 0 = until the time is up.", show_default="0")
    ] = None,
    text: Annotated[
        str | None,
        typer.Option(
            help="builtin, wikitext2, c4, hf:DATASET, or a file.", show_default="what the run was calibrated on"
        ),
    ] = None,
    loss: Annotated[
        str | None,
        typer.Option(help="kl: the dense model's distributions; lm: the text's next tokens.", show_default="kl"),
    ] = None,
    lora: Annotated[
        int | None,
        typer.Option(help="Rank of masked low-rank deltas; 0 = all kept weights are trained.", show_default="0"),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Order of documents and windows.", show_default="0")] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="Any other setting of docs/finetuning.md: lr=0.001, also=norms. Repeatable.",
            metavar="KEY=VALUE",
            show_default=False,
        ),
    ] = None,
    plan: Annotated[
        bool, typer.Option("--plan", help="Say what it would need and take, after some timed steps, and do nothing.")
    ] = False,
    base: options.Base = None,
    checkpoint_minutes: options.CheckpointMinutes = options.CHECKPOINT_MINUTES,
    device: options.Device = options.DEVICE,
    threads: options.Threads = options.THREADS,
    json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> int:
    """Finetune a pruned model: its kept weights are trained, and its masks hold to the last bit.

    The result is a run folder of its own: model/ loads in transformers as it is, masks.safetensors is the run's, and verify
    proves both. By default it learns for 30 minutes from the dense model (distillation) on the text that the run was calibrated
    on; held-out windows of it choose the best weights. Killed or interrupted, the same command goes on from the last
    checkpoint.

    Examples:

      nmprune finetune runs/first --text c4 --minutes 30

      # masked low-rank deltas: little memory for the optimiser
      nmprune finetune runs/first --lora 16 --steps 500 --minutes 0 --out runs/first_lora

      # how much memory and how many steps; nothing is written
      nmprune finetune runs/first --text c4 --minutes 30 --plan

      # norms, too
      nmprune finetune runs/first --set also=norms

    Exit codes: 0 done, 2 something you can put right, 130 Ctrl-C, 1 a bug of ours.
    """
    from nmprune.report import finetune_table
    from nmprune.run import RunFolder
    from nmprune.run.finetune import finetune_run

    output = Output(json, quiet)
    given = {"minutes": minutes, "steps": steps, "text": text, "loss": loss, "lora": lora, "seed": seed}
    flags = [f"{key}={value}" for key, value in given.items() if value is not None]
    parent, wanted = _settings(run, [*flags, *(settings or ())])
    place = out or parent.with_name(f"{parent.name}_finetuned")
    if out is None and not plan:
        output.note(f"no --out given: the run folder is {place}")
    if not debug:
        quiet_libraries()
    how = MachineFlags(device, threads=threads).machine(checkpoint_minutes)
    if plan:
        return _plan(output, parent, wanted, place, how, base)
    folder = RunFolder(place)
    was_finished = folder.finished
    with ProgressView(output) as view:
        results = finetune_run(parent, wanted, place, how, base, view.show)
    assert results.finetune is not None
    output.result(
        {"run": place, "model": folder.model, "already_finished": was_finished, "results": results},
        [finetune_table(results)],
    )
    quoted = shlex.quote(str(place))
    output.hints(
        {
            f"nmprune verify {quoted}": "prove that every mask held",
            f"nmprune evaluate {quoted}": "token perplexity, dense beside pruned",
        }
    )
    return 0


def _plan(output: Output, parent: Path, wanted: FinetuneRecipe, place: Path, how: Machine, base: str | None) -> int:
    from nmprune.report import finetune_plan_tables
    from nmprune.run.plan_finetune import plan_finetune

    with ProgressView(output) as view:
        made = plan_finetune(parent, wanted, how, base=base, out=place, report=view.show)
    output.result({"fits": made.fits, "total_seconds": made.total_seconds, **plain(made)}, finetune_plan_tables(made))
    return 0


def _settings(run: str, given: list[str]) -> tuple[Path, FinetuneRecipe]:
    """The parent, and the settings: of a recipe file or the defaults, with what is given on top.

    Raises:
        InputError: faults in the settings, or a recipe that is of no finetuning.
    """
    from nmprune.run.recipe import Recipe, section
    from nmprune.train.finetune_settings import FinetuneRecipe

    before, parent = FinetuneRecipe(), Path(run)
    if run.lower().endswith(_SUFFIXES):
        recipe = Recipe.from_yaml(parent)
        if recipe.finetune is None:
            raise InputError(f"{run} is the recipe of a pruning run. Give the run's folder, or prune first.")
        before, parent = recipe.finetune, Path(recipe.finetune.parent)
    raw = before.to_dict()
    for setting in given:
        key, separator, value = setting.partition("=")
        if not separator or not key:
            raise InputError(f"--set {setting!r}: expected KEY=VALUE, such as lr=0.001.")
        if key.strip() in ("parent", "parent_masks"):
            raise InputError(f"--set {setting!r}: the run that is given is the parent. Leave it out.")
        raw[key.strip()] = value
    faults: list[str] = []
    found: FinetuneRecipe = section(faults, "finetune", FinetuneRecipe, raw)
    faults = faults or found.faults()
    if faults:
        raise InputError(" ".join(faults))
    return parent, found
