"""Likelihood of held-out tokens: the perplexity of a uniform model is the size of the vocabulary."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from stages.errors import TrainingError
from stages.models.loading import load_language_model
from stages.models.passes.likelihood import Likelihood, measure_likelihood

CPU: dict[str, Any] = {"pad_token_id": 1, "device": torch.device("cpu"), "dtype": torch.float32}


def test_perplexity_of_a_uniform_model_is_the_vocabulary_size(tiny_llama_folder: Path) -> None:
    model = load_language_model(str(tiny_llama_folder), dtype=torch.float32)
    with torch.no_grad():
        model.get_output_embeddings().weight.zero_()
    rows = [([5, 6, 7, 8], [1, 1, 1, 1]), ([9, 10], [1, 1])]
    measured = measure_likelihood(model, rows, batch_size=2, **CPU)
    assert measured.tokens == 4  # 3 + 1: nothing predicts a first token
    assert measured.perplexity == pytest.approx(300, rel=1e-5)
    # 4 tokens of log2(300) = 8.2288 bits spread over 8 bytes
    assert measured.bits_per_byte(8) == pytest.approx(4.1144, abs=1e-3)


def test_loss_is_over_counted_tokens_and_independent_of_batches(tiny_llama_folder: Path) -> None:
    model = load_language_model(str(tiny_llama_folder), dtype=torch.float32)
    model.train()
    rows = [([5, 6, 7, 8, 30, 31], [0, 0, 0, 1, 1, 0]), ([9, 10, 11], [0, 1, 1]), ([4, 2], [0, 1])]
    with torch.no_grad():
        logprobs = torch.log_softmax(model(input_ids=torch.tensor([rows[0][0]])).logits, dim=-1)[0]
    expected = -float(logprobs[2, 8] + logprobs[3, 30])
    assert measure_likelihood(model, rows[:1], batch_size=1, **CPU).nats == pytest.approx(expected, rel=1e-5)
    one, three = (measure_likelihood(model, rows, batch_size=size, **CPU) for size in (1, 3))
    assert one.tokens == three.tokens == 5
    assert one.nats == pytest.approx(three.nats, rel=1e-5)
    assert model.training  # not changed


def test_no_counted_tokens_give_no_loss() -> None:
    assert math.isnan(Likelihood(0.0, 0).loss)


def run_out_above(model: Any, rows: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let passes over more than ``rows`` rows run out of memory; returns the rows of each pass."""
    sizes: list[int] = []
    forward = model.forward

    def limited(*inputs: Any, **named: Any) -> Any:
        sizes.append(len(named["input_ids"]))
        if sizes[-1] > rows:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(*inputs, **named)

    monkeypatch.setattr(model, "forward", limited)
    return sizes


def test_a_pass_that_runs_out_of_memory_is_repeated_in_halves(tiny_llama_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_language_model(str(tiny_llama_folder), dtype=torch.float32)
    rows = [([5, 6, 7, 8], [1, 1, 1, 1]), ([9, 10], [1, 1]), ([4, 2, 8], [0, 1, 1])]
    expected = measure_likelihood(model, rows, batch_size=1, **CPU)
    sizes = run_out_above(model, 1, monkeypatch)
    measured = measure_likelihood(model, rows, batch_size=3, **CPU)
    assert sizes == [3, 2, 1, 1, 1]
    assert measured.tokens == expected.tokens == 6 and measured.nats == pytest.approx(expected.nats, rel=1e-6)


def test_process_with_sharded_weights_does_not_repeat_a_pass_alone(tiny_llama_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_language_model(str(tiny_llama_folder), dtype=torch.float32)
    next(model.parameters()).ds_id = 0  # as DeepSpeed's ZeRO-3 marks a parameter
    sizes = run_out_above(model, 1, monkeypatch)
    with pytest.raises(TrainingError, match="Set training.microbatch_size to fewer sequences"):
        measure_likelihood(model, [([5, 6], [1, 1])] * 2, batch_size=2, **CPU)
    assert sizes == [2]
