"""Sequences put together for one pass, counted by hand."""

from __future__ import annotations

from stages.kernels import passes as module
from stages.kernels.passes import passes, rows_of_a_pass


def test_neighbours_share_a_pass_until_rows_or_tokens_are_used_up(monkeypatch) -> None:
    monkeypatch.setattr(module, "CPU_TOKENS", 20)
    lengths = [9, 5, 5, 4, 30]
    # 9 with 5 and 5 with 4 would be two passes as well, but one of 18 tokens
    assert passes([0, 1, 2, 3], lengths, rows=8, device_type="cpu") == [[0], [1, 2, 3]]
    assert passes([3, 2, 1, 0], lengths, rows=8, device_type="cpu") == [[3, 2, 1], [0]]
    assert passes([3, 2, 1, 0], lengths, rows=2, device_type="cpu") == [[3, 2], [1, 0]]
    assert passes([4, 3], lengths, rows=8, device_type="cpu") == [[4], [3]]  # longer than a pass, and yet it must go through
    assert passes([], lengths, rows=8, device_type="cpu") == []


def test_passes_are_even_as_far_as_their_number_allows(monkeypatch) -> None:
    monkeypatch.setattr(module, "CPU_TOKENS", 20)
    # two of 10 want 20 tokens, or a fourth pass
    assert passes(range(7), [10, 10, 5, 5, 5, 5, 5], rows=8, device_type="cpu") == [[0, 1], [2, 3, 4, 5], [6]]
    assert passes(range(7), [5] * 7, rows=8, device_type="cpu") == [[0, 1, 2, 3], [4, 5, 6]]
    assert passes(range(6), [5] * 6, rows=8, device_type="cpu") == [[0, 1, 2], [3, 4, 5]]
    assert passes(range(4), [7] * 4, rows=3, device_type="cuda") == [[0, 1], [2, 3]]
    assert passes([0, 1], [30, 40], rows=8, device_type="cpu") == [[0], [1]]


def test_a_gpu_takes_all_the_rows_that_are_allowed() -> None:
    assert passes(range(5), [10_000] * 5, rows=3, device_type="cuda") == [[0, 1, 2], [3, 4]]


def test_rows_of_one_length() -> None:
    assert rows_of_a_pass(16, 80, device_type="cpu") == 10  # 800 tokens
    assert rows_of_a_pass(16, 81, device_type="cpu") == 9
    assert rows_of_a_pass(4, 80, device_type="cpu") == 4
    assert rows_of_a_pass(16, 5_000, device_type="cpu") == 1
    assert rows_of_a_pass(16, 5_000, device_type="cuda") == 16
