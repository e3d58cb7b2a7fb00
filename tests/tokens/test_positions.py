"""``readable_length`` equals the length that tiny models can compute, and the numbers of published configs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers

from stages.tokens.positions import model_length, readable_length, row_length, tokenizer_length

SIZES: dict[str, dict[str, Any]] = {
    "bert": {},
    "roberta": {},
    "xlm-roberta": {},
    "camembert": {},
    "mpnet": {},
    "esm": {},
    "ibert": {},
    "data2vec-text": {},
    "roberta-prelayernorm": {},
    "nystromformer": {},
    "deberta-v2": {},
    "biogpt": {},
    "longformer": {"attention_window": 4},
    "electra": {"embedding_size": 8},
    "albert": {"embedding_size": 8},
    "distilbert": {"dim": 8, "n_layers": 1, "n_heads": 1, "hidden_dim": 8},
    "gpt2": {"n_embd": 8, "n_layer": 1, "n_head": 1},
    "gpt_bigcode": {"n_embd": 8, "n_layer": 1, "n_head": 1},
    "opt": {"ffn_dim": 8, "word_embed_proj_dim": 8},
    "mpt": {"d_model": 8, "n_layers": 1, "n_heads": 1, "max_seq_len": 20},
}


def tiny_config(kind: str, **fields: Any) -> Any:
    common = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8, "vocab_size": 30}
    config = transformers.CONFIG_MAPPING[kind]
    known = {*config().to_dict(), *config.attribute_map}
    common = {name: value for name, value in {**common, "max_position_embeddings": 20, "pad_token_id": 1}.items() if name in known}
    return config(**{**common, **SIZES.get(kind, {}), **fields})


@pytest.mark.parametrize("kind", sorted(SIZES))
def test_readable_length_is_the_longest_text_that_the_model_computes(kind: str) -> None:
    config = tiny_config(kind)
    model = transformers.AutoModel.from_config(config).eval()
    length = readable_length(config)
    assert length is not None
    with torch.no_grad():
        model(input_ids=torch.full((1, length), 5), attention_mask=torch.ones(1, length, dtype=torch.long))
        with pytest.raises((IndexError, RuntimeError, ValueError)):
            model(input_ids=torch.full((1, length + 1), 5), attention_mask=torch.ones(1, length + 1, dtype=torch.long))


@pytest.mark.parametrize(
    ("kind", "fields", "expected"),
    [
        ("roberta", {"max_position_embeddings": 514, "pad_token_id": 1}, 512),
        ("xlm-roberta", {"max_position_embeddings": 514, "pad_token_id": 1}, 512),
        ("mpnet", {"max_position_embeddings": 514, "pad_token_id": 1}, 512),
        ("llama", {"max_position_embeddings": 4096}, 4096),
        ("gptj", {"n_positions": 2048}, 2048),
        ("opt", {"max_position_embeddings": 2048}, 2048),
        ("rwkv", {"context_length": 1024}, 1024),
        ("falcon", {"alibi": False, "max_position_embeddings": 2048}, 2048),
        ("falcon", {"alibi": True, "max_position_embeddings": 2048}, None),
        ("bloom", {"seq_length": 2048}, None),
        ("mamba", {}, None),
        ("xlnet", {}, None),
        (
            "qwen2",
            {"max_position_embeddings": 32768, "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}},
            131072,
        ),
    ],
)
def test_model_length_of_published_configs(kind: str, fields: dict[str, Any], expected: int | None) -> None:
    assert model_length(transformers.CONFIG_MAPPING[kind](**fields)) == expected


def test_model_length_reads_the_text_config_of_a_model_of_several_modalities() -> None:
    config = transformers.Gemma3Config(text_config={"max_position_embeddings": 77})
    assert model_length(config) == 77


@pytest.mark.parametrize("name", ["seq_length", "max_sequence_length", "n_ctx", "model_max_length"])
def test_model_length_knows_the_names_of_models_with_their_own_code(name: str) -> None:
    assert model_length(SimpleNamespace(model_type="custom", **{name: 96})) == 96


def test_readable_length_is_the_smaller_limit_of_model_and_tokenizer() -> None:
    config = transformers.LlamaConfig(max_position_embeddings=64)
    assert readable_length(config, SimpleNamespace(model_max_length=48)) == 48
    assert readable_length(config, SimpleNamespace(model_max_length=80)) == 64
    assert readable_length(transformers.BloomConfig(), SimpleNamespace(model_max_length=80)) == 80


@pytest.mark.parametrize("sentinel", [int(1e30), 10**12, None, 0, -1])
def test_a_tokenizer_without_a_limit_sets_none(sentinel: int | None) -> None:
    tokenizer = SimpleNamespace(model_max_length=sentinel)
    assert tokenizer_length(tokenizer) is None
    assert readable_length(transformers.BloomConfig(), tokenizer) is None


@pytest.mark.parametrize(
    ("asked", "limit", "expected"), [(None, 64, 64), (32, 64, 32), (500, 64, 64), (500, None, 500), (None, None, 1024)]
)
def test_row_length_never_exceeds_what_can_be_read(
    asked: int | None, limit: int | None, expected: int, caplog: pytest.LogCaptureFixture
) -> None:
    config = transformers.BloomConfig() if limit is None else transformers.LlamaConfig(max_position_embeddings=limit)
    with caplog.at_level("WARNING"):
        assert row_length(asked, config, None, unlimited=1024) == expected
    assert ("max_length=500: lowered to 64, the limit of model and tokenizer" in caplog.text) == (asked == 500 and limit == 64)
