"""Log records of an attempt are shown once, and only if it succeeds."""

from __future__ import annotations

import logging

import pytest

from stages.process.logs import held_log, without_repeats

logger = logging.getLogger("stages.test_held_log")


def test_records_of_a_failed_attempt_are_dropped(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ValueError), held_log():
        logger.warning("three rows")
        raise ValueError
    logger.warning("four rows")
    assert caplog.messages == ["four rows"]


def test_records_of_a_successful_attempt_are_shown_at_its_end(caplog: pytest.LogCaptureFixture) -> None:
    with held_log():
        logger.warning("three rows")
        assert caplog.messages == []
    assert caplog.messages == ["three rows"]


def test_equal_messages_about_data_are_shown_once(caplog: pytest.LogCaptureFixture) -> None:
    data = logging.getLogger("stages.corpora.test_held_log")
    with without_repeats():
        with without_repeats(), held_log():
            data.warning("%d rows", 3)
        data.warning("3 rows")
        data.warning("4 rows")
    data.warning("3 rows")
    assert caplog.messages == ["3 rows", "4 rows", "3 rows"]


def test_other_equal_messages_are_shown_each_time(caplog: pytest.LogCaptureFixture) -> None:
    with without_repeats():
        for _ in range(2):
            logger.warning("trying again")
    assert caplog.messages == ["trying again"] * 2
