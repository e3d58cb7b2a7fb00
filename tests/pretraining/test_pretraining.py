"""Pretraining from random weights and from a model: blocks by hand, bitwise equal runs, errors that name the field."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from stages.config import ModelInput
from stages.corpora.encoding.blocks import encode_documents, overlapping_windows, pack_blocks
from stages.errors import DataError, ModelError
from stages.pretraining.config import PretrainingConfig, TokenizerSettings
from stages.pretraining.run import _make_trainer, run
from stages.pretraining.tokenizer import train_tokenizer
from stages.registry.references import ResolvedModel

TINY = {"type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
SENTENCES = ["the acting was warm and the film was a joy", "the plot was dull and the ending was weak", "write a happy line"]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Thirty documents in a JSON-lines file."""
    import json

    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": f"{SENTENCES[index % 3]} {index}"}) + "\n" for index in range(30)))
    return path


def config(corpus: Path, **fields: Any) -> PretrainingConfig:
    settings = {
        "name": "base",
        "architecture": TINY,
        "tokenizer": {"vocab_size": 300},
        "block_size": 16,
        "precision": "fp32",
        "data": {"train": str(corpus), "validation_fraction": 0.1},
        "training": {"epochs": 3.0, "batch_size": 8},
    }
    return PretrainingConfig.model_validate({name: value for name, value in {**settings, **fields}.items() if value is not None})


def test_documents_are_joined_by_the_end_token_and_cut(tiny_tokenizer: Any) -> None:
    end = tiny_tokenizer.eos_token_id
    a, b = (tiny_tokenizer(text)["input_ids"] for text in SENTENCES[:2])
    tokens = encode_documents(tiny_tokenizer, SENTENCES[:2])
    assert tokens == [*a, end, *b, end]
    blocks = pack_blocks(tokens, 5)
    assert blocks.shape == (len(tokens) // 5, 5)
    assert blocks.flatten().tolist() == tokens[: len(tokens) // 5 * 5]
    with pytest.raises(DataError, match="3 tokens, less than one block; lower block_size=5"):
        pack_blocks([1, 2, 3], 5)


def test_windows_predict_every_token_but_the_first_once() -> None:
    rows = [ids for ids, _ in overlapping_windows([0, 1, 2, 3, 4, 5, 6], 3)]
    assert rows == [[0, 1, 2], [2, 3, 4], [4, 5, 6]]
    assert [token for row in rows for token in row[1:]] == [1, 2, 3, 4, 5, 6]
    assert [ids for ids, _ in overlapping_windows([0, 1, 2, 3], 3)] == [[0, 1, 2], [2, 3]]


def test_tokenizers_of_equal_texts_are_equal_and_lose_nothing() -> None:
    settings = TokenizerSettings(vocab_size=300, special_tokens=["<|user|>"])
    first, second = (train_tokenizer(SENTENCES, settings) for _ in range(2))
    assert first.backend_tokenizer.to_str() == second.backend_tokenizer.to_str()
    text = "Grüße, <|user|> 你好\n"
    ids = first(text)["input_ids"]
    assert first.decode(ids) == text
    assert first.convert_tokens_to_ids("<|user|>") in ids
    assert len(first) == 300 and first.pad_token_id != first.eos_token_id


def test_from_random_weights_to_a_published_model(corpus: Path, step_context: Any) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    results = [run(config(corpus), step_context(name=f"test/base{turn}", seed=5)) for turn in range(2)]
    assert results[0].model.digest == results[1].model.digest  # equal runs give equal bits
    assert run(config(corpus), step_context(name="test/other", seed=6)).model.digest != results[0].model.digest
    metrics = results[0].metrics
    assert metrics["heldout_perplexity_before"] == pytest.approx(300, rel=0.15)  # small random weights are nearly uniform
    assert metrics["heldout_perplexity_after"] < 0.9 * metrics["heldout_perplexity_before"]
    assert metrics["heldout_bits_per_byte_after"] < metrics["heldout_bits_per_byte_before"]
    assert metrics["tokens_per_second"] > 0
    record = results[0].model
    assert record.role == "language_model"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(record.path), AutoTokenizer.from_pretrained(record.path)
    assert model.config.vocab_size == len(tokenizer) == 300
    assert (model.config.eos_token_id, model.config.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id


@pytest.mark.parametrize("kind", ["llama", "without loss arguments", "gpt2"])
def test_step_has_the_gradient_of_the_mean_over_all_its_tokens(
    kind: str, corpus: Path, step_context: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind == "without loss arguments":  # as the classes of Gemma 3n and Gemma 4 for text and images
        monkeypatch.setattr(LlamaForCausalLM, "accepts_loss_kwargs", False, raising=False)
    torch.manual_seed(0)
    shape = {"vocab_size": 20, "bos_token_id": 0, "eos_token_id": 0}
    llama = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    gpt2 = GPT2Config(n_layer=1, n_embd=16, n_head=2, n_positions=6, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, **shape)
    model: Any = GPT2LMHeadModel(gpt2) if kind == "gpt2" else LlamaForCausalLM(LlamaConfig(**llama, **shape))
    blocks = torch.randint(20, (4, 6))
    context = step_context()
    trainer: Any = _make_trainer(config(corpus, training={"batch_size": 4, "microbatch_size": 1}), context, model, blocks)
    trainer.context, trainer.current_gradient_accumulation_steps = context, 1
    (batch,), count = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 1, torch.device("cpu"))
    loss = trainer.training_step(model, batch, count)
    logits = model(input_ids=blocks).logits[:, :-1]
    expected = torch.nn.functional.cross_entropy(logits.reshape(-1, 20), blocks[:, 1:].reshape(-1))  # the mean over 4 rows of 5 tokens
    torch.testing.assert_close(loss, expected.detach())
    for parameter, gradient in zip(model.parameters(), torch.autograd.grad(expected, list(model.parameters())), strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


@pytest.mark.parametrize("lora", [None, {"r": 4}])
def test_continued_training_begins_with_the_perplexity_of_the_model(corpus: Path, step_context: Any, lora: dict[str, int] | None) -> None:
    base = run(config(corpus), step_context(name="test/base", seed=5))
    record = base.model
    resolved = ResolvedModel(
        ref=record.ref, kind="registry", path=str(record.path), digest=record.digest, input=ModelInput(ref=record.ref), record=record
    )
    continued = config(corpus, architecture=None, tokenizer=None, model=record.ref, lora=lora)
    result = run(continued, step_context(name="test/more", seed=5, models={"model": resolved}))
    assert result.metrics["heldout_perplexity_before"] == pytest.approx(base.metrics["heldout_perplexity_after"], rel=1e-4)
    assert result.metrics["heldout_perplexity_after"] < result.metrics["heldout_perplexity_before"]
    assert result.model.is_adapter == (lora is not None)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"architecture": None}, "either model .* or architecture"),
        ({"model": "gpt2"}, "either model .* or architecture"),
        ({"architecture": {"hidden_size": 8}}, "architecture needs a type"),
        ({"architecture": {**TINY, "vocab_size": 9}}, "set by the tokenizer"),
        ({"lora": {}}, "lora needs model"),
        ({"architecture": None, "tokenizer": None, "model": {"ref": "x", "quantization": "nf4"}}, "needs lora"),
        ({"architecture": None, "model": "x"}, "tokenizer needs architecture"),
        ({"tokenizer": {"vocab_sise": 300}}, "vocab_sise"),
    ],
)
def test_contradictions_are_refused(corpus: Path, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        config(corpus, **fields)


def test_defaults_of_the_stage_survive_a_partial_block(corpus: Path) -> None:
    assert config(corpus, training={"epochs": 2.0}).training.adam_beta2 == 0.95


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"architecture": {"type": "lama"}}, "architecture.type='lama' is unknown; did you mean .*llama"),
        ({"architecture": {**TINY, "num_hiden_layers": 1}}, "num_hiden_layers is not a field of llama; did you mean num_hidden_layers"),
        ({"architecture": {**TINY, "max_position_embeddings": 8}}, "block_size=16 is longer than the model's 8 positions"),
    ],
)
def test_impossible_architecture_is_refused_with_its_fields(corpus: Path, step_context: Any, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        run(config(corpus, **fields), step_context())


def test_bf16_trains_on_a_cpu(corpus: Path, step_context: Any) -> None:
    context = step_context()
    result = run(config(corpus, precision="bf16", training={"max_steps": 2, "batch_size": 4}), context)
    from safetensors.torch import load_file

    assert load_file(result.model.path / "model.safetensors")["model.norm.weight"].dtype == torch.float32  # master weights
