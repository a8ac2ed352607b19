from __future__ import annotations

import pytest

from nmprune.calibration.columns import text_column
from nmprune.errors import InputError


@pytest.mark.parametrize(
    ("strings", "expected"),
    [(["title", "text", "content"], "text"), (["title", "content"], "content"), (["lyrics"], "lyrics")],
)
def test_found_by_name_or_because_it_is_the_only_one(strings, expected):
    assert text_column("t", None, ["id", *strings], strings) == expected


def test_a_named_column_is_taken():
    assert text_column("t", "title", ["title", "text"], ["title", "text"]) == "title"


def test_an_unknown_column_names_the_near_one():
    with pytest.raises(InputError, match=r"t: there is no column 'txt'\. Did you mean 'text'"):
        text_column("t", "txt", ["id", "text"], ["text"])


def test_a_named_column_must_hold_strings():
    with pytest.raises(InputError, match=r"column 'id' does not hold strings\. Columns of strings: text"):
        text_column("t", "id", ["id", "text"], ["text"])


def test_several_candidates_are_listed():
    with pytest.raises(InputError, match=r"a, b\. Name one after #, for example hf:x#a\. All columns: a, b, id\."):
        text_column("hf:x", None, ["id", "a", "b"], ["a", "b"])
    with pytest.raises(InputError, match="several columns could hold the text: body, content"):
        text_column("hf:x", None, ["content", "body"], ["content", "body"])


def test_no_column_of_strings():
    with pytest.raises(InputError, match=r"no column holds strings\. Columns: id"):
        text_column("t", None, ["id"], [])
