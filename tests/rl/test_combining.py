"""Ensembles by hand."""

import torch

from stages.rl.combining import combine_scores

SCORES = torch.tensor([[1.0, 2.0, 0.0], [3.0, 2.0, 0.0], [5.0, 2.0, 6.0]])


def test_mean_minimum_and_uncertainty_by_hand() -> None:
    assert combine_scores(SCORES, how="mean").tolist() == [3.0, 2.0, 2.0]
    assert combine_scores(SCORES, how="min").tolist() == [1.0, 2.0, 0.0]
    # variances (4 + 0 + 4) / 3, 0 and (4 + 4 + 16) / 3; halved and subtracted from the means
    torch.testing.assert_close(combine_scores(SCORES, how="uncertainty", uncertainty_coef=0.5), torch.tensor([3 - 4 / 3, 2.0, 2 - 4.0]))
    assert combine_scores(SCORES, how="uncertainty", uncertainty_coef=0.0).tolist() == [3.0, 2.0, 2.0]
