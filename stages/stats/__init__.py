"""Statistics of an evaluation: intervals, win rates, agreement, calibration. Depends only on torch."""
