"""Agreement of raters on published examples."""

from __future__ import annotations

import math

import pytest

from stages.numerics.agreement import cohens_kappa, fleiss_kappa, krippendorff_alpha, pair_agreement


def test_cohens_kappa() -> None:
    # 20 both yes, 5 yes/no, 10 no/yes, 15 both no: observed 35/50, expected 25*30/2500 + 25*20/2500 = 0.5, kappa 0.4
    pairs = [("yes", "yes")] * 20 + [("yes", "no")] * 5 + [("no", "yes")] * 10 + [("no", "no")] * 15
    assert cohens_kappa(*zip(*pairs, strict=True)) == pytest.approx(0.4)
    assert cohens_kappa([1, 0, 1, None], [1, 0, 1, 0]) == 1
    assert cohens_kappa([1, 1], [1, 1]) == 1  # nothing to disagree on
    assert math.isnan(cohens_kappa([1, None], [None, 1]))


def test_fleiss_kappa() -> None:
    # Fleiss 1971 as worked through in many textbooks: 10 subjects, 14 raters, 5 categories; kappa 0.210
    counts = [
        (0, 0, 0, 0, 14), (0, 2, 6, 4, 2), (0, 0, 3, 5, 6), (0, 3, 9, 2, 0), (2, 2, 8, 1, 1),
        (7, 7, 0, 0, 0), (3, 2, 6, 3, 0), (2, 5, 3, 2, 2), (6, 5, 2, 1, 0), (0, 2, 2, 3, 7),
    ]  # fmt: skip
    units = [[category for category, count in enumerate(row) for _ in range(count)] for row in counts]
    assert fleiss_kappa(units) == pytest.approx(0.2099, abs=1e-4)
    with pytest.raises(ValueError, match="same number of ratings"):
        fleiss_kappa([[1, 2], [1, 2, 3]])


def test_krippendorff_alpha() -> None:
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


def test_pair_agreement() -> None:
    # unit 1: 1 of 3 pairs; unit 2: 1 of 1; unit 3 has one rating
    assert pair_agreement([[1, 1, 2], [0, 0, None], [1]]) == pytest.approx(2 / 4)
    assert math.isnan(pair_agreement([[1]]))
