"""How full the passes of a step get, by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from stages.memory.estimate import Machine, Memory, Phase, phases
from stages.memory.fake_passes import LiveBytes
from stages.memory.lengths import Counter, Lengths, comparison_lengths, demonstration_lengths
from stages.memory.models import before_gradients, is_full_step, largest_pass, rows_per_pass, saving
from stages.memory.shapes import shape_of
from stages.sft.config import SFTStepConfig

CPU, GPU = Machine("cpu", 8 << 30, 4, "a CPU"), Machine("cuda", 8 << 30, 2, "a GPU")


@pytest.mark.parametrize(
    ("examples", "batch_size", "rows", "tokens"),
    [
        ([100], 8, 32, 800),  # all rows in one pass
        ([100], 16, 4, 400),  # four rows in a pass
        ([128], 8, 32, 512),  # six rows would fit; two passes of four are more even
        ([300], 3, 32, 600),
        ([1000], 2, 32, 1000),  # longer than the budget
    ],
)
def test_the_largest_pass_of_a_step(examples: list[int], batch_size: int, rows: int, tokens: int) -> None:
    assert largest_pass(examples, batch_size, rows) == tokens


def step_of_eight() -> SFTStepConfig:
    fields = {"stage": "sft", "name": "sft", "model": "base", "data": {"train": "rows.jsonl"}}
    return SFTStepConfig.model_validate({**fields, "training": {"batch_size": 8, "microbatch_size": 8}})


def test_at_the_peak_of_a_pass_over_a_complete_step_no_gradients_exist() -> None:
    """Weights 10, gradients 10, moments 20; a pass with 100 and the check of the saved model with 15."""
    config = step_of_eight()
    assert is_full_step(config, 8, 1) and is_full_step(config, 4, 2) and not is_full_step(config, 7.5, 1)
    held, training = Memory(weights=10, gradients=10, optimizer=20), Phase(activations=100)
    assert (held + phases(training, Phase(activations=15))).total == 140
    assert (held + phases(before_gradients(training, held), Phase(activations=15))).total == 130
    assert (held + phases(before_gradients(Phase(activations=3), held))).total == 40  # after the pass, with the gradients


def test_rows_of_a_pass_follow_from_the_lengths_of_the_examples() -> None:
    config = step_of_eight()
    assert rows_per_pass(config, 1, 200, CPU, [(1, 50)]) == 8 * 50 / 200
    assert rows_per_pass(config, 1, 200, CPU, []) == 4  # 800 tokens, if the lengths are unknown
    assert rows_per_pass(config, 1, 400, CPU, [(3, 200)], texts=4) == 3 * 200 / (4 * 400)  # a pass of one example with three texts
    assert rows_per_pass(config, 1, 200, GPU, [(1, 50)]) == 8
    assert rows_per_pass(config, 4, 200, CPU, [(1, 50)]) == 2


def test_the_check_of_a_saved_model_takes_it_in_fp32_and_what_the_search_for_infinite_weights_takes() -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 88, "num_hidden_layers": 2, "num_attention_heads": 4, "tie_word_embeddings": False}
    shape = shape_of({"model_type": "llama", "vocab_size": 200, **sizes})
    assert shape is not None
    saved = torch.ones(200, 32)  # the embedding
    with LiveBytes() as live:
        torch.isfinite(saved).all()
    layers, norms, embedding = 2 * (4 * 32 * 32 + 3 * 32 * 88), 5 * 32, 200 * 32
    assert saving(shape) == Phase(activations=4 * (layers + norms + 2 * embedding) + live.peak)
    assert saving(shape, output=False) == Phase(activations=4 * (layers + norms + embedding) + live.peak)
    assert saving(replace(shape, vocabulary=10_000_000)) == Phase()  # so large a model is not checked


def test_examples_have_the_lengths_of_the_data(tmp_path: Path) -> None:
    """Without a tokenizer, three characters are a token; an end token and one for the rest are added."""
    rows: list[dict[str, Any]] = [{"prompt": "a" * 10, "completion": "b" * (19 + 30 * index)} for index in range(3)]
    (tmp_path / "rows.jsonl").write_text("".join(json_line(row) for row in rows))
    data = SFTStepConfig.model_validate(
        {"stage": "sft", "name": "s", "model": "m", "data": {"train": str(tmp_path / "rows.jsonl")}}
    ).data.train
    assert demonstration_lengths(data, Counter(None)) == Lengths(demonstration=32, examples=((1, 12), (1, 22), (1, 32)))
    compared = {"prompt": "a" * 10, "completions": ["b" * 19, "b" * 49, "b" * 79], "ranks": [0, 1, 2]}
    (tmp_path / "rows.jsonl").write_text(json_line(compared))
    assert comparison_lengths(data, None, Counter(None), pairs=False) == Lengths(comparison=32, completions=3, examples=((3, 32),))
    assert comparison_lengths(data, None, Counter(None), pairs=True).examples == ((2, 22), (2, 32), (2, 32))


def json_line(row: dict[str, Any]) -> str:
    return json.dumps(row) + "\n"


def test_tokens_of_a_very_long_text_are_estimated_from_pieces(tmp_path: Path, tiny_tokenizer) -> None:
    tiny_tokenizer.save_pretrained(tmp_path)
    counter, read = Counter(tmp_path), []

    class Recorder:
        def encode_batch(self, texts: list[str]) -> list[Any]:
            read.extend(texts)
            return tiny_tokenizer._tokenizer.encode_batch(texts)

    counter._tokenizer = Recorder()
    long = "the film was a joy. " * 5_000 + "Ünïcödé 12345 " * 5_000  # 170,000 characters; the parts differ in tokens per character
    texts = ["", "a film", "the plot was dull " * 800, long]
    complete = [len(ids) + 1 for ids in tiny_tokenizer(texts)["input_ids"]]
    counted = counter.each(texts)
    assert counted[:3] == complete[:3] and counted[3] == pytest.approx(complete[3], rel=0.05)
    assert sum(map(len, read)) == sum(map(len, texts[:3])) + 16_000
