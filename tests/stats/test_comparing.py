"""Win rates, with and without control for length, and text variety: by hand and by simulation."""

from __future__ import annotations

import math
from dataclasses import fields
from random import Random

import pytest

from stages.run_summary import LengthControlledRate, WinRateNumbers
from stages.stats.comparing import (
    LengthControlled,
    WinRateEstimate,
    distinct_ngrams,
    length_controlled_win_rate,
    preferences,
    prompt_means,
    repeated_ngrams,
    win_rate,
)


def test_a_tie_is_half_a_win() -> None:
    assert preferences([1.0, 2.0, 3.0, 4.0], [0.0, 2.0, 4.0, 0.0]) == [1.0, 0.5, 0.0, 1.0]
    rate = win_rate([1.0, 0.5, 0.0, 1.0])
    assert (rate.wins, rate.ties, rate.n, rate.samples, rate.win_rate) == (2, 1, 4, 4, 0.625)
    other = win_rate([0.0, 0.5, 1.0, 0.0])
    assert (other.win_rate, other.ci_low) == (pytest.approx(0.375), pytest.approx(1 - rate.ci_high))
    with pytest.raises(ValueError, match="paired, got 1 and 2"):
        preferences([1.0], [1.0, 2.0])


def test_the_interval_is_wilsons_without_ties() -> None:
    rate = win_rate([1.0] * 81 + [0.0] * 182)
    assert (round(rate.ci_low, 4), round(rate.ci_high, 4)) == (0.2553, 0.3662)  # Newcombe 1998, table I
    assert rate.bootstrap_low == pytest.approx(0.2553, abs=0.01) and rate.bootstrap_high == pytest.approx(0.3662, abs=0.01)


def test_a_prompt_counts_once() -> None:
    # ten prompts with four samples, two won and two lost each: the prompts agree, so the interval is narrower than ten coins'
    rate = win_rate([1.0, 1.0, 0.0, 0.0] * 10, [index // 4 for index in range(40)])
    assert (rate.n, rate.samples, rate.wins, rate.win_rate) == (10, 40, 20, 0.5)
    assert 0.2366 < rate.ci_low < 0.5  # Wilson at 5 of 10: 0.2366
    # a prompt with three samples has the same weight as one with a single sample
    assert win_rate([1.0, 1.0, 1.0, 0.0], ["a", "a", "a", "b"]).win_rate == 0.5
    assert prompt_means([1.0, 0.0, 1.0], ["b", "a", "b"]) == [1.0, 0.0]


def test_no_comparisons_give_no_win_rate() -> None:
    rate = win_rate([])
    assert (rate.win_rate, rate.ci_low, rate.ci_high, rate.n) == (0.5, 0.0, 1.0, 0)


def logistic(odds: float) -> float:
    return 1 / (1 + math.exp(-odds))


def draw(random: Random, prompts: int, skill: float, effect: float, bias: float) -> tuple[list[float], list[float]]:
    """Preferences of a judge with log odds skill + effect * tanh(difference / spread); answers are ``bias`` longer on average."""
    lengths = [random.gauss(bias, 40.0) for _ in range(prompts)]
    mean = sum(lengths) / prompts
    spread = math.sqrt(sum((length - mean) ** 2 for length in lengths) / prompts)
    return [float(random.random() < logistic(skill + effect * math.tanh(length / spread))) for length in lengths], lengths


def test_length_control_removes_the_preference_for_long_answers() -> None:
    random = Random(0)
    won, longer = draw(random, 6000, skill=0.0, effect=2.0, bias=30.0)
    assert win_rate(won).win_rate > 0.62  # longer answers win
    controlled = length_controlled_win_rate(won, longer)
    assert controlled.win_rate == pytest.approx(0.5, abs=0.025) and controlled.length_effect == pytest.approx(2.0, abs=0.2)
    assert controlled.ci_low < 0.5 < controlled.ci_high


def test_length_control_without_a_length_effect_changes_little() -> None:
    random = Random(1)
    won, longer = draw(random, 4000, skill=0.8, effect=0.0, bias=30.0)
    controlled = length_controlled_win_rate(won, longer)
    assert controlled.win_rate == pytest.approx(logistic(0.8), abs=0.03)
    same = length_controlled_win_rate(won, [0.0] * 4000)  # equal lengths: no length effect to control for
    assert same.win_rate == pytest.approx(win_rate(won).win_rate, abs=1e-4) and same.length_effect == 0


@pytest.mark.parametrize(("skill", "prompts"), [(0.0, 128), (1.0, 256)])
def test_length_controlled_interval_covers(skill: float, prompts: int) -> None:
    random, covered = Random(f"{skill} {prompts}"), 0
    for _ in range(600):
        won, longer = draw(random, prompts, skill=skill, effect=1.0, bias=20.0)
        rate = length_controlled_win_rate(won, longer)
        covered += rate.ci_low <= logistic(skill) <= rate.ci_high
    assert 0.93 <= covered / 600 <= 0.97


def test_length_controlled_is_finite_if_one_side_always_wins() -> None:
    rate = length_controlled_win_rate([1.0] * 50, [float(index) for index in range(50)])
    assert 0.95 < rate.win_rate < 1 and 0.9 < rate.ci_low < rate.ci_high <= 1


def test_distinct_ngrams_by_hand() -> None:
    rows = [["a", "b", "a", "b"], ["a", "b"]]
    assert distinct_ngrams(rows, 1) == pytest.approx(2 / 6)
    assert distinct_ngrams(rows, 2) == pytest.approx(2 / 4)  # ab, ba, ab | ab: no bigram spans two rows
    assert distinct_ngrams([["a"]], 2) == 0.0


def test_repeated_ngrams_by_hand() -> None:
    # abab: ab, ba, ab, one of which is repeated; ab: one, new in its row
    assert repeated_ngrams([["a", "b", "a", "b"], ["a", "b"]], 2) == pytest.approx(1 / 4)
    assert repeated_ngrams([[7] * 10], 4) == pytest.approx(6 / 7)
    assert repeated_ngrams([[1, 2]], 4) == 0.0


@pytest.mark.parametrize(("measured", "written"), [(WinRateEstimate, WinRateNumbers), (LengthControlled, LengthControlledRate)])
def test_fields_of_the_summary_are_those_that_are_measured(measured: type, written: type) -> None:
    assert list(written.__annotations__) == [item.name for item in fields(measured)]
