"""Effects of a length limit on comparisons: truncated rows, and pairs whose two texts then have equal tokens."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from stages.corpora.comparisons import Comparison
from stages.errors import DataError
from stages.reward_model.config import RewardModelConfig
from stages.reward_model.preferences import EncodedComparison, agreement
from stages.reward_model.rows import Lost, encode, usable
from stages.reward_model.run import run
from stages.rl.ranking import ranking_losses, ranking_pairs


def test_pairs_of_equal_texts_are_dropped() -> None:
    ranks, prompts, texts = torch.tensor([0, 1, 2]), torch.zeros(3, dtype=torch.long), torch.tensor([0, 1, 0])
    better, worse = ranking_pairs(ranks, prompts, texts)
    assert list(zip(better.tolist(), worse.tolist(), strict=True)) == [(0, 1), (1, 2)]  # not (0, 2), which are equal texts
    scores = torch.tensor([1.0, 0.0, 1.0])
    # -log sigmoid(1) and -log sigmoid(-1), each half of the prompt's weight
    assert float(ranking_losses(scores, ranks, prompts, texts)) == pytest.approx((0.3132617 + 1.3132617) / 2)


def test_lost_rows_by_hand(tiny_tokenizer) -> None:
    same_end = [f"{letter}{'z' * 30}" for letter in "ab"]  # a token per letter z, or nearly
    uncut = encode(Comparison("film", same_end, [0, 1]), tiny_tokenizer, 1000)
    assert uncut.cut == 0 and uncut.pairs == (1, 0)
    cut = encode(Comparison("film", same_end, [0, 1]), tiny_tokenizer, 8)
    assert cut.cut == 2 and cut.pairs == (0, 1) and cut.lengths == uncut.lengths
    three = encode(Comparison("film", [*same_end, "joy"], [0, 1, 2]), tiny_tokenizer, 8)
    assert three.cut == 2 and three.pairs == (2, 1)
    kept, lost = usable([uncut, cut, three])
    assert kept == [uncut, three] and lost == Lost(rows=7, cut=4, pairs=5, equal=2)
    # the text that occurs twice forms no pair with itself: two pairs, of which the scores rank one correctly
    measured = agreement(torch.tensor([3.0, 3.0, 1.0]), [three])
    assert measured["pairs"] == 2 and measured["accuracy"] == 1.0
    tie = EncodedComparison([[1], [1]], [0, 0])
    assert tie.pairs == (0, 0)


def test_step_reports_dropped_rows(tmp_path, step_context, resolve_folder, tiny_llama_folder) -> None:
    rows: list[dict[str, Any]] = [{"prompt": "film", "chosen": f"a{n} joy", "rejected": "dull"} for n in range(8)]
    path, same = tmp_path / "pairs.jsonl", {"prompt": "film", "chosen": "a" + "z" * 40, "rejected": "b" + "z" * 40}
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, same]))
    validation = tmp_path / "heldout.jsonl"
    validation.write_text("".join(json.dumps(row) + "\n" for row in [*rows[:2], same]))
    settings = {
        "name": "rm",
        "model": "sft",
        "precision": "fp32",
        "data": {"train": str(path), "validation": str(validation)},
        "max_length": 16,
        "training": {"batch_size": 4, "microbatch_size": 4, "max_steps": 1},
    }
    models = {"model": resolve_folder(tiny_llama_folder)}
    metrics = run(RewardModelConfig.model_validate(settings), step_context(models=models)).metrics
    assert (metrics["comparisons"], metrics["pairs"], metrics["equal_pairs"], metrics["heldout_equal_pairs"]) == (8, 8, 1, 1)
    assert metrics["cut_share"] == pytest.approx(2 / 18) and metrics["heldout_cut_share"] == pytest.approx(2 / 6)
    assert metrics["heldout_pairs"] == 2
    path.write_text(json.dumps(same) + "\n")
    with pytest.raises(DataError, match="no comparison is left: truncated to 16 tokens, the completions are equal"):
        run(RewardModelConfig.model_validate(settings), step_context("test/none", models=models))
    path.write_text(json.dumps({"prompt": "p", "chosen": "a", "rejected": "a"}) + "\n")
    with pytest.raises(DataError, match="no comparison is left: the two texts of all 1 pairs have equal tokens"):
        run(RewardModelConfig.model_validate(settings), step_context("test/none", models=models))
