"""The command line: one subcommand = one small file that parses, calls run and prints. The registry is here.

Nothing heavy is imported before a command needs it: `nmprune --help` must not wait for torch.
"""

from __future__ import annotations

from typing import Annotated

import typer

from nmprune.cli.analyze import analyze
from nmprune.cli.apply import apply
from nmprune.cli.curves import curves
from nmprune.cli.diff import diff
from nmprune.cli.evaluate import evaluate
from nmprune.cli.finetune import finetune
from nmprune.cli.guard import guarded
from nmprune.cli.inspect import inspect
from nmprune.cli.list import list_
from nmprune.cli.plan import plan
from nmprune.cli.prune import prune
from nmprune.cli.regenerate import regenerate
from nmprune.cli.spread import spread
from nmprune.cli.validate import validate
from nmprune.cli.verify import verify
from nmprune.version import VERSION

app = typer.Typer(
    name="nmprune",
    help="N:M sparsity for large language models: prune, prove what was done, measure it.",
    epilog="Start with: nmprune prune smollm2-135m --out runs/first. Then: nmprune COMMAND --help.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

_DO, _CHECK, _LOOK = "Make sparse", "Prove and measure", "Look before you leap"
app.command("prune", rich_help_panel=_DO)(guarded(spread(prune), resumable=True, shared=True))
app.command("finetune", rich_help_panel=_DO)(
    guarded(finetune, resumable=True, kept="The last step that was finished is kept.")
)
app.command("apply", rich_help_panel=_DO)(guarded(apply))
app.command("verify", rich_help_panel=_CHECK)(guarded(verify))
app.command("evaluate", rich_help_panel=_CHECK)(guarded(spread(evaluate)))
app.command("analyze", rich_help_panel=_CHECK)(guarded(spread(analyze)))
app.command("regenerate", rich_help_panel=_CHECK)(guarded(spread(regenerate)))
app.command("curves", rich_help_panel=_CHECK)(guarded(curves))
app.command("diff", rich_help_panel=_CHECK)(guarded(diff))
app.command("list", rich_help_panel=_LOOK)(guarded(list_))
app.command("plan", rich_help_panel=_LOOK)(guarded(spread(plan)))
app.command("inspect", rich_help_panel=_LOOK)(guarded(inspect))
app.command("validate", rich_help_panel=_LOOK)(guarded(validate))


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"nmprune {VERSION}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """N:M sparsity for large language models: prune, prove what was done, measure it."""


def main() -> None:
    """The console script."""
    app(prog_name="nmprune")


__all__ = ["app", "main"]
