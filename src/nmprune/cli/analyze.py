"""`nmprune analyze`: output errors and information of a run, linear by linear."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nmprune.cli import options
from nmprune.cli.console import Output, plain
from nmprune.cli.machine_flags import MachineFlags
from nmprune.cli.progress import ProgressView
from nmprune.cli.quiet_libraries import quiet_libraries


def analyze(
    run: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="A finished run of any method.", show_default=False)],
    text: Annotated[
        str | None,
        typer.Option(
            help=options.MEASURED_TEXT,
            show_default="the calibration source, another part",
        ),
    ] = None,
    n_sequences: Annotated[int, typer.Option(help="Token windows, from the start of the text.")] = 16,
    seq_len: Annotated[int, typer.Option(help="Tokens per window.")] = 512,
    mixed_masks: Annotated[
        int, typer.Option(help="Masks between Wanda's and a random one to compare with; the last is all random.")
    ] = 2,
    base: options.Base = None,
    *,
    on: MachineFlags,
    json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> int:
    """Look at every linear of a run on text that it was not made on: output error, information, outliers.

    The error is ||X (W' - W)^T||^2 / ||X W^T||^2 with X the linear's input in the pruned model. The information, in nats, is
    what the pruned output, seen through a little noise, would tell of the dense one were the inputs Gaussian. HyperPrune's
    Theorem 1 says that one falls as the other rises: their rank correlations, over linears and over other masks of the same
    linear, are in the last table. One forward pass; see docs/analyze.md for the formulas and the cost. Kept in
    RUN_DIR/evaluations/ as analysis.json and analysis.svg.

    Examples:

      nmprune analyze runs/first

      nmprune analyze runs/first --text wikitext2 --n-sequences 4 --mixed-masks 4
    """
    from nmprune.report import AnalysedRow, CorrelationRow, analysis_tables
    from nmprune.run.analyze import Question
    from nmprune.run.analyze import analyze as analyze_run

    if not debug:
        quiet_libraries()
    output = Output(json, quiet)
    how = on.machine()
    with ProgressView(output) as view:
        found, file = analyze_run(run, Question(text, n_sequences, seq_len, mixed_masks), how, base, view.show)
    linears = [
        AnalysedRow(
            one.name,
            one.role,
            one.shape[0],
            found.calibration_errors.get(one.name),
            one.masks[0].error,
            one.masks[0].nats,
            one.determines_input,
            one.mean_term / (one.mean_term + one.variance_term or 1.0),
            one.kept,
        )
        for one in found.linears
    ]
    over = {"linears": "linears", "masks": "masks of a linear"}
    correlations = [
        CorrelationRow(
            over[one.over] + (", Z not telling x" if one.open_only else ""),
            one.noise_share,
            one.n,
            one.nats,
            one.nats_per_output,
            one.least,
            one.most,
        )
        for one in found.correlations
    ]
    where = f"{found.text} ({found.split}), {found.n_windows} x {found.seq_len} tokens"
    output.result(
        {"run": str(run), "saved": str(file), "picture": str(file.with_suffix(".svg")), **plain(found)},
        analysis_tables(f"{run}: {found.method}", where, found.noise_shares, linears, correlations),
    )
    for name, why in found.left_out.items():
        output.note(f"not looked at: {name} {why}")
    output.note(f"saved: {file} and {file.with_suffix('.svg').name}")
    return 0
