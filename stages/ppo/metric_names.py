"""Names of the metrics that a run's summary needs."""

from __future__ import annotations

FIRST_AND_LAST = ["rewards/score_mean", "policy/kl", "policy/entropy", "responses/length_mean", "responses/stopped_share"]
SUMMED_UP = frozenset([*FIRST_AND_LAST, "value/explained_variance", "time/episodes_per_second"])  # plus all monitors
