"""A table as plain data: what the terminal shows and what a Markdown page holds come from the same rows."""

from __future__ import annotations

from dataclasses import dataclass

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table as RichTable
from rich.text import Text

_FIRST_COLUMN = 28  # characters of names that are not broken, even in a narrow terminal


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
        """For a terminal; cells are literal text, no markup, and wrap rather than being cut off; empty columns are left out."""
        table = RichTable(box=box.SIMPLE_HEAD, pad_edge=False, show_header=any(self.heads))
        lines = [*self.rows, *([self.total] if self.total else [])]
        shown = [i for i in range(len(self.columns)) if any(line[i] for line in lines)]
        for i in shown:
            numbers = self.columns[i].endswith(">")
            longest = max(len(line[i]) for line in lines)
            table.add_column(
                Text(self.heads[i]),
                justify="right" if numbers else "left",
                overflow="fold",
                # in a narrow terminal heads and long texts wrap; numbers and names must not
                min_width=longest if numbers else min(longest, _FIRST_COLUMN) if i == 0 else None,
            )
        for row in self.rows:
            table.add_row(*(Text(row[i]) for i in shown))
        if self.total:
            table.add_section()
            table.add_row(*(Text(self.total[i], style="bold") for i in shown))
        # not the table's own title, which would be wrapped to the table's width
        return Group(Text(self.title, style="bold"), table) if self.title else table

    def markdown(self) -> str:
        """For a page; the title is a line above the table."""
        rules = ["---:" if column.endswith(">") else "---" for column in self.columns]
        lines = [self.heads, rules, *self.rows, *([self.total] if self.total else [])]
        body = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
        return f"{self.title}\n\n{body}\n" if self.title else f"{body}\n"


def facts(title: str, pairs: dict[str, str]) -> Table:
    """A table of names and values without heads; empty values are left out."""
    return Table(title, ("", ""), tuple((name, value) for name, value in pairs.items() if value))
