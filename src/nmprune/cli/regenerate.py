"""`nmprune regenerate`: the masks of a hyperprune run again, all from its last network."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nmprune.cli import options
from nmprune.cli.console import Output, plain
from nmprune.cli.machine_flags import MachineFlags
from nmprune.cli.progress import ProgressView
from nmprune.cli.quiet_libraries import quiet_libraries


def regenerate(
    run: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="A finished hyperprune run.", show_default=False)],
    base: options.Base = None,
    *,
    on: MachineFlags,
    json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> int:
    """Make every mask of a hyperprune run again from its last network, and compare: the measure of forgetting.

    A run takes a layer's masks when it leaves the layer; the network goes on learning. Here each layer meets the inputs that it
    met in the run, and the network as the last layer left it makes its masks, without the free scores that a layer had of its
    own. The shares of groups with equal masks are shown by role and layer, the prior's beside them, and the layer's loss on the
    held-out sequences. Kept: RUN_DIR/evaluations/regenerated.json; and the masks, RUN_DIR/regenerated.safetensors.

    Examples:

      nmprune regenerate runs/learned

      # what those masks are worth
      nmprune apply runs/learned/regenerated.safetensors smollm2-135m --out models/regenerated
      nmprune evaluate models/regenerated
    """
    from nmprune.report import AgreementRow, LossRow, regeneration_tables
    from nmprune.run.regenerate import MASKS_FILE
    from nmprune.run.regenerate import regenerate as make

    if not debug:
        quiet_libraries()
    output = Output(json, quiet)
    how = on.machine()
    with ProgressView(output) as view:
        found, file = make(run, how, base, view.show)
    linears = [
        AgreementRow(one.layer, one.role, one.groups, one.agreement, one.prior_run, one.prior_network)
        for one in found.linears
    ]
    layers = [LossRow(one.layer, one.accepted, one.run_loss, one.network_loss, one.prior_loss) for one in found.layers]
    masks = run / MASKS_FILE
    title = f"{run}: {found.method}, prior {found.prior}, continual term {found.lambda2:g}"
    output.result(
        {"run": str(run), "saved": str(file), "masks": str(masks), **plain(found)},
        regeneration_tables(title, linears, layers),
    )
    if found.left_out:
        output.note(f"{len(found.left_out)} experts saw too few tokens to be learned; their masks are the run's")
    output.note(f"saved: {file} and {masks}")
    return 0
