"""`nmprune evaluate`: token perplexity."""

from __future__ import annotations

from typing import Annotated

import typer

from nmprune.cli import options
from nmprune.cli.console import Output
from nmprune.cli.machine_flags import MachineFlags
from nmprune.cli.progress import ProgressView
from nmprune.cli.quiet_libraries import quiet_libraries


def evaluate(
    path: Annotated[
        str,
        typer.Argument(
            metavar="RUN_DIR|MODEL", help="A finished run (dense beside pruned), or one model.", show_default=False
        ),
    ],
    text: Annotated[
        str | None,
        typer.Option(
            help=options.MEASURED_TEXT,
            show_default="wikitext2 where it is found, else builtin",
        ),
    ] = None,
    seq_len: Annotated[int, typer.Option(help="Tokens per window.")] = 512,
    max_windows: Annotated[int, typer.Option(help="Windows, from the start of the text.")] = 16,
    batch_size: Annotated[int, typer.Option(help="Windows per forward; 0 = about 2048 tokens.")] = 0,
    base: options.Base = None,
    dtype: Annotated[
        str, typer.Option(help="Compute dtype: auto (fp32 on a CPU, else the model's), float32, bfloat16, float16.")
    ] = "auto",
    trust_remote_code: options.TrustRemoteCode = False,
    *,
    on: MachineFlags,
    json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> int:
    """Measure token perplexity, one decoder layer in memory at a time.

    As the field computes it: documents joined by blank lines, windows side by side without overlap. A perplexity says little
    without its data set, split, sequence length and number of windows, so they are always printed. A run's numbers are kept
    in RUN_DIR/evaluations/.

    Examples:

      nmprune evaluate runs/first --text wikitext2 --seq-len 512 --max-windows 16

      nmprune evaluate models/llama --text my_text.txt --json
    """
    from nmprune.report import PerplexityRow, perplexity_table
    from nmprune.run.evaluate import Measure
    from nmprune.run.evaluate import evaluate as measure_path

    if not debug:
        quiet_libraries()
    output = Output(json, quiet)
    measure = Measure(text, seq_len, max_windows, batch_size, dtype, trust_remote_code)
    how = on.machine()
    with ProgressView(output) as view:
        found = measure_path(path, measure, how, base, view.show)
    rows = [
        PerplexityRow(
            one.what,
            one.perplexity.value,
            one.perplexity.value_error,
            one.perplexity.mean_nll,
            one.perplexity.standard_error,
            one.seconds,
        )
        for one in found.models
    ]
    output.result(found, [perplexity_table(found.text, found.split, found.seq_len, found.n_windows, rows)])
    if found.saved:
        output.note(f"saved: {found.saved}")
    return 0
