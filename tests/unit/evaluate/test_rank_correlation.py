import pytest

from nmprune.evaluate.rank_correlation import spearman


def test_known_answers():
    assert spearman([1, 2, 3, 4], [10, 20, 30, 40]) == pytest.approx(1)
    assert spearman([1, 2, 3, 4], [1, 1 / 2, 1 / 3, 1 / 4]) == pytest.approx(-1)
    # the textbook formula 1 - 6 sum d^2 / (n (n^2 - 1)), where there are no ties: d = 0, 1, 1, 1, 1
    assert spearman([1, 2, 3, 4, 5], [5, 7, 6, 9, 8]) == pytest.approx(1 - 6 * 4 / (5 * 24))
    # ties share their mean rank: ranks 0, 1.5, 1.5, 3 against 0, 1, 2, 3
    assert spearman([1, 2, 2, 3], [1, 2, 3, 4]) == pytest.approx(4.5 / (4.5 * 5) ** 0.5)


def test_only_the_order_counts():
    first, second = [0.3, -1.0, 2.0, 0.9, 5.0], [4.0, 9.0, 1.0, 3.0, 2.0]
    assert spearman(first, second) == pytest.approx(spearman([x**3 for x in first], [y * 7 - 2 for y in second]))
    assert spearman(first, second) == spearman(second, first)


def test_without_an_order():
    assert spearman([1, 2], [2, 1]) is None
    assert spearman([], []) is None
    assert spearman([1, 1, 1], [1, 2, 3]) is None
    with pytest.raises(ValueError, match="2 and 3"):
        spearman([1, 2], [1, 2, 3])
    with pytest.raises(ValueError, match="not finite"):
        spearman([1, 2, float("inf")], [1, 2, 3])
