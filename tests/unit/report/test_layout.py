from __future__ import annotations

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
