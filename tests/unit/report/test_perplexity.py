from __future__ import annotations

from nmprune.report import PerplexityRow, perplexity_table


def test_the_title_says_what_was_measured_and_the_rows_compare():
    rows = [
        PerplexityRow("dense", 20.0, 0.5, 2.9957, 0.025, None),
        PerplexityRow("pruned", 25.0, None, 3.2189, None, 70),
    ]
    table = perplexity_table("wikitext2", "test", 512, 16, rows)
    assert table.title == "token perplexity on wikitext2 (test), 16 windows of 512 tokens"
    assert table.rows == (
        ("dense", "20.000", "± 0.500", "2.9957 ± 0.0250", "", "before"),
        ("pruned", "25.000", "", "3.2189", "1.250", "1 min 10 s"),
    )


def test_one_window():
    title = perplexity_table("x", "all", 8, 1, [PerplexityRow("model", 2.0, None, 0.69, None, 1.0)]).title
    assert title.endswith("1 window of 8 tokens")
