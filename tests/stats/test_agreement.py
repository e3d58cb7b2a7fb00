"""Agreement of raters on published examples."""

from __future__ import annotations

import math

import pytest

from stages.stats.agreement import cohens_kappa, fleiss_kappa, krippendorff_alpha, pair_agreement


def test_cohens_kappa_by_hand() -> None:
    # 20 both yes, 5 yes/no, 10 no/yes, 15 both no: observed 35/50, expected 25*30/2500 + 25*20/2500 = 0.5, kappa 0.4
    pairs = [("yes", "yes")] * 20 + [("yes", "no")] * 5 + [("no", "yes")] * 10 + [("no", "no")] * 15
    assert cohens_kappa(*zip(*pairs, strict=True)) == pytest.approx(0.4)
    assert cohens_kappa([1, 0, 1, None], [1, 0, 1, 0]) == 1
    assert cohens_kappa([1, 1], [1, 1]) == 1  # all ratings are equal, so there can be no disagreement
    assert math.isnan(cohens_kappa([1, None], [None, 1]))


def test_fleiss_kappa_of_the_published_example() -> None:
    # Fleiss 1971 as worked through in many textbooks: 10 subjects, 14 raters, 5 categories; kappa 0.210
    counts = [
        (0, 0, 0, 0, 14),
        (0, 2, 6, 4, 2),
        (0, 0, 3, 5, 6),
        (0, 3, 9, 2, 0),
        (2, 2, 8, 1, 1),
        (7, 7, 0, 0, 0),
        (3, 2, 6, 3, 0),
        (2, 5, 3, 2, 2),
        (6, 5, 2, 1, 0),
        (0, 2, 2, 3, 7),
    ]
    units = [[category for category, count in enumerate(row) for _ in range(count)] for row in counts]
    assert fleiss_kappa(units) == pytest.approx(0.2099, abs=1e-4)
    with pytest.raises(ValueError, match="same number of ratings"):
        fleiss_kappa([[1, 2], [1, 2, 3]])


def test_krippendorff_alpha_of_the_published_nominal_example() -> None:
    # Krippendorff 2011, three coders, missing ratings; alpha for nominal data 0.691
    x = None
    coders = [
        [x, x, x, x, x, 3, 4, 1, 2, 1, 1, 3, 3, x, 3],
        [1, x, 2, 1, 3, 3, 4, 3, x, x, x, x, x, x, x],
        [x, x, 2, 1, 3, 4, 4, x, 2, 1, 1, 3, 3, x, 4],
    ]
    units = list(zip(*coders, strict=True))
    assert krippendorff_alpha(units) == pytest.approx(0.691, abs=5e-4)
    assert krippendorff_alpha([[1, 1], [1, 1]]) == 1
    assert math.isnan(krippendorff_alpha([[1, None], [2]]))


@pytest.mark.parametrize(("level", "alpha"), [("nominal", 0.743), ("ordinal", 0.815), ("interval", 0.849)])
def test_krippendorff_alpha_of_the_published_levels(level, alpha) -> None:
    # Krippendorff 2011, section D: four observers, twelve units, missing ratings; the three values are the paper's
    x = None
    observers = [
        [1, 2, 3, 3, 2, 1, 4, 1, 2, x, x, x],
        [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, x, 3],
        [x, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, x],
        [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, x],
    ]
    assert krippendorff_alpha(list(zip(*observers, strict=True)), level) == pytest.approx(alpha, abs=5e-4)


def test_ordinal_alpha_by_hand() -> None:
    # Ratings 1 1 | 1 2 | 3 3: counts 1: 3, 2: 1, 3: 2; middles 1.5, 3.5, 5; squared distances 12: 4, 13: 12.25, 23: 2.25
    # observed: one unit with 1 and 2, both orders: 8; expected: 2 * (3*1*4 + 3*2*12.25 + 1*2*2.25) / 5 = 2 * 90 / 5 = 36
    assert krippendorff_alpha([[1, 1], [1, 2], [3, 3]], "ordinal") == pytest.approx(1 - 8 / 36)


def test_pair_agreement_by_hand() -> None:
    # unit 1: 1 of 3 pairs; unit 2: 1 of 1; unit 3 has one rating
    assert pair_agreement([[1, 1, 2], [0, 0, None], [1]]) == pytest.approx(2 / 4)
    assert math.isnan(pair_agreement([[1]]))
