"""Statistics of an evaluation: intervals, win rates, agreement, calibration. Needs torch alone."""
