"""Sampling when memory runs out: the same completions with fewer sequences together, and one message if a single one does not fit."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import pytest
import torch

from stages.config import GenerationSettings
from stages.errors import MemoryExhausted
from stages.models.loading import load_language_model
from stages.sampling import generation, retreats
from stages.sampling.generation import Finished, generate

PROMPTS = [[10, 11, 12], [20], [30, 31, 32, 33], [40, 41], [50, 51], [60], [70, 71, 72], [80]]
STOPS = tuple(range(100, 130))  # a tenth of the tokens: completions have many lengths


@pytest.fixture(scope="module")
def model(tiny_llama_folder) -> Any:
    return load_language_model(str(tiny_llama_folder), dtype=torch.float32, trainable=False)


@pytest.fixture(autouse=True)
def no_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retreats, "_limits", WeakKeyDictionary())


def sample(model: Any, finished: list[Finished] | None = None, **settings: Any) -> list[list[int]]:
    chosen = GenerationSettings(**{"max_new_tokens": 20, "batch_size": 4, **settings})
    report = None if finished is None else finished.extend
    made = generate(model, PROMPTS, chosen, seeds=range(len(PROMPTS)), stop_ids=STOPS, pad_token_id=1, on_finished=report)
    return [ids[mask].tolist() for ids, mask in zip(made.response_ids, made.response_mask, strict=True)]


def limit(model: Any, rows: int, monkeypatch: pytest.MonkeyPatch, *, after: int = 0) -> list[int]:
    """Let a pass over more than ``rows`` rows run out of memory, except the first ``after`` passes. Returns the rows of each pass."""
    sizes: list[int] = []
    forward = model.forward

    def limited(*arguments: Any, **options: Any) -> Any:
        sizes.append(len(options["input_ids"]))
        if sizes[-1] > rows and len(sizes) > after:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(*arguments, **options)

    monkeypatch.setattr(model, "forward", limited)
    return sizes


@pytest.mark.parametrize("continuous", [False, True])
def test_completions_are_the_same_and_each_is_reported_once(model, monkeypatch, caplog, continuous: bool) -> None:
    expected = sample(model, continuous_batching=continuous)
    finished: list[Finished] = []
    sizes = limit(model, 2, monkeypatch, after=16)  # some completions have ended before
    assert sample(model, finished, continuous_batching=continuous) == expected
    assert sorted(one.row for one in finished) == list(range(len(PROMPTS)))
    assert {one.row: one.response_ids for one in finished} == dict(enumerate(expected))
    assert caplog.messages == [
        "sampling: memory ran out in a pass over 4 sequences; continuing with half as many. Every completion has its own random numbers, "
        "so only rounding depends on this"
    ]
    sizes.clear()
    assert sample(model, continuous_batching=continuous) == expected
    assert max(sizes) <= 2 and len(caplog.messages) == 1  # the next call begins with the smaller number


def test_one_sequence_that_does_not_fit_gives_a_message_and_restores_the_model(model, monkeypatch) -> None:
    sizes = limit(model, 0, monkeypatch)
    model.train()
    with pytest.raises(MemoryExhausted, match=r"sampling: memory ran out in a pass over one sequence, .*Lower generation\.max_new_tokens"):
        sample(model)
    assert model.training and sizes[-2:] == [1, 1]
    model.eval()


def test_a_callback_that_fails_is_not_repeated(model) -> None:
    def fail(new: list[Finished]) -> None:
        raise ValueError("full")

    with pytest.raises(ValueError, match="full"):
        generate(model, PROMPTS, GenerationSettings(max_new_tokens=4), seeds=range(8), stop_ids=STOPS, pad_token_id=1, on_finished=fail)


def test_the_last_attempt_records_no_steps(model) -> None:
    settings = GenerationSettings(batch_size=16)
    limited = retreats.RowLimit("sampling")
    assert generation._fitting(settings, limited, 5) == GenerationSettings(batch_size=5)
    limited.retreat(torch.OutOfMemoryError("x"), 5)
    assert generation._fitting(settings, limited, 9) == GenerationSettings(batch_size=3)
    limited.retreat(torch.OutOfMemoryError("x"), 1)  # the last prompt that waits
    assert generation._fitting(settings, limited, 1) == GenerationSettings(batch_size=1, cuda_graphs=False)
    limited.succeeded()
    assert generation._fitting(settings, limited, 9) == GenerationSettings(batch_size=3)
