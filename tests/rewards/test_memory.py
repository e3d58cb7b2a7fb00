"""The planned memory of scoring equals the bytes of the tensors of real sources."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from stages.memory.estimate import Machine
from stages.memory.fake_passes import LiveBytes
from stages.memory.models import View
from stages.memory.shapes import shape_of_folder
from stages.models.heads import RewardModel
from stages.rewards.classifier import ClassifierSource
from stages.rewards.config import RewardInput
from stages.rewards.generative import load_generative
from stages.rewards.learned import RewardModelSource
from stages.rewards.memory import scoring_phase
from tests.rewards.test_classifier import WORDS, word_tokenizer

CPU = Machine("cpu", 8 << 30, 4, "a CPU")
SIZES = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
PROMPT, NEW, NUMBER = 40, 20, 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with a tokenizer in which a word is a token, and with the heads of a reward model and of a classifier."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig

    made, tokenizer = tmp_path_factory.mktemp("models"), word_tokenizer(special=False)
    config = LlamaConfig(vocab_size=3000, max_position_embeddings=256, pad_token_id=1, eos_token_id=2, bos_token_id=None, **SIZES)
    AutoModelForCausalLM.from_config(config).save_pretrained(made / "language")
    AutoModelForSequenceClassification.from_config(config).save_pretrained(made / "classifier")
    for name in ("language", "classifier"):
        tokenizer.save_pretrained(made / name)
    RewardModel.from_language_model(made / "language", dtype=torch.float32).save(made / "scalar", tokenizer)
    return made


def source_of(kind: str, settings: RewardInput, model: Any) -> Any:
    options: dict[str, Any] = {"device": torch.device("cpu"), "dtype": torch.float32}
    if kind == "scalar":
        return RewardModelSource(settings, RewardModel.from_pretrained(model, dtype=torch.float32))
    return ClassifierSource(settings, model, **options) if kind == "classifier" else load_generative(settings, model, **options)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("scalar", {"batch_size": 4}),
        ("scalar", {"batch_size": 64}),
        ("classifier", {"label": 0, "batch_size": 5}),
        ("classifier", {"label": 0, "reads": "completion"}),
        ("language", {"answers": ["joy", "dull"], "question": "{prompt} film {completion} music", "batch_size": 8}),
    ],
    ids=str,
)
def test_a_source_takes_what_is_planned(kind: str, settings: dict[str, Any], folder: Path, resolve_folder: Any) -> None:
    words = (WORDS * 10)[: PROMPT + NEW]
    prompts, completions = [" ".join(words[:PROMPT])] * NUMBER, [" ".join(words[PROMPT:])] * NUMBER
    chosen = RewardInput.model_validate({"model": str(folder / kind), **settings})
    source = source_of(kind, chosen, resolve_folder(folder / kind))
    with LiveBytes() as live:
        source.score(prompts, completions)
    shape = shape_of_folder(folder / kind)
    assert shape is not None
    if chosen.answers is not None:  # the plan counts three characters a token, here the question has two tokens
        chosen = chosen.model_copy(update={"question": "{prompt}"})
    planned = scoring_phase((chosen, View(shape, "x")), NUMBER, PROMPT, NEW, 4, CPU)
    assert planned.total == pytest.approx(live.peak, rel=0.06)
    assert (planned.logits > 0) is (kind == "language")


def test_a_text_is_at_most_as_long_as_its_reader_can_read(folder: Path) -> None:
    config = json.loads((folder / "scalar" / "config.json").read_text())
    shape = shape_of_folder(folder / "scalar")
    assert shape is not None and config["max_position_embeddings"] == 256
    judge = (RewardInput.model_validate({"model": "x"}), View(shape, "x"))
    long, longest = (scoring_phase(judge, 4, prompt, 56, 4, CPU) for prompt in (200, 2000))
    assert long == longest
