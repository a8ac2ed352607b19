"""`nmprune inspect`: what a path holds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from nmprune.cli import options
from nmprune.cli.console import Output
from nmprune.cli.quiet_libraries import quiet_libraries

if TYPE_CHECKING:
    from nmprune.checkpoint import MaskFile
    from nmprune.report import Table
    from nmprune.run.inspect import RunFacts


def inspect(
    path: Annotated[
        str,
        typer.Argument(
            metavar="PATH", help="A model (folder, .gguf, hub id), a run folder, or a mask file.", show_default=False
        ),
    ],
    trust_remote_code: options.TrustRemoteCode = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> int:
    """Look at a model, a run or a mask file. Of a model only config and shard headers are read, no weights.

    Examples:

      nmprune inspect models/llama

      nmprune inspect runs/first

      nmprune inspect runs/first/masks.safetensors
    """
    from nmprune.report import ModelFacts, facts, mask_tables, model_tables
    from nmprune.run.inspect import NpzFacts, RunFacts
    from nmprune.run.inspect import inspect as look

    if not debug:
        quiet_libraries()
    output = Output(json, quiet)
    found = look(path, trust_remote_code)
    if isinstance(found, ModelFacts):
        output.result({"kind": "model", **vars(found)}, model_tables(found))
    elif isinstance(found, RunFacts):
        output.result({"kind": "run", **vars(found), "recipe": found.recipe.to_dict()}, _run_tables(found))
    elif isinstance(found, NpzFacts):
        shown = {
            "mask file": found.file,
            "form": "MaskLLM's npz: says neither shapes nor pattern",
            "masks": f"{len(found.keys):,}, {found.n_bits:,} bits",
            "such as": found.keys[0] if found.keys else "",
        }
        output.result({"kind": "npz masks", **vars(found)}, [facts("", shown)])
    else:
        output.result(_mask_document(path, found), mask_tables(path, found))
    return 0


def _run_tables(found: RunFacts) -> list[Table]:
    from nmprune.report import facts, pruning_tables
    from nmprune.report.quantities import settings

    recipe = found.recipe
    state = "finished" if found.results else f"not finished: {found.n_layers_finished} decoder layers so far"
    head = facts(
        "",
        {
            "run": found.run,
            "state": state,
            "model": recipe.model,
            "method": ", ".join([recipe.pruner.name, *settings(recipe.pruner.hyper_parameters())]),
            "pattern": recipe.pattern_words,
            "exclude": ", ".join(recipe.exclude),
            "evaluations": ", ".join(found.evaluations),
        },
    )
    return [head, *(pruning_tables(found.results) if found.results else [])]


def _mask_document(path: str, masks: MaskFile) -> dict[str, Any]:
    return {
        "kind": "masks",
        "file": path,
        "method": masks.method,
        "model": masks.model,
        "fingerprint": masks.fingerprint,
        "nmprune_version": masks.nmprune_version,
        "patterns": masks.patterns(),
        "density": masks.density(),
        "legal": True,  # reading it checked every group
        "tensors": [
            {
                "name": name,
                "shape": entry.shape,
                "pattern": entry.pattern,
                "group_axis": entry.group_axis,
                "kept": entry.n_kept,
            }
            for name, entry in masks.masks.items()
        ],
    }
