"""Batches within a token budget, counted by hand."""

from __future__ import annotations

from stages.kernels import token_budget as module
from stages.kernels.token_budget import rows_per_batch, token_budget_batches


def test_consecutive_sequences_share_a_batch_within_the_limits_of_rows_and_tokens(monkeypatch) -> None:
    monkeypatch.setattr(module, "CPU_TOKENS", 20)
    lengths = [9, 5, 5, 4, 30]
    # 9 with 5 and 5 with 4 would be two batches as well, but one of them with 18 tokens
    assert token_budget_batches([0, 1, 2, 3], lengths, rows=8, device_type="cpu") == [[0], [1, 2, 3]]
    assert token_budget_batches([3, 2, 1, 0], lengths, rows=8, device_type="cpu") == [[3, 2, 1], [0]]
    assert token_budget_batches([3, 2, 1, 0], lengths, rows=2, device_type="cpu") == [[3, 2], [1, 0]]
    assert token_budget_batches([4, 3], lengths, rows=8, device_type="cpu") == [
        [4],
        [3],
    ]  # 30 exceeds the budget
    assert token_budget_batches([], lengths, rows=8, device_type="cpu") == []


def test_batches_are_as_even_as_their_minimal_number_allows(monkeypatch) -> None:
    monkeypatch.setattr(module, "CPU_TOKENS", 20)
    # the two sequences of 10 tokens need a batch of 20 tokens, or a fourth batch
    assert token_budget_batches(range(7), [10, 10, 5, 5, 5, 5, 5], rows=8, device_type="cpu") == [[0, 1], [2, 3, 4, 5], [6]]
    assert token_budget_batches(range(7), [5] * 7, rows=8, device_type="cpu") == [[0, 1, 2, 3], [4, 5, 6]]
    assert token_budget_batches(range(6), [5] * 6, rows=8, device_type="cpu") == [[0, 1, 2], [3, 4, 5]]
    assert token_budget_batches(range(4), [7] * 4, rows=3, device_type="cuda") == [[0, 1], [2, 3]]
    assert token_budget_batches([0, 1], [30, 40], rows=8, device_type="cpu") == [[0], [1]]


def test_no_token_limit_on_a_gpu() -> None:
    assert token_budget_batches(range(5), [10_000] * 5, rows=3, device_type="cuda") == [[0, 1, 2], [3, 4]]


def test_rows_per_batch_for_sequences_of_equal_length() -> None:
    assert rows_per_batch(16, 80, device_type="cpu") == 10  # 800 tokens
    assert rows_per_batch(16, 81, device_type="cpu") == 9
    assert rows_per_batch(4, 80, device_type="cpu") == 4
    assert rows_per_batch(16, 5_000, device_type="cpu") == 1
    assert rows_per_batch(16, 5_000, device_type="cuda") == 16
