"""Intervals, calibration and F1 against published or hand-worked numbers."""

import pytest
import torch

from stages.stats.classification import calibration_bins, confusion_matrix, expected_calibration_error, f1_scores


@pytest.mark.detail("R17")
def test_calibration_by_hand() -> None:
    confidence = torch.tensor([0.95, 0.95, 0.65, 0.65])
    correct = torch.tensor([True, True, True, False])
    bins = calibration_bins(confidence, correct)
    assert [item["count"] for item in bins] == [2, 2]
    # 2/4 * |0.65 - 0.5| + 2/4 * |0.95 - 1|
    assert expected_calibration_error(confidence, correct) == pytest.approx(0.1)
    assert calibration_bins(torch.tensor([1.0]), torch.tensor([True]))[0]["confidence"] == 1.0


def test_confusion_and_f1_by_hand() -> None:
    truth, predicted = torch.tensor([0, 0, 0, 1, 1]), torch.tensor([0, 0, 1, 1, 0])
    confusion = confusion_matrix(truth, predicted, 3)
    assert confusion == [[2, 1, 0], [1, 1, 0], [0, 0, 0]]
    # class 0: 2*2 / (4 + 1 + 1); class 1: 2 / (2 + 1 + 1); class 2 never occurs
    assert f1_scores(confusion) == pytest.approx([2 / 3, 0.5, 0.0])
