"""Means over runs: Student's interval against published quantiles and by hand."""

from __future__ import annotations

import math
from statistics import NormalDist

import pytest

from stages.stats.replicates import mean_interval, normal_equivalent, student_probability, student_quantile


@pytest.mark.parametrize(
    ("freedom", "point"),
    # The 97.5 % points as printed in every table of Student's t (Abramowitz and Stegun, table 26.10).
    [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (5, 2.571), (9, 2.262), (10, 2.228), (29, 2.045), (30, 2.042), (120, 1.980)],
)
def test_quantiles_are_those_of_the_table(freedom: int, point: float) -> None:
    assert student_quantile(0.975, freedom) == pytest.approx(point, abs=5e-4)


def test_one_degree_of_freedom_is_cauchys_distribution() -> None:
    for point in (-3.0, 0.0, 0.5, 20.0):
        assert student_probability(point, 1) == pytest.approx(0.5 + math.atan(point) / math.pi)


@pytest.mark.parametrize(("freedom", "point"), [(6, 5.959), (10, 4.587), (18, 3.922), (60, 3.460)])
def test_normal_equivalent_of_the_table(freedom: int, point: float) -> None:
    # Points with the tail 0.0005 from a table of Student's t; the normal distribution has it beyond 3.2905.
    assert normal_equivalent(point, freedom) == pytest.approx(3.2905, rel=0.01)
    assert normal_equivalent(-point, freedom) == 0


@pytest.mark.parametrize("freedom", [10, 20, 100])
def test_normal_equivalent_far_in_the_tail(freedom: int) -> None:
    tail = 1e-7
    assert normal_equivalent(student_quantile(1 - tail, freedom), freedom) == pytest.approx(-NormalDist().inv_cdf(tail), rel=0.006)


def test_interval_by_hand() -> None:
    # mean 2, deviations -1, 0, 1: variance 1; half width 4.3027 * sqrt(1 / 3) = 2.4841
    mean, low, high = mean_interval([1.0, 2.0, 3.0])
    assert (mean, low, high) == pytest.approx((2.0, 2 - 2.4841, 2 + 2.4841), abs=1e-4)


def test_one_run_has_no_interval() -> None:
    mean, low, high = mean_interval([0.7])
    assert mean == 0.7 and math.isnan(low) and math.isnan(high)


def test_no_degrees_of_freedom_are_refused() -> None:
    with pytest.raises(ValueError, match="freedom >= 1"):
        student_quantile(0.975, 0)
