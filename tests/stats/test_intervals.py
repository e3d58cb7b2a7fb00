"""Intervals by hand, by published examples, and by simulation: 95 % intervals cover the true value in 93 % to 97 % of the cases."""

from __future__ import annotations

import math
from random import Random

import pytest

from stages.stats.intervals import (
    bootstrap_interval,
    design_effect,
    prompts_needed,
    share_interval,
    share_variance,
    wilson_interval,
)


def test_wilson_interval_of_a_published_example() -> None:
    # Newcombe 1998, "Two-sided confidence intervals for the single proportion", table I: 81 of 263, 0 of 20
    low, high = wilson_interval(81, 263)
    assert (round(low, 4), round(high, 4)) == (0.2553, 0.3662)
    assert [round(x, 4) for x in wilson_interval(0, 20)] == [0.0, 0.1611]
    assert wilson_interval(0, 0) == (0.0, 1.0)


def test_wins_and_losses_give_wilsons_interval() -> None:
    values = [1.0] * 81 + [0.0] * 182
    assert design_effect(values) == pytest.approx(1)
    assert share_interval(values) == pytest.approx(wilson_interval(81, 263))


def test_ties_narrow_the_interval_but_not_to_a_point() -> None:
    # 20 ties and 20 coin flips, with one 0 and one 1: mean 1/2, variance 11 * (1/4) * 2 / 42; a coin has 1/4
    values = [0.5] * 20 + [1.0, 0.0] * 10
    assert share_variance(values) == pytest.approx(5.5 / 42)
    assert design_effect(values) == pytest.approx(22 / 42)
    assert share_interval(values) == pytest.approx(wilson_interval(0.5 * 40 * 42 / 22, 40 * 42 / 22))
    low, high = share_interval([0.5] * 100)
    # variance (2 * 1/4) / 102: 1.96 standard errors are 0.0137; a rule of three for a win rate says 1.5 / 100
    assert low == pytest.approx(0.5 - 0.0137, abs=2e-4) and high == pytest.approx(0.5 + 0.0137, abs=2e-4)
    assert share_interval([]) == (0.0, 1.0)


CASES = {  # share of wins and of ties
    "even": (0.5, 0.0),
    "clear": (0.75, 0.0),
    "near the edge": (0.9, 0.0),
    "some ties": (0.4, 0.2),
    "many ties": (0.25, 0.6),
    "hardly a loss": (0.6, 0.35),
}


@pytest.mark.parametrize("prompts", [64, 256])
@pytest.mark.parametrize("case", CASES)
def test_coverage_with_ties(case: str, prompts: int) -> None:
    wins, ties = CASES[case]
    truth, random = wins + ties / 2, Random(f"{case} {prompts}")
    covered = 0
    for _ in range(3000):
        # Counts are integers: for one number of prompts, the coverage of a correct interval may differ by 1 or 2 %, but not on average.
        number = random.randint(prompts * 3 // 4, prompts * 5 // 4)
        draws = random.choices((1.0, 0.5, 0.0), (wins, ties, 1 - wins - ties), k=number)
        low, high = share_interval(draws)
        covered += low <= truth <= high
    # with 3000 runs, the coverage of an exact interval is within 1.2 points (three standard errors) of 95 %
    assert 0.93 <= covered / 3000 <= 0.97


@pytest.mark.parametrize(("prompts", "samples"), [(64, 4), (256, 2)])
@pytest.mark.parametrize("even", [True, False])
def test_coverage_with_several_samples_per_prompt(prompts: int, samples: int, even: bool) -> None:
    # The win probability of a prompt is from Beta(2, 2) or Beta(4, 1.6), so samples of one prompt are correlated
    a, b = (2.0, 2.0) if even else (4.0, 1.6)
    truth, random = a / (a + b), Random(f"{prompts} {samples} {even}")
    covered = flat = 0
    for _ in range(2000):
        chances = [random.betavariate(a, b) for _ in range(prompts)]
        means = [sum(random.random() < chance for _ in range(samples)) / samples for chance in chances]
        low, high = share_interval(means)
        covered += low <= truth <= high
        low, high = wilson_interval(sum(means) * samples, prompts * samples)  # wrong: treats samples as independent prompts
        flat += low <= truth <= high
    assert 0.93 <= covered / 2000 <= 0.97
    assert flat < covered  # this interval is too narrow


def test_bootstrap_covers_the_difference_of_paired_scores() -> None:
    random = Random(3)
    covered = 0
    for run in range(1000):
        differences = [random.gauss(0.3, 1.0) for _ in range(80)]
        low, high = bootstrap_interval(differences, draws=400, seed=run)
        covered += low <= 0.3 <= high
    assert 0.93 <= covered / 1000 <= 0.97


def test_bootstrap_by_hand() -> None:
    assert bootstrap_interval([2.0] * 5) == (2.0, 2.0)
    assert all(math.isnan(end) for values in ([], [2.0]) for end in bootstrap_interval(values))
    # the mean of 400 coins is normal: 1/2 +- 1.96 * 0.5 / 20; 2000 draws put the ends within a few thousandths of it
    low, high = bootstrap_interval([0.0, 1.0] * 200)
    assert (low, high) == pytest.approx((0.451, 0.549), abs=0.006)
    assert bootstrap_interval([0.0, 1.0] * 200) == (low, high)


def test_number_of_prompts_gives_the_requested_power() -> None:
    # (1.96 + 0.8416)^2 = 7.849; 0.25 * 7.849 / 0.1^2 = 196.2
    assert prompts_needed(0.6, 0.25) == 197
    assert prompts_needed(0.4, 0.25) == 197
    assert prompts_needed(0.5, 0.25) == math.inf
    random, told = Random(1), 0
    for _ in range(2000):
        low, _ = share_interval([float(random.random() < 0.6) for _ in range(197)])
        told += low > 0.5
    assert told / 2000 == pytest.approx(0.8, abs=0.04)
