import pytest

from nmprune.errors import InputError
from nmprune.pattern import MAX_GROUP, Pattern


@pytest.mark.parametrize(
    ("text", "kept", "group"), [("2:4", 2, 4), ("1:4", 1, 4), (" 8 : 16 ", 8, 16), ("31:32", 31, 32)]
)
def test_parse_reads_n_kept_of_m(text, kept, group):
    pattern = Pattern.parse(text)
    assert (pattern.kept, pattern.group) == (kept, group)
    assert str(pattern) == f"{kept}:{group}"
    assert Pattern.parse(str(pattern)) == pattern


@pytest.mark.parametrize(
    "text", ["", "2", "2:", ":4", "2/4", "2:4:8", "-2:4", "2.0:4", "two:four", "2:4x", "9" * 5000 + ":4"]
)
def test_text_that_is_not_a_pattern(text):
    with pytest.raises(InputError, match="not of the form N:M, such as 2:4"):
        Pattern.parse(text)


@pytest.mark.parametrize(("kept", "group"), [(0, 4), (4, 4), (5, 4), (-1, 4), (1, 1), (1, MAX_GROUP + 1)])
def test_impossible_patterns(kept, group):
    with pytest.raises(InputError, match=f"pattern {kept}:{group} is not possible"):
        Pattern(kept, group)


def test_numbers_and_words():
    pattern = Pattern(1, 4)
    assert pattern.words == "1 kept of 4"
    assert (pattern.density, pattern.sparsity, pattern.n_candidates) == (0.25, 0.75, 4)
    assert Pattern(8, 16).n_candidates == 12_870


def test_a_pattern_cannot_change_and_can_be_a_key():
    pattern = Pattern(2, 4)
    with pytest.raises(AttributeError):
        pattern.kept = 3  # type: ignore[misc]
    assert {pattern: 1}[Pattern(2, 4)] == 1


def test_check_divides():
    Pattern(2, 4).check_divides(172)
    with pytest.raises(InputError) as error:
        Pattern(2, 4).check_divides(1022)
    assert "in_features 1022 is not a multiple of 4, the group of pattern 2:4" in str(error.value)
    assert "such as 1:2" in str(error.value) and "--exclude" in str(error.value)
    with pytest.raises(InputError) as error:
        Pattern(4, 8).check_divides(172)
    assert "such as 2:4" in str(error.value)
    with pytest.raises(InputError) as error:
        Pattern(2, 4).check_divides(7)
    assert "choose a group" not in str(error.value)
