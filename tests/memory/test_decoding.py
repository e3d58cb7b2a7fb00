"""What a model keeps while it decodes, as planned, equals the bytes of the tensors of a real cache."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from stages.memory import counting
from stages.memory.decoding import cached, columns_in_place
from stages.memory.shapes import Shape, shape_of
from stages.sampling.readers import make_reader
from stages.sampling.support import decoding_support

SIZES = {
    "vocab_size": 90,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
MLA = {"kv_lora_rank": 12, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "num_key_value_heads": 4}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_expand": 2, "mamba_chunk_size": 8}
PERIOD = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]
EXPERTS = {
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "n_group": 1,
    "topk_group": 1,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "gpt_bigcode": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256},  # one key-value head
    "mistral": {"sliding_window": 10},
    "gemma3_text": {"head_dim": 16, "layer_types": PERIOD, "sliding_window": 10},
    "gpt_oss": {"head_dim": 8, "num_local_experts": 4, "layer_types": PERIOD, "sliding_window": 10},
    "deepseek_v3": {**MLA, **EXPERTS, "first_k_dense_replace": 1},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2, "mamba_d_state": 4, "mamba_dt_rank": 4},
    "bamba": {**MAMBA, "attn_layer_indices": [1]},
    "lfm2": {"layer_types": ["conv", "conv", "full_attention", "conv"]},
    "falcon_h1": {**MAMBA, "mamba_d_ssm": 64},
    "qwen3_next": {
        "layer_types": ["linear_attention", "linear_attention", "linear_attention", "full_attention"],
        "head_dim": 8,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
    },
    "gemma3n_text": {
        "head_dim": 16,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
        "sliding_window": 10,
        "num_kv_shared_layers": 2,
        "intermediate_size": 48,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 90,
        "laurel_rank": 4,
        "activation_sparsity_pattern": [0.0] * 4,
        "altup_num_inputs": 2,
    },
    "mamba": {"state_size": 4, "time_step_rank": 4},
    "mamba2": {"state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 1, "expand": 2, "chunk_size": 8},
}
PROMPT, NEW, ROWS = 21, 40, 3


@pytest.fixture(autouse=True)
def no_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counting, "_counts", {})


def shape(family: str, **fields: Any) -> Shape:
    own = FAMILIES.get(family, {})
    made = shape_of({"model_type": family, **({"vocab_size": 90} if "n_embd" in own else SIZES), **own, **fields})
    assert made is not None
    return made


def stored(cache: Any) -> float:
    """Bytes of the storages of a cache; each once."""
    storages: dict[int, int] = {}

    def walk(value: Any) -> None:
        if isinstance(value, torch.Tensor) and value.ndim:
            storages[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        for item in value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ():
            walk(item)

    for layer in cache.layers:
        walk(vars(layer))
    return sum(storages.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_the_planned_cache_has_the_bytes_of_the_tensors_of_a_real_one(family: str) -> None:
    """After the prompts are read, and after the last step. Windows are shorter than the prompts."""
    planned = shape(family)
    memory = planned.decoding("cpu", 4, 4)
    config = json.loads(planned.config)
    torch.manual_seed(0)
    kind = config.pop("model_type")
    from transformers import AutoConfig

    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **config)).eval()
    reader = make_reader(model, decoding_support(model), NEW)
    with torch.no_grad():
        reader.read(torch.randint(1, 90, (ROWS, PROMPT)), torch.ones(ROWS, PROMPT, dtype=torch.bool))
        first = stored(reader._cache)  # type: ignore[attr-defined]
        with reader.stepping():
            for _ in range(NEW - 1):
                reader.step(torch.ones(ROWS, dtype=torch.long))
    at_first, at_last = cached(memory, ROWS, PROMPT, NEW, "cpu")
    growth = ROWS * memory.largest(columns_in_place(PROMPT, NEW, by_columns=memory.by_columns)[2]) if memory.method == "in place" else 0
    assert (at_first, at_last - growth) == (first, stored(reader._cache))  # type: ignore[attr-defined]
