"""The sentiment stage: it learns a simple rule, ignores HTML tags, measures as computed by hand, and masks tokens as BERT does."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from stages.sentiment.config import SentimentConfig, WordPieceSettings
from stages.sentiment.measuring import measure, predict
from stages.sentiment.rows import Collator
from stages.sentiment.run import run
from stages.sentiment.tokenizer import train_wordpiece

GOOD, BAD = ["a lovely film", "lovely acting", "what a lovely plot"], ["an awful film", "awful acting", "what an awful plot"]
TINY = {"type": "distilbert", "dim": 16, "hidden_dim": 32, "n_layers": 1, "n_heads": 2}


@pytest.fixture
def reviews(tmp_path: Path) -> str:
    path = tmp_path / "reviews.jsonl"
    rows = [
        {"text": f"{text} number {number}", "label": label}
        for number in range(20)
        for label, texts in ((1, GOOD), (0, BAD))
        for text in texts
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def config(reviews: str, **fields: Any) -> SentimentConfig:
    settings = {
        "name": "taste",
        "architecture": TINY,
        "tokenizer": {"vocab_size": 120},
        "max_length": 16,
        "precision": "fp32",
        "data": {"train": reviews, "validation_fraction": 0.2},
        "training": {"learning_rate": 1e-2, "epochs": 6.0, "batch_size": 8, "microbatch_size": 8},
    }
    return SentimentConfig.model_validate({name: value for name, value in {**settings, **fields}.items() if value is not None})


def test_training_publishes_a_plain_classifier_that_learned(reviews, step_context) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    result = run(config(reviews), step_context())
    assert result.metrics["heldout_accuracy"] == 1.0 and result.metrics["heldout_accuracy_before"] < 0.8
    assert result.metrics["heldout_confusion_matrix"] == [[12, 0], [0, 12]]
    assert len(result.metrics["examples"]) == 10
    model = AutoModelForSequenceClassification.from_pretrained(result.model.path)
    tokenizer = AutoTokenizer.from_pretrained(result.model.path)
    assert model.config.id2label == {0: "negative", 1: "positive"}
    logits = model(**tokenizer("such a <br /> lovely film", return_tensors="pt")).logits
    assert logits.argmax().item() == 1


def test_training_continues_a_model_and_lora_publishes_an_adapter(reviews, step_context, resolve_folder) -> None:
    first = run(config(reviews, training={"max_steps": 2}), step_context("test/one"))
    source = resolve_folder(first.model.path)
    fields = {"architecture": None, "tokenizer": None, "model": "x", "lora": {"r": 4}}
    result = run(
        config(reviews, **fields, training={"learning_rate": 2e-2, "epochs": 4.0, "batch_size": 8}),
        step_context("test/two", models={"model": source}),
    )
    assert result.model.is_adapter and result.metrics["heldout_accuracy"] > 0.9


def test_a_classifier_trained_in_half_precision_is_published(reviews, step_context) -> None:
    """Its Trainer computes in bf16. The saved model is compared in fp32, where rounding does not look like other weights."""
    result = run(config(reviews, precision="bf16", training={"max_steps": 3, "batch_size": 8}), step_context())
    assert (Path(result.model.path) / "model.safetensors").exists()


def test_masked_language_modelling_comes_before_the_labels(reviews, step_context) -> None:
    result = run(config(reviews, masked={"training": {"epochs": 1.0, "batch_size": 8}}), step_context())
    assert result.metrics["heldout_accuracy"] > 0.9


def test_tokenizer_is_equal_for_equal_texts_and_drops_tags() -> None:
    one, two = (train_wordpiece(GOOD + BAD, WordPieceSettings(vocab_size=100), 16) for _ in range(2))
    assert one.get_vocab() == two.get_vocab() and len(one) <= 100
    assert one.tokenize("Lovely plot!") == ["lovely", "plot", "[UNK]"]
    assert one("Lovely<br />acting")["input_ids"] == one("lovely acting")["input_ids"]
    assert one.decode(one("lovely")["input_ids"]).startswith("[CLS]")


def test_measures_by_hand() -> None:
    probabilities = torch.tensor([[0.9, 0.1], [0.4, 0.6], [0.7, 0.3], [0.2, 0.8]])
    measured = measure(probabilities, [0, 1, 1, 1])
    assert measured["accuracy"] == 0.75 and measured["confusion_matrix"] == [[1, 0], [1, 2]]
    # positive: 2 hits, 1 missed, 0 false: 4 / 5
    assert measured["f1"] == pytest.approx(0.8)
    assert measured["loss"] == pytest.approx(-(torch.tensor([0.9, 0.6, 0.3, 0.8]).log().mean().item()))


def test_predictions_are_those_of_smaller_passes_when_memory_runs_out() -> None:
    sizes: list[int] = []

    class Classifier(torch.nn.Module):
        device = torch.device("cpu")

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
            sizes.append(len(input_ids))
            if len(input_ids) > 1:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return SimpleNamespace(logits=torch.stack([torch.zeros(1), input_ids[:, :1].float().log()[0]], dim=1))

    rows = [{"input_ids": [3, 1], "labels": 0}, {"input_ids": [1], "labels": 1}]
    assert predict(Classifier(), rows, 0).tolist() == [pytest.approx([0.25, 0.75]), pytest.approx([0.5, 0.5])]  # odds 3 and 1
    assert sizes == [2, 1, 1]


def test_batches_are_padded_and_masked() -> None:
    batch = Collator(0)([{"input_ids": [5, 6], "labels": 1}, {"input_ids": [7], "labels": 0}])
    assert batch["input_ids"].tolist() == [[5, 6], [7, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1], [1, 0]] and batch["labels"].tolist() == [1, 0]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model": "m"}, "either model"),
        ({"architecture": {"dim": 8}}, "architecture needs a type"),
        ({"architecture": None, "tokenizer": None}, "either model"),
        ({"lora": {"r": 2}}, "lora needs model"),
        ({"labels": ["one"]}, "at least 2"),
    ],
)
def test_contradicting_settings_are_refused(fields, message) -> None:
    with pytest.raises(ValidationError, match=message):
        config("unused", **fields)


def test_real_reviews_load(shared_data: Path) -> None:
    made = config(str(shared_data / "imdb" / "validation.jsonl.gz"))
    made.check_data()
