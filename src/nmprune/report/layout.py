"""A table as plain data: what the terminal shows and what a Markdown page holds come from the same rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from rich import box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType
from rich.table import Table as RichTable
from rich.text import Text

_LONGEST_WORD = 44  # characters of a name that is not broken, even in a narrow terminal
_FIRST_COLUMN, _TEXT_COLUMN = 28, 20  # characters of a longer text that are not wrapped
_WIDE_GAP, _GAP, _EDGES = 3, 2, 2  # spaces between two columns, where they are few, and beside the table


@dataclass(frozen=True)
class Table:
    """Rows of text under a title.

    Attributes:
        title: what the table says; empty for none.
        columns: heads; one that ends in ">" (not shown) is a column of numbers, set to the right.
        rows: cells, one tuple a row.
        total: a last row set apart by a line; empty for none.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    total: tuple[str, ...] = ()

    @property
    def heads(self) -> tuple[str, ...]:
        """The column heads as they are shown."""
        return tuple(column.removesuffix(">") for column in self.columns)

    def rich(self) -> RenderableType:
        """For a terminal; cells are literal text, no markup, and wrap rather than being cut off; empty columns are left out.

        A table that is too wide goes on below with its first column again.
        """
        return _Fitted(self)

    def markdown(self) -> str:
        """For a page; the title is a line above the table."""
        rules = ["---:" if column.endswith(">") else "---" for column in self.columns]
        lines = [self.heads, rules, *self.rows, *([self.total] if self.total else [])]
        body = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
        return f"{self.title}\n\n{body}\n" if self.title else f"{body}\n"


class _Fitted:
    """A table in as many parts as the width asks for."""

    def __init__(self, table: Table) -> None:
        self._table = table
        self._lines = [*table.rows, *([table.total] if table.total else [])]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        # not the table's own title, which would be wrapped to the table's width
        if self._table.title:
            yield Text(self._table.title, style="bold")
        shown = [i for i in range(len(self._table.columns)) if any(line[i] for line in self._lines)]
        room = options.max_width - _EDGES
        for part in self._parts(shown, room):
            yield self._part(part, room)

    def _parts(self, shown: Sequence[int], room: int) -> list[list[int]]:
        """The columns of each part; the first is in all of them."""
        if len(shown) < 3:  # nothing to be gained
            return [list(shown)]
        parts = [[shown[0]]]
        for column in shown[1:]:
            wanted = [*parts[-1], column]
            if len(wanted) > 2 and sum(map(self._least, wanted)) + _GAP * (len(wanted) - 1) > room:
                parts.append([shown[0], column])
            else:
                parts[-1] = wanted
        return parts

    def _least(self, column: int) -> int:
        """Characters without which a column cannot be read: its numbers, its words."""
        head = self._table.heads[column]
        cells = self._column(column)
        longest = max(map(cell_len, cells), default=0)
        words = max((cell_len(word) for cell in cells for word in cell.split()), default=0)
        of_head = max(map(cell_len, head.split()), default=0)
        if self._is_number(column):
            return max(longest, of_head)
        text = min(longest, _FIRST_COLUMN if column == 0 else _TEXT_COLUMN)
        return max(min(words, _LONGEST_WORD), text, of_head)

    def _part(self, columns: Sequence[int], room: int) -> RichTable:
        widths = [max(cell_len(text) for text in (self._table.heads[i], *self._column(i))) for i in columns]
        roomy = sum(widths) + _WIDE_GAP * (len(columns) - 1) <= room
        if not roomy:
            widths = self._shrunk(columns, widths, room - _GAP * (len(columns) - 1))
        table = RichTable(
            box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=not roomy, show_header=any(self._table.heads)
        )
        for i, width in zip(columns, widths, strict=True):
            justify: Literal["left", "right"] = "right" if self._is_number(i) else "left"
            table.add_column(Text(self._table.heads[i]), justify=justify, overflow="fold", width=width)
        for row in self._table.rows:
            table.add_row(*(Text(row[i]) for i in columns))
        if self._table.total:
            table.add_section()
            table.add_row(*(Text(self._table.total[i], style="bold") for i in columns))
        return table

    def _shrunk(self, columns: Sequence[int], widths: Sequence[int], room: int) -> list[int]:
        """Widths that fit: a character at a time from what has most to spare, and where nothing has, from the longest text.

        rich would take it from numbers and names alike, and cut the last columns off.
        """
        found, least = list(widths), [self._least(i) for i in columns]
        texts = [place for place, i in enumerate(columns) if not self._is_number(i)]
        while sum(found) > room:
            widest = max(range(len(found)), key=lambda place: found[place] - least[place])
            if found[widest] <= least[widest]:
                widest = max(texts, key=lambda place: found[place], default=widest)
            if found[widest] <= 1:
                break
            found[widest] -= 1
        return found

    def _is_number(self, column: int) -> bool:
        return self._table.columns[column].endswith(">")

    def _column(self, column: int) -> list[str]:
        return [line[column] for line in self._lines]


def facts(title: str, pairs: dict[str, str]) -> Table:
    """A table of names and values without heads; empty values are left out."""
    return Table(title, ("", ""), tuple((name, value) for name, value in pairs.items() if value))
