"""The size of passes: rows on a CPU, tokens on a GPU (simulated), and what happens when memory runs out."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from stages.errors import MemoryExhausted
from stages.models.passes import budget as module
from stages.models.passes.budget import PassBudget, PassTooLarge, each_group, memory_of_passes, refuse_alone
from stages.process.console import announcing
from stages.process.gpus import Peak
from stages.sampling import workspace

MIB = 2**20


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """A GPU on which a pass takes ``each`` bytes a token, and ``fixed`` more; the test sets ``tokens`` of the pass before it."""
    state = {"each": MIB, "fixed": 0, "tokens": 0}

    @contextmanager
    def own_peak() -> Iterator[Peak]:
        yield Peak(total=state["fixed"] + state["each"] * state["tokens"])

    monkeypatch.setattr(module, "own_peak", own_peak)
    return state


def run(budget: PassBudget, gpu: dict[str, int], tokens: int, fixed: int = 0) -> None:
    gpu["tokens"], gpu["fixed"] = tokens, fixed
    with budget.one_pass(4, tokens):
        pass


def test_on_a_cpu_auto_is_a_number_of_rows() -> None:
    auto, number = (PassBudget("update", "cpu", size, rows=3, trains=True) for size in ("auto", 5))
    assert auto.groups(range(7), [10] * 7) == [[0, 1, 2], [3, 4, 5], [6]]
    assert [len(group) for group in number.groups(range(7), [10] * 7)] == [4, 3]  # two passes of 5 at most, as even as can be
    assert number.groups(range(2), [500, 500]) == [[0], [1]]  # 800 tokens
    assert (auto.rows_for(7, 10), auto.rows_for(2, 10), number.rows_for(7, 300)) == (3, 3, 2)
    auto.settle(0, free=lambda: 0)
    assert auto.tokens == float("inf")


def test_on_a_gpu_a_number_is_a_number_of_rows_of_any_length() -> None:
    budget = PassBudget("update", "cuda", 2, rows=16, trains=True)
    assert budget.groups(range(4), [9_000] * 4) == [[0, 1], [2, 3]] and not budget.measures


def test_on_a_gpu_auto_begins_small_and_then_fills_the_free_memory(gpu, caplog) -> None:
    caplog.set_level(logging.INFO)
    budget = PassBudget("update", "cuda", "auto", rows=16, trains=True)
    # At most 8 of 256 tokens: 2,048. The last of the three passes is divided again.
    assert [len(group) for group in budget.groups(range(20), [256] * 20)] == [7, 7, 3, 3]
    assert [len(group) for group in budget.groups(range(20), [256] * 20, packed=True)] == [7, 7, 3, 3]
    assert [len(group) for group in budget.groups(range(16), [256] * 16)] == [8, 8]  # the second pass is needed at full size
    run(budget, gpu, 2_000, fixed=9_000 * MIB)  # the gradients, which stay
    run(budget, gpu, 1_500)
    run(budget, gpu, 2_000)
    said: list[str] = []
    with announcing(said.append):
        budget.settle(3_000 * MIB, free=lambda: 13_000 * MIB)  # the optimizer moments do not exist yet
    assert budget.tokens == 8 * 1024  # 0.85 * 10,000 = 8,500 tokens of a MiB, rounded down to a multiple of 1,024
    assert budget.rows is None and budget.largest == 2_000
    assert said == ["update: up to 8192 tokens in a pass (1024.0 KiB each and 0 MiB per pass, 9.8 GiB free)"] and said[0] in caplog.text
    run(budget, gpu, 8_000)
    budget.settle(0, free=lambda: 10**15)
    assert budget.tokens == 8 * 1024  # only once in a run


def test_memory_that_every_pass_takes_does_not_count_per_token(gpu) -> None:
    budget = PassBudget("update", "cuda", "auto", rows=16, trains=True)
    run(budget, gpu, 2_000, fixed=9_000 * MIB)
    for tokens in (2_000, 2_000, 1_000, 900):
        run(budget, gpu, tokens, fixed=2_500 * MIB)
    budget.settle(0, free=lambda: 20_000 * MIB)
    # 0.85 * 20,000 - 2,500 = 14,500 tokens of a MiB. As memory of 900 tokens, 3,400 MiB would be 3.8 MiB each: 4,500 tokens.
    assert budget.tokens == 14 * 1024


def test_memory_per_token_and_per_pass_follow_from_two_passes() -> None:
    assert memory_of_passes([(1_000, 4_000)]) == (4.0, 0.0)
    assert memory_of_passes([(1_000, 4_000), (750, 3_750)]) == (5.0, 0.0)  # too similar to tell
    assert memory_of_passes([(1_000, 4_000), (500, 3_000)]) == (2.0, 2_000.0)
    assert memory_of_passes([(1_000, 3_000), (500, 3_000)]) == (1.5, 2_250.0)  # a quarter of 6 per token: 500 * 1.5 + 2,250 = 3,000
    assert memory_of_passes([(1_000, 2_000), (500, 900)]) == (2.0, 0.0)  # a steeper line than through 0


def test_a_resumed_run_has_the_passes_of_the_checkpoint(gpu) -> None:
    budget = PassBudget("update", "cuda", "auto", rows=16, trains=True)
    assert budget.settled is None  # nothing was measured yet
    budget.resume(5_120)
    assert budget.groups([0, 1], [5_000, 200]) == [[0], [1]] and not budget.measures and budget.settled == 5_120
    by_rows = PassBudget("update", "cuda", 4, rows=16, trains=True)
    by_rows.resume(5_120)
    assert by_rows.settled is None and by_rows.groups([0, 1], [5_000, 200]) == [[0, 1]]


@pytest.mark.parametrize(("free", "tokens"), [(10**15, 32_768), (0, 1_024)])
def test_budget_has_an_upper_and_a_lower_bound(gpu, free: int, tokens: int) -> None:
    budget = PassBudget("update", "cuda", "auto", rows=16, trains=True)
    run(budget, gpu, 2_000)  # a single pass: its gradients are counted as memory of its tokens
    budget.settle(0, free=lambda: free)
    assert budget.tokens == tokens


def test_processes_agree_on_the_smallest(gpu) -> None:
    budget = PassBudget("update", "cuda", "auto", rows=16, trains=True)
    run(budget, gpu, 2_000)
    budget.settle(0, free=lambda: 10**15, agree=lambda tokens: min(tokens, 5_000))
    assert budget.tokens == 5_000


def test_without_a_backward_pass_nothing_is_measured() -> None:
    budget = PassBudget("scoring", "cuda", "auto", rows=16, trains=False)
    assert budget.tokens == 32_768 and not budget.measures


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("x"), MemoryError()])
def test_each_row_is_computed_once_even_if_memory_runs_out_repeatedly(error: Exception, caplog) -> None:
    done: list[int] = []
    sizes: list[int] = []

    def work(rows: list[int]) -> None:
        sizes.append(len(rows))
        if len(rows) > 3 or (7 in rows and len(rows) > 1):
            raise error
        done.extend(rows)

    budget = PassBudget("scoring", "cpu", 8, rows=8, trains=False)
    budget.each(range(12), [10] * 12, work)
    assert done == list(range(12))
    assert sizes == [6, 3, 3, 3, 1, 1, 1, 1, 1, 1] and budget.retreats == 2  # 60 tokens fail, then 30, then 10 fit
    assert sum("memory ran out" in record.message for record in caplog.records) == 1


def test_other_errors_and_single_rows_are_not_retried() -> None:
    budget = PassBudget("scoring", "cpu", 8, rows=8, trains=False, advice="Cut the texts")

    def wrong(rows: list[int]) -> None:
        raise RuntimeError("shapes do not match")

    def too_long(rows: list[int]) -> None:
        raise torch.OutOfMemoryError("x")

    with pytest.raises(RuntimeError, match="shapes"):
        budget.each(range(2), [10] * 2, wrong)
    assert budget.retreats == 0
    said = r"scoring: memory ran out in a pass over one sequence of 10 tokens, which cannot be divided\. Cut the texts"
    with pytest.raises(MemoryExhausted, match=said):
        budget.each(range(2), [10] * 2, too_long)
    assert budget.retreats == 1


def test_one_row_fits_after_the_decoding_workspace_is_freed(monkeypatch, caplog) -> None:
    done: list[int] = []
    sizes: list[int] = []

    def work(rows: list[int]) -> None:
        if workspace._kept is not None:
            raise torch.OutOfMemoryError("x")
        sizes.append(len(rows))
        done.extend(rows)

    model, budget = torch.nn.Linear(1, 1), PassBudget("update", "cpu", 1, rows=1, trains=True)
    for _ in range(2):  # a later call of ``generate`` keeps a workspace again
        monkeypatch.setattr(workspace, "_kept", object())
        budget.each(range(2), [10] * 2, work)
        monkeypatch.setattr(workspace, "_kept", object())
        each_group("scoring", [[2], [3, 4]], work, known_by=model)
    assert done == [0, 1, 2, 3, 4] * 2 and sizes[-1] == 2 and not budget.retreats
    assert [message.partition(":")[0] for message in caplog.messages] == ["update", "scoring"]  # once each


def test_groups_are_halved_and_every_row_is_computed_once(caplog) -> None:
    done: list[int] = []
    sizes: list[int] = []

    def work(rows) -> None:
        sizes.append(len(rows))
        if len(rows) > 2:
            raise torch.OutOfMemoryError("x")
        done.extend(rows)

    each_group("scoring", [range(5), [5, 6, 7]], work)
    assert done == list(range(8)) and sizes == [5, 3, 2, 1, 2, 2, 1]
    assert [record.message.partition(":")[0] for record in caplog.records] == ["scoring"]
    with pytest.raises(MemoryExhausted, match=r"scoring: memory ran out in a pass over one sequence, which .*divided\. Use shorter texts"):
        each_group("scoring", [[0]], lambda rows: (_ for _ in ()).throw(torch.OutOfMemoryError("x")))


def test_later_calls_with_the_same_model_begin_with_the_smaller_size(caplog) -> None:
    sizes: list[int] = []

    def work(rows) -> None:
        sizes.append(len(rows))
        if len(rows) > 2:
            raise torch.OutOfMemoryError("x")

    model, other = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    for what, of in (("scoring", model), ("scoring", model), ("likelihood", model), ("scoring", other)):
        each_group(what, [range(4)], work, known_by=of)
    assert sizes == [4, 2, 2] + [2, 2] + [4, 2, 2] * 2
    assert len(caplog.messages) == 3


def test_out_of_memory_with_sharded_weights_gives_a_message_and_other_errors_propagate() -> None:
    with pytest.raises(PassTooLarge, match="scoring: memory ran out in a pass that takes all processes.* Use shorter texts"):
        refuse_alone(torch.OutOfMemoryError("CUDA out of memory"), "scoring", "Use shorter texts")
    refuse_alone(RuntimeError("shapes differ"), "scoring")
