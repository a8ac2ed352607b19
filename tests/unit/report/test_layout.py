from __future__ import annotations

import pytest
from rich.console import Console

from nmprune.report.layout import Table, facts

TABLE = Table("title", ("name", "count>", "notes"), (("a|b", "1", ""), ("[red]c[/red]", "20", "")), ("all", "21", ""))


def shown(table: Table, width: int = 80) -> list[str]:
    console = Console(width=width, record=True, file=open("/dev/null", "w"), color_system=None)  # noqa: SIM115, PTH123
    console.print(table.rich())
    console.file.close()
    return [line.strip() for line in console.export_text().splitlines() if line.strip()]


def test_terminal_tables_show_cells_as_they_are_and_leave_out_empty_columns():
    lines = shown(TABLE)
    assert lines[0] == "title"
    assert lines[1].split() == ["name", "count"]
    assert lines[3].split() == ["a|b", "1"]
    assert lines[4].split() == ["[red]c[/red]", "20"]
    assert lines[-1].split() == ["all", "21"]


def test_numbers_and_names_are_whole_in_a_narrow_terminal():
    table = Table("", ("role", "a long head>", "text"), (("self_attn.q_proj", "1,234,567", "words " * 30),))
    lines = shown(table, width=44)
    assert any("self_attn.q_proj" in line and "1,234,567" in line for line in lines)
    assert sum(line.count("w") for line in lines) == 30


WIDE = Table(
    "title",
    ("linear", *(f"quantity {i}, per output>" for i in range(8)), "why"),
    tuple(
        (f"model.layers.{row}.self_attn.q_proj", *[f"{row}.{i:03d}" for i in range(8)], "words, words")
        for row in (1, 2)
    ),
    ("all", *[f"9.{i:03d}" for i in range(8)], ""),
)


@pytest.mark.parametrize(("width", "parts"), [(60, 5), (80, 3), (120, 2), (300, 1)])
def test_a_table_that_is_too_wide_goes_on_below_with_its_names_again(width, parts):
    lines = shown(WIDE, width)
    assert max(map(len, lines)) <= width
    for row in (1, 2):
        named = [line.split()[1:] for line in lines if line.startswith(f"model.layers.{row}.self_attn.q_proj ")]
        assert len(named) == parts
        assert [cell for line in named for cell in line if cell[0].isdigit()] == [f"{row}.{i:03d}" for i in range(8)]
    assert sum(line.startswith("all") for line in lines) == parts
    words = " ".join(lines).split()
    assert words.count("quantity") == words.count("per") == words.count("output") == 8, "heads break between words"
    assert words.count("title") == 1


def test_in_a_very_narrow_terminal_texts_break_and_nothing_is_cut_off():
    lines = shown(facts("", {"model": "word" * 30, "a name of a fact": "x"}), width=30)
    assert max(map(len, lines)) <= 30 and "".join(lines).replace(" ", "").count("word") >= 25


def test_markdown_sets_numbers_right_and_escapes_bars():
    assert TABLE.markdown().splitlines() == [
        "title",
        "",
        "| name | count | notes |",
        "| --- | ---: | --- |",
        "| a\\|b | 1 |  |",
        "| [red]c[/red] | 20 |  |",
        "| all | 21 |  |",
    ]


def test_facts_leave_out_empty_values():
    assert facts("t", {"a": "1", "b": "", "c": "3"}).rows == (("a", "1"), ("c", "3"))
    assert shown(facts("", {"a": "1"})) == ["a   1"]
