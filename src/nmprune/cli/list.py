"""`nmprune list`: what there is to choose from."""

from __future__ import annotations

from typing import Annotated

import typer

from nmprune.cli import options
from nmprune.cli.console import Output
from nmprune.errors import InputError, near_matches

KINDS = ("methods", "architectures", "texts")


def list_(
    kind: Annotated[
        str | None, typer.Argument(metavar="[methods|architectures|texts]", help="Only this.", show_default="all three")
    ] = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> int:
    """List methods with their hyper-parameters, architectures, and text sources.

    Examples:

      nmprune list

      nmprune list methods --json
    """
    from nmprune.report import registries

    if kind is not None and kind not in KINDS:
        raise InputError(f"there is no list of {kind!r}. {near_matches(kind, KINDS)}")
    wanted = KINDS if kind is None else (kind,)
    documents = {"methods": registries.methods, "architectures": registries.architectures, "texts": registries.texts}
    tables = {
        "methods": (registries.methods_table, registries.hyper_parameters_table),
        "architectures": (registries.architectures_table,),
        "texts": (registries.texts_table,),
    }
    Output(json, quiet).result(
        {name: documents[name]() for name in wanted}, [make() for name in wanted for make in tables[name]]
    )
    return 0
