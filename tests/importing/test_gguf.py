"""GGUF files of llama.cpp: the published weights are the dequantized ones, and the note tells how they were stored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from stages.errors import ModelError
from stages.importing.run import import_model
from stages.models.loading import load_language_model
from stages.registry.ledger import Registry

gguf = pytest.importorskip("gguf")
WIDTH, WORDS = 32, 40
PARTS = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


def written(path: Path, model: Any, kind: Any) -> None:
    """Write ``model`` as llama.cpp's converter does; ``kind`` is the type of its matrices. One attention head of width 32.

    llama.cpp interleaves the two halves of each query and key, which rotary embeddings pair.
    """
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(1)
    writer.add_feed_forward_length(WIDTH)
    writer.add_head_count(1)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_dimension_count(WIDTH)
    writer.add_vocab_size(WORDS)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(["<unk>", "<s>", "</s>", *(chr(ord("!") + n) for n in range(WORDS - 4)), '!"'])
    writer.add_token_types([3, 3, 3, *[1] * (WORDS - 3)])
    writer.add_token_merges(['! "'])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)

    def add(name: str, value: Tensor) -> None:
        if name.endswith(("attn_q.weight", "attn_k.weight")):
            value = value.reshape(2, WIDTH // 2, WIDTH).transpose(0, 1).reshape(WIDTH, WIDTH)
        array = value.float().numpy()
        if array.ndim == 1:
            writer.add_tensor(name, array)
        else:
            writer.add_tensor(name, gguf.quants.quantize(array, kind), raw_dtype=kind)

    state = model.state_dict()
    add("token_embd.weight", state["model.embed_tokens.weight"])
    for name, part in PARTS.items():
        add(f"blk.0.{name}.weight", state[f"model.layers.0.{part}.weight"])
    add("output_norm.weight", state["model.norm.weight"])
    if not model.config.tie_word_embeddings:
        add("output.weight", state["lm_head.weight"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize(
    ("kind", "is_tied", "note"), [("Q8_0", False, "were quantized in the file (9 Q8_0, 3 F32)"), ("BF16", True, "8 BF16, 3 F32")]
)
def test_import_gguf_equals_the_dequantized_model(tmp_path: Path, kind: str, is_tied: bool, note: str) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=WORDS,
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=1,
        tie_word_embeddings=is_tied,
        max_position_embeddings=64,
    )
    model = LlamaForCausalLM(config).eval()
    kind_of_file = gguf.GGMLQuantizationType[kind]
    written(tmp_path / "a model.GGUF", model, kind_of_file)
    with torch.no_grad():  # the independent reference: round every matrix as the file does
        for value in model.parameters():
            if value.ndim == 2:
                value.copy_(
                    torch.tensor(gguf.quants.dequantize(gguf.quants.quantize(value.numpy(), kind_of_file), kind_of_file)).reshape(
                        value.shape
                    )
                )

    imported = import_model(tmp_path / "a model.GGUF", Registry(tmp_path / "registry"), "base")

    assert any(note in said for said in imported.notes)
    loaded = load_language_model(imported.records[0].path, dtype=torch.float32, trainable=False)
    ids = torch.tensor([[3, 7, 5, 9, 4]])
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids=ids).logits[..., :WORDS], model(input_ids=ids).logits)


@pytest.mark.parametrize("content", [b"", b"GGUF\x03\x00\x00\x00", b"hello world" * 20])
def test_import_refuses_a_damaged_gguf_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "m.gguf").write_bytes(content)
    with pytest.raises(ModelError, match="cannot read this GGUF file"):
        import_model(tmp_path / "m.gguf", Registry(tmp_path / "registry"), "base")
