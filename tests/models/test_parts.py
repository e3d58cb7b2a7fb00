"""Finding a model's transformer, and the width of its hidden states."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn

from stages.errors import ModelError
from stages.models.parts import hidden_width, transformer_of

SIZES = {"vocab_size": 20, "hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}


def test_the_width_is_that_of_the_hidden_states_and_not_of_the_config() -> None:
    opt = transformers.OPTModel(transformers.OPTConfig(**SIZES, ffn_dim=24, word_embed_proj_dim=16, max_position_embeddings=8)).train()
    assert hidden_width(opt) == 16
    assert opt.training
    assert hidden_width(transformers.GPT2Model(transformers.GPT2Config(vocab_size=20, n_embd=24, n_layer=1, n_head=2))) == 24


def test_a_transformer_is_found_by_its_prefix_or_as_the_only_model_inside() -> None:
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, intermediate_size=24))
    assert transformer_of(llama) is llama.model
    llama.base_model_prefix = "language_model"  # as Llama 4's text model, which has no such attribute
    assert transformer_of(llama) is llama.model


def test_a_model_that_hides_its_transformer_is_refused() -> None:
    class Bare(transformers.PreTrainedModel):
        config_class = transformers.LlamaConfig

        def __init__(self, config: transformers.LlamaConfig) -> None:
            super().__init__(config)
            self.layer = nn.Linear(2, 2)

    with pytest.raises(ModelError, match="Bare stores its transformer under an unknown attribute"):
        transformer_of(Bare(transformers.LlamaConfig(**SIZES)))
    assert torch.is_grad_enabled()
