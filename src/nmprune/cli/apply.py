"""`nmprune apply`: a mask file onto a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nmprune.cli import options
from nmprune.cli.console import Output
from nmprune.cli.progress import ProgressView
from nmprune.cli.quiet_libraries import quiet_libraries


def apply(
    masks: Annotated[
        Path,
        typer.Argument(metavar="MASKS", help="masks.safetensors, a run folder, or MaskLLM's .npz.", show_default=False),
    ],
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="An HF folder, a .gguf file, a hub id, or smollm2-135m.", show_default=False
        ),
    ],
    out: Annotated[Path, typer.Option(help="The new HF folder; it must not exist.", metavar="DIR", show_default=False)],
    pattern: Annotated[
        str | None,
        typer.Option(help="What an .npz keeps; it does not say so itself.", metavar="N:M", show_default=False),
    ] = None,
    trust_remote_code: options.TrustRemoteCode = False,
    allow_sparse: Annotated[bool, typer.Option("--allow-sparse", help="Take a model that is sparse already.")] = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> int:
    """Apply masks to a model: +0.0 where a mask says so, every other weight as it was.

    Masks made for one checkpoint may be put onto another of the same architecture (a finetuned one): names and shapes must
    fit, and a notice says so.

    Examples:

      nmprune apply runs/first models/finetuned --out models/finetuned-2x4

      nmprune apply llama2_7b_mask.npz models/llama2 --pattern 2:4 --out models/llama2-2x4
    """
    from nmprune.pattern import Pattern
    from nmprune.report import facts
    from nmprune.run.apply import apply_masks

    if not debug:
        quiet_libraries()
    output = Output(json, quiet)
    wanted = None if pattern is None else Pattern.parse(pattern)
    with ProgressView(output) as view:
        done = apply_masks(masks, model, out, wanted, trust_remote_code, allow_sparse, view.show)
    for notice in done.notices:
        output.note(f"notice: {notice}")
    shown = {
        "masks": f"{done.masks}, {done.n_masks:,} tensors",
        "onto": done.model,
        "pattern": f"{done.pattern}, density of the masked tensors {done.density:.1%}",
        "written": done.out,
    }
    output.result(done, [facts("", shown)])
    return 0
