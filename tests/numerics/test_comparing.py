"""Win rates and text variety by hand."""

import pytest

from stages.numerics.comparing import distinct_ngrams, repeated_ngrams, win_rate


def test_win_rate_counts_a_tie_as_half() -> None:
    rate = win_rate([1.0, 2.0, 3.0, 4.0], [0.0, 2.0, 4.0, 0.0])
    assert (rate.wins, rate.ties, rate.n, rate.win_rate) == (2, 1, 4, 0.625)
    other = win_rate([0.0, 2.0, 4.0, 0.0], [1.0, 2.0, 3.0, 4.0])
    assert (other.win_rate, other.ci_low) == (pytest.approx(0.375), pytest.approx(1 - rate.ci_high))


def test_win_rate_interval_is_wilsons() -> None:
    rate = win_rate([1.0] * 81 + [0.0] * 182, [0.5] * 263)
    assert (round(rate.ci_low, 4), round(rate.ci_high, 4)) == (0.2553, 0.3662)  # Newcombe 1998, table I


def test_samples_of_one_prompt_count_as_one() -> None:
    rate = win_rate([1.0, 1.0, 0.0, 0.0] * 10, [0.5] * 40, cluster_size=4)
    assert (rate.n, rate.wins, rate.win_rate) == (10, 20, 0.5)
    # Wilson at 5 of 10: 0.2366 to 0.7634
    assert (round(rate.ci_low, 4), round(rate.ci_high, 4)) == (0.2366, 0.7634)


def test_unpaired_scores_are_refused() -> None:
    with pytest.raises(ValueError, match="paired, got 1 and 2"):
        win_rate([1.0], [1.0, 2.0])


def test_distinct_ngrams() -> None:
    rows = [["a", "b", "a", "b"], ["a", "b"]]
    assert distinct_ngrams(rows, 1) == pytest.approx(2 / 6)
    assert distinct_ngrams(rows, 2) == pytest.approx(2 / 4)  # ab, ba, ab | ab: no bigram spans two rows
    assert distinct_ngrams([["a"]], 2) == 0.0


def test_repeated_ngrams() -> None:
    # abab: ab, ba, ab, of which one came before; ab: one, new in its own row
    assert repeated_ngrams([["a", "b", "a", "b"], ["a", "b"]], 2) == pytest.approx(1 / 4)
    assert repeated_ngrams([[7] * 10], 4) == pytest.approx(6 / 7)
    assert repeated_ngrams([[1, 2]], 4) == 0.0
