from __future__ import annotations

from nmprune.calibration import Text


def test_documents_are_joined_by_a_blank_line():
    assert Text("a", "b", ("one", "two")).joined == "one\n\ntwo"


def test_label_says_data_set_and_split():
    assert Text("wikitext2", "test", ("x",)).label == "wikitext2 (test)"
