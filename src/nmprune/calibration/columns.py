"""Which column of a table holds the text."""

from __future__ import annotations

from collections.abc import Collection

from nmprune.errors import InputError, near_matches

_USUAL_NAMES = ("text", "content", "document", "body", "article")


def text_column(place: str, named: str | None, columns: Collection[str], string_columns: Collection[str]) -> str:
    """The column the user named, else `text`, else the only usual name, else the only column of strings.

    Args:
        place: which table, for the message.
        named: what stood after `#` in the source; None where nothing did.
        columns: all columns.
        string_columns: those that hold strings.

    Raises:
        InputError: no such column, not a column of strings, or several could be meant.
    """
    if named is not None:
        if named not in columns:
            raise InputError(f"{place}: there is no column {named!r}. {near_matches(named, columns)}")
        if named not in string_columns:
            raise InputError(
                f"{place}: column {named!r} does not hold strings. Columns of strings: {_listed(string_columns)}."
            )
        return named
    if "text" in string_columns:
        return "text"
    usual = [name for name in _USUAL_NAMES if name in string_columns]
    candidates = usual or sorted(string_columns)
    if len(candidates) == 1:
        return candidates[0]
    if not candidates:
        raise InputError(
            f"{place}: no column holds strings. Columns: {_listed(columns)}. Give a table with a column `text`."
        )
    raise InputError(
        f"{place}: several columns could hold the text: {_listed(candidates)}. "
        f"Name one after #, for example {place}#{candidates[0]}. All columns: {_listed(columns)}."
    )


def _listed(names: Collection[str]) -> str:
    return ", ".join(sorted(names)) or "none"
