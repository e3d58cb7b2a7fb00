"""Steps with fixed places for a CUDA graph, run here without recording them: what is decoded is the same. tests/gpu records them."""

from __future__ import annotations

import logging
from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn

from stages.config import GenerationSettings
from stages.models.loading import load_language_model
from stages.sampling import cache, decoding, graphs
from stages.sampling.generation import Generated, generate

PROMPTS = [[10, 11, 12, 13, 14], [20], [30, 31, 32], [40, 41]]
STOPS = tuple(range(100, 115))  # a twentieth of the tokens: rows last for different times


@pytest.fixture(scope="module")
def model(tiny_llama_folder) -> Any:
    return load_language_model(str(tiny_llama_folder), dtype=torch.float32, trainable=False)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Rows and room of every step that would have been recorded, as if there were a GPU."""
    found: list[tuple[int, int]] = []

    def record(step: graphs.StaticStep) -> None:
        found.append((len(step._tokens), step._room))

    monkeypatch.setattr(graphs, "can_record", lambda model: True)
    monkeypatch.setattr(graphs, "record", record)
    return found


def sample(model: Any, prompts: list[list[int]] = PROMPTS, stops: tuple[int, ...] = STOPS, **settings: Any) -> Generated:
    chosen = GenerationSettings(**{"max_new_tokens": 60, **settings})
    return generate(model, prompts, chosen, seeds=range(len(prompts)), stop_ids=stops, pad_token_id=1)


@pytest.mark.parametrize("by_columns", [True, False])
@pytest.mark.parametrize("prompts", [PROMPTS, [[5, 6, 7], [8, 9, 10]], [[5, 6], [5, 6], [7, 8]]], ids=["ragged", "even", "equal"])
def test_fixed_steps_decode_what_usual_ones_do(model, made, monkeypatch, by_columns, prompts) -> None:
    monkeypatch.setattr(cache, "_reads_by_columns", lambda model: by_columns)
    expected = sample(model, prompts, cuda_graphs=False)
    assert made == []
    found = sample(model, prompts)
    assert made
    assert torch.equal(found.response_ids, expected.response_ids)
    torch.testing.assert_close(found.logprobs, expected.logprobs, rtol=1e-4, atol=1e-5)


def test_a_step_is_made_anew_where_rows_leave_and_where_the_room_is_used_up(model, made, monkeypatch) -> None:
    monkeypatch.setattr(cache, "_reads_by_columns", lambda model: False)
    monkeypatch.setattr(cache, "FIRST_ROOM", 8)
    monkeypatch.setattr(decoding, "COMPACT_BELOW", 0.0)
    sample(model, PROMPTS[:1] * 2, stops=())
    # 5 tokens and room for 8; then for one more and as many again as there are; for the last 10 of 60 it is not worth it
    assert made == [(2, 13), (2, 27), (2, 55)]
    made.clear()
    monkeypatch.setattr(decoding, "COMPACT_BELOW", 1.0)
    found = sample(model, PROMPTS)
    assert len({rows for rows, _ in made}) > 1
    assert torch.equal(found.response_ids, sample(model, PROMPTS, cuda_graphs=False).response_ids)


def test_few_steps_are_not_worth_a_recording(model, made) -> None:
    sample(model, max_new_tokens=graphs.FEWEST_STEPS)
    assert made == []
    sample(model, max_new_tokens=graphs.FEWEST_STEPS + 1)
    assert len(made) == 1


@pytest.mark.parametrize("fails", ["raises", "differs"])
def test_a_model_that_cannot_be_recorded_decodes_all_the_same(model, made, monkeypatch, caplog, fails) -> None:
    monkeypatch.setattr(graphs, "_refusals", Counter())
    attempts = []

    def record(step: graphs.StaticStep) -> str:
        attempts.append(step)
        step.run()  # a run that wrote to the cache before it failed
        if fails == "raises":
            raise RuntimeError("operation not permitted when stream is capturing\nlong story")
        return "a replayed step says something else than a computed one"

    monkeypatch.setattr(graphs, "record", record)
    expected = sample(model, cuda_graphs=False)
    with caplog.at_level(logging.WARNING):
        found = sample(model)
        sample(model)
    assert torch.equal(found.response_ids, expected.response_ids)
    if fails == "raises":
        assert len(attempts) == 2  # once a batch
    else:
        rows = [len(step._tokens) for step in attempts]
        assert len(rows) > 2 and rows[0] == 4 and rows[: len(rows) // 2] == sorted(set(rows), reverse=True)  # anew when rows have left
    assert graphs._refusals.total() == len(attempts)
    said = [message for message in caplog.messages if "CUDA graph" in message]
    assert len(said) == 1 and "long story" not in said[0] and "generation.cuda_graphs: false" in said[0]


def test_a_refusal_is_said_again_when_there_are_ten_of_them(model, made, monkeypatch, caplog) -> None:
    monkeypatch.setattr(graphs, "_refusals", Counter())
    monkeypatch.setattr(graphs, "record", lambda step: "a replayed step says something else than a computed one")
    with caplog.at_level(logging.WARNING):
        for _ in range(12):
            sample(model, PROMPTS[:1], stops=())
    said = [message for message in caplog.messages if "CUDA graph" in message]
    assert len(said) == 2 and "(10 of the recordings so far" in said[1]


@pytest.mark.parametrize(("dtype", "share"), [(torch.float32, 3.45e-4), (torch.float16, 0.03125), (torch.bfloat16, 0.0884)])
def test_a_replay_may_differ_by_the_root_of_the_precision(dtype: torch.dtype, share: float) -> None:
    computed = torch.tensor([[3.0, -1.0, -2.0, -torch.inf], [1.0, 5.0, 0.0, -torch.inf]])  # a token that is never said
    spread = (computed - computed.where(torch.isfinite(computed), torch.tensor(0.0)).mean(dim=-1, keepdim=True))[:, :3]
    missing = computed.where(torch.isfinite(computed), torch.tensor(0.0)).mean(dim=-1)  # the spread counts that token as 0
    norm = float((spread.square().sum() + missing.square().sum()).sqrt())
    for factor, agrees in ((0.9, True), (1.1, False)):
        replayed = computed.clone()
        replayed[0, 0] += factor * share * norm
        assert graphs.agree(replayed, computed, dtype) == agrees
    assert graphs.agree(computed, computed.clone(), dtype)
    broken = computed.clone()
    broken[1, 2] = torch.nan
    assert not graphs.agree(broken, computed, dtype)


def test_autocast_counts_as_the_precision_of_a_step() -> None:
    logits = torch.zeros(1)
    assert graphs.compute_dtype(logits) == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert graphs.compute_dtype(logits) == torch.bfloat16


def test_nothing_is_recorded_without_a_gpu_or_where_int8_waits(model) -> None:
    assert not graphs.can_record(model)

    class Linear8bitLt(nn.Linear):
        pass

    class OnGPU(nn.Module):
        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.layer = layer

        def parameters(self, recurse: bool = True) -> Any:
            yield type("Weight", (), {"device": torch.device("cuda")})()

    assert graphs.can_record(OnGPU(nn.Linear(1, 1)))
    assert not graphs.can_record(OnGPU(Linear8bitLt(1, 1)))
