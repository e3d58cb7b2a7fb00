"""Learned reward sources: how rows are batched, and that a score does not depend on it."""

from __future__ import annotations

import torch
from tokenizers.processors import TemplateProcessing

from stages.models.heads import RewardModel
from stages.rewards.batching import similar_length_batches
from stages.rewards.config import RewardInput
from stages.rewards.learned import RewardModelSource, RewardModelSpans, score_rows


def test_rows_of_similar_length_share_a_batch() -> None:
    lengths = [50, 10, 11, 30, 12, 13, 48, 31, 14, 10]
    batches = similar_length_batches(
        lengths, 8
    )  # a quarter is 2 rows; then a row more than a fifth longer than the first begins a new batch
    assert [[lengths[row] for row in batch] for batch in batches] == [[10, 10, 11, 12], [13, 14], [30, 31], [48, 50]]
    assert similar_length_batches([7] * 5, 2) == [[0, 1], [2, 3], [4]] and similar_length_batches([], 4) == []
    assert similar_length_batches([1, 100, 200, 300], 64) == [[0, 1, 2, 3]]  # too few rows for a separate pass


def test_scores_are_those_of_every_text_alone(tiny_llama_folder) -> None:
    model = RewardModel.from_language_model(str(tiny_llama_folder), dtype=torch.float32, trainable=False)
    draw = torch.Generator().manual_seed(0)
    rows = [torch.randint(3, 20, (length,), generator=draw).tolist() for length in (40, 3, 4, 17, 5, 41, 3, 18)]
    with torch.inference_mode():
        alone = [float(model.score(torch.tensor([row]), torch.ones(1, len(row), dtype=torch.long))) for row in rows]
        together = score_rows(rows, model, 0, 4)
    torch.testing.assert_close(together, torch.tensor(alone))


def test_a_text_with_its_first_token_gets_no_second_one(tiny_llama_folder) -> None:
    """OpenRLHF applies its chat template before it sends a text, and many templates write ``<s>``."""
    model = RewardModel.from_language_model(str(tiny_llama_folder), dtype=torch.float32, trainable=False)
    first = model.tokenizer.pad_token_id
    model.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<|pad|> $A", special_tokens=[("<|pad|>", first)])
    ids = [first, *model.tokenizer("the film", add_special_tokens=False)["input_ids"], model.tokenizer.eos_token_id]
    scores = (
        RewardModelSource(RewardInput.model_validate({"model": "preference"}), model).judge_texts(["the film", "<|pad|>the film"]).scores
    )
    torch.testing.assert_close(scores, model.score(torch.tensor([ids]), torch.ones(1, len(ids))).detach().repeat(2))


def test_token_scores_are_the_same_after_memory_ran_out(tiny_llama_folder, tiny_tokenizer, monkeypatch) -> None:
    model = RewardModel.from_language_model(str(tiny_llama_folder), dtype=torch.float32, trainable=False)
    model.tokenizer = tiny_tokenizer
    source = RewardModelSpans(RewardInput.model_validate({"model": "preference", "level": "token", "batch_size": 3}), model)
    prompts, completions = ["say", "the film", "go"], ["a joy", "was dull and weak", "x"]
    expected = source.judge(prompts, completions).spans
    sizes, score_tokens = [], model.score_tokens

    def limited(input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        sizes.append(len(input_ids))
        if len(input_ids) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return score_tokens(input_ids, attention_mask)

    monkeypatch.setattr(model, "score_tokens", limited)
    spans = source.judge(prompts, completions).spans
    assert sizes == [3, 2, 1]
    assert [[position for position, _ in row] for row in spans] == [[position for position, _ in row] for row in expected]
    scores = [torch.tensor([score for row in rows for _, score in row]) for rows in (spans, expected)]
    torch.testing.assert_close(scores[0], scores[1])
