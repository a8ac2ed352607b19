from __future__ import annotations

import pytest

from nmprune.errors import InputError
from nmprune.pattern import Pattern
from nmprune.prepare.choices import check_density, density_of, n_kept, name_of, parse_choices


def test_a_set_is_sorted_from_sparse_to_dense_whatever_the_groups():
    found = parse_choices(["dense", " 3:4", "2:8", "1:4", "4:8"])
    assert [name_of(one) for one in found] == ["1:4", "2:8", "4:8", "3:4", "dense"]
    assert [density_of(one) for one in found] == [0.25, 0.25, 0.5, 0.75, 1.0]
    assert [n_kept(one, 64) for one in found] == [16, 16, 32, 48, 64]
    assert found[-1] is None


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (
            ["2:4"],
            "2:4 alone is not applicable: with one pattern there is nothing to allocate. Say --pattern 2:4, or name more",
        ),
        (["dense"], "dense alone is not applicable: .* Say --exclude"),
        (["2:4", "1:4", "2:4"], "2:4 is named more than once"),
        (["2:4", "danse"], "pattern 'danse' is not of the form N:M"),
        (["2:4", "4:4"], "pattern 4:4 is not possible"),
    ],
)
def test_what_makes_no_set(names, expected):
    with pytest.raises(InputError, match=expected):
        parse_choices(names)


@pytest.mark.parametrize("density", [0.1, 0.25, 0.75, 0.9])
def test_a_density_that_leaves_no_choice(density):
    choices = (Pattern(1, 4), Pattern(3, 4))
    with pytest.raises(InputError) as error:
        check_density(choices, density)
    assert str(error.value) == (
        f"density {density:g} leaves nothing to allocate: expected more than 0.25 (1:4 everywhere) and less than 0.75 (3:4 "
        "everywhere)."
    )
    check_density(choices, 0.26)
