"""Rows, steps and forward passes: every row occurs once in an epoch, and steps do not depend on the number of processes."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.training.batching import BatchPlan, make_loader


def test_one_step_by_hand() -> None:
    plan = BatchPlan(num_rows=10, batch_size=10, microbatch_size=2, process_index=1, num_processes=3)
    # rows 1, 4, 7 of the step are this process's; process 0 has four, in two passes of two, so all make two passes
    assert plan.microbatches([10, 11, 12, 13, 14, 15, 16, 17, 18, 19]) == [[11], [14, 17]]
    assert BatchPlan(10, 10, 2, process_index=0, num_processes=3).microbatches(range(10)) == [[0, 3], [6, 9]]


def test_process_without_rows_still_runs_its_forward_pass() -> None:
    plans = [BatchPlan(num_rows=5, batch_size=4, microbatch_size=2, process_index=index, num_processes=2) for index in range(2)]
    last = plans[0].steps(0)[-1]
    assert [plan.microbatches(last) for plan in plans] == [[last], [[]]]


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    rows=st.integers(1, 60),
    batch=st.integers(1, 20),
    micro=st.integers(1, 8),
    processes=st.integers(1, 5),
    epoch=st.integers(0, 3),
    grouped=st.booleans(),
    grouped_steps=st.booleans(),
)
def test_processes_share_the_rows_of_every_step(
    rows: int, batch: int, micro: int, processes: int, epoch: int, grouped: bool, grouped_steps: bool
) -> None:
    lengths = [row % 7 for row in range(rows)] if grouped else None
    plans = [BatchPlan(rows, batch, micro, 3, index, processes, lengths, grouped_steps) for index in range(processes)]
    steps = plans[0].steps(epoch)
    assert sorted(row for step in steps for row in step) == list(range(rows))
    assert all(plan.steps(epoch) == steps for plan in plans)
    for step in steps:
        microbatches = [plan.microbatches(step) for plan in plans]
        assert len({len(own) for own in microbatches}) == 1
        assert sorted(row for own in microbatches for chunk in own for row in chunk) == sorted(step)
        assert max(len(chunk) for own in microbatches for chunk in own) <= micro
    assert len(plans[0]) == sum(len(plans[0].microbatches(step)) for step in steps)


def test_epochs_and_seeds_shuffle_differently() -> None:
    orders = {str(BatchPlan(50, 5, 5, seed).steps(epoch)) for seed in (1, 2) for epoch in (0, 1)}
    assert len(orders) == 4


def test_rows_of_similar_length_share_a_step() -> None:
    lengths = [row % 10 for row in range(100)]
    steps = BatchPlan(100, 10, 10, lengths=lengths, groups_steps=True).steps(0)
    assert [lengths[row] for row in steps[0]] == [9] * 10  # the longest first, so that a lack of memory shows immediately
    assert all(max(lengths[row] for row in step) == min(lengths[row] for row in step) for step in steps)


def test_rows_of_similar_length_share_a_pass_in_every_process() -> None:
    lengths = [5, 90, 7, 80, 60, 6, 70, 8]
    plans = [BatchPlan(8, 8, 2, process_index=index, num_processes=2, lengths=lengths) for index in range(2)]
    step = plans[0].steps(0)[0]
    assert step == BatchPlan(8, 8, 2).steps(0)[0]  # the rows of a step do not depend on lengths
    microbatches = [[[lengths[row] for row in own] for own in plan.microbatches(step)] for plan in plans]
    assert microbatches == [[[90, 70], [8, 6]], [[80, 60], [7, 5]]]


@pytest.mark.parametrize("process", [0, 1])
def test_loader_follows_the_plan_and_adds_uncounted_passes(process: int) -> None:
    plan = BatchPlan(num_rows=5, batch_size=4, microbatch_size=1, process_index=process, num_processes=2)
    loader = make_loader([f"row {index}" for index in range(5)], lambda rows: rows, lambda rows: ["nothing"], plan)
    loader.set_epoch(2)
    expected = [[f"row {row}" for row in chunk] or ["nothing"] for step in plan.steps(2) for chunk in plan.microbatches(step)]
    assert list(loader) == expected and len(loader) == 3
    assert (expected[-1] == ["nothing"]) == (process == 1)
