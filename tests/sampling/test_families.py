"""Every kind of model decodes the same tokens as plain transformers: eager attention, no cache, one unpadded row at a time, argmax.

The models are tiny and random, with weights so large (standard deviation 0.3) that a wrong position, mask or state changes the tokens.
"""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from stages.config import GenerationSettings
from stages.errors import ModelError
from stages.models.causality import require_causal
from stages.models.layers.dropout import disable_dropout
from stages.models.layers.replacing import use_own_layers
from stages.models.passes.responses import Policy, sequence_batch
from stages.sampling import decoding, probe
from stages.sampling.generation import Generated, generate
from stages.sampling.probe import usable_support
from stages.sampling.support import decoding_support

VOCABULARY = 64
# Names of several families; each config takes those that it knows.
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "n_embd": 32,
    "d_model": 32,
    "num_hidden_layers": 2,
    "n_layer": 2,
    "n_layers": 2,
    "num_layers": 2,
    "decoder_layers": 2,
    "encoder_layers": 1,
    "num_attention_heads": 4,
    "n_head": 4,
    "n_heads": 4,
    "num_heads": 4,
    "decoder_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
    "ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "n_inner": 48,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "max_position_embeddings": 96,
    "n_positions": 96,
    "max_seq_len": 96,
    "sliding_window": 8,
    "attention_chunk_size": 8,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "mamba_d_state": 8,
    "state_size": 8,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "attention_hidden_size": 32,
    "lru_width": 32,
    "attention_window_size": 8,
    "window_size": 8,
    "bos_token_id": 1,
    "eos_token_id": 0,
    "pad_token_id": 0,
    "is_decoder": True,
}
HYBRID = {"layer_types": ["linear_attention", "full_attention"]}
MLA = {"num_key_value_heads": 4}
BLT = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 1, "intermediate_size": 48}
FAMILIES: dict[str, dict[str, Any]] = {
    # a cache that is written in place
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "gemma": {},
    "granite": {},
    "cohere": {},
    "olmo2": {},
    "starcoder2": {},
    "mixtral": {},
    "gpt_neox": {},
    "gptj": {"rotary_dim": 4},
    "codegen": {"rotary_dim": 4},
    "deepseek_v3": MLA,
    "minicpm3": MLA,
    # learned, offset or computed positions
    "gpt2": {},
    "opt": {},
    "gpt_bigcode": {},
    "biogpt": {},
    "xglm": {},
    "ctrl": {},
    "roberta": {},
    "bart": {},
    "openai-gpt": {},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    # a bias from a two-dimensional mask, or none
    "bloom": {},
    "mpt": {},
    "falcon": {"alibi": False},
    "stablelm": {},
    # sliding windows, chunks and layers of several kinds
    "mistral": {},
    "phi3": {},
    "gemma2": {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 5.0},
    "gpt_oss": {},
    "gemma3_text": {"layer_types": ["sliding_attention", "full_attention"]},
    "llama4_text": {},
    "deepseek_v32": MLA,
    "cohere2": {"layer_types": ["sliding_attention", "full_attention"]},
    # states instead of a cache, or with a cache
    "mamba": {},
    "falcon_mamba": {},
    "rwkv": {},
    "qwen3_next": HYBRID,
    "olmo_hybrid": HYBRID,
    "minimax": HYBRID,
    "mamba2": {"num_heads": 4, "head_dim": 16, "expand": 2, "n_groups": 1, "chunk_size": 4},
    "bamba": {"attn_layer_indices": [1], "mamba_expand": 2, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1},
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "use_mamba_kernels": False,
        "mamba_dt_rank": 4,
    },
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    # no number of layers, so no cache can be made
    "blt": {
        "encoder_hash_byte_group_vocab": 97,
        "encoder_hash_byte_group_size": [3, 4],
        "patcher_config": BLT,
        "encoder_config": {**BLT, "hidden_size_global": 64},
        "decoder_config": {**BLT, "hidden_size_global": 64},
        "global_config": {**BLT, "hidden_size": 64},
    },
}
VARIANTS = {
    **{kind: (kind, fields) for kind, fields in FAMILIES.items()},
    "falcon with alibi": ("falcon", {"alibi": True, "new_decoder_architecture": False}),
    "opt with projection": ("opt", {"word_embed_proj_dim": 16, "do_layer_norm_before": False}),
    "output wider than the tokenizer": ("llama", {"vocab_size": VOCABULARY + 40}),
    "scaled logits": ("granite", {"logits_scaling": 0.25, "residual_multiplier": 0.5}),
}
PROMPTS = [[10, 11, 12, 13, 14], [20], [30, 31, 32], [40, 41, 42, 43, 44, 45, 46, 47, 48, 49, 50], [30, 31, 32]]
NEW_TOKENS = 24  # three times the sliding windows
STOPS = tuple(range(2, VOCABULARY, 9))  # rows end at different times


def make(kind: str, attention: str | None = None, **fields: Any) -> Any:
    made = CONFIG_MAPPING[kind]
    known = {*made().to_dict(), *made.attribute_map}
    config = made(**{**{name: value for name, value in SIZES.items() if name in known}, **fields})
    options = {"attn_implementation": attention} if attention else {}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, **options).eval()
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 or name.endswith("bias"):
                parameter.copy_(torch.randn(parameter.shape, generator=draw) * (0.3 if parameter.dim() > 1 else 0.1))
    return model


@torch.no_grad()
def plain(model: Any, prompt: list[int]) -> tuple[list[int], list[float]]:
    """The greedy completion of one prompt and the log-probability of each token."""
    ids, logprobs = list(prompt), []
    for _ in range(NEW_TOKENS):
        logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].float().log_softmax(-1)
        ids.append(int(logits.argmax()))
        logprobs.append(float(logits[ids[-1]]))
        if ids[-1] in STOPS:
            break
    return ids[len(prompt) :], logprobs


def sample(model: Any, prompts: list[list[int]] = PROMPTS, **settings: Any) -> Generated:
    chosen = GenerationSettings(**{"max_new_tokens": NEW_TOKENS, "temperature": 0.0, **settings})
    return generate(model, prompts, chosen, seeds=range(len(prompts)), stop_ids=STOPS, pad_token_id=0)


@pytest.mark.parametrize("name", VARIANTS)
def test_family_decodes_the_tokens_of_plain_forward_passes(name: str) -> None:
    kind, fields = VARIANTS[name]
    model = make(kind, **fields)
    try:
        reference = make(kind, "sdpa" if name == "falcon with alibi" else "eager", **fields)  # Falcon's eager attention adds ALiBi twice
    except ValueError:  # a family with only one attention implementation
        reference = model
    expected = {tuple(prompt): plain(reference, prompt) for prompt in PROMPTS}
    use_own_layers(model)
    generated = sample(model)
    for row, prompt in enumerate(PROMPTS):
        ids, logprobs = expected[tuple(prompt)]
        mask = generated.response_mask[row]
        assert generated.response_ids[row][mask].tolist() == ids
        torch.testing.assert_close(generated.logprobs[row][mask], torch.tensor(logprobs), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "fields", "way"),
    [
        ("llama", {}, "in place"),
        ("gpt2", {}, "in place"),
        ("mistral", {}, "padded"),
        ("bloom", {}, "padded"),
        ("mpt", {}, "padded"),
        ("mamba", {}, "padded"),
        ("qwen3_next", HYBRID, "padded"),
        ("bart", {}, "equal lengths"),
        ("roberta", {}, "without a cache"),
        ("rwkv", {}, "without a cache"),
    ],
)
def test_class_gets_the_fastest_correct_decoding_method(kind: str, fields: dict[str, Any], way: str) -> None:
    support = usable_support(make(kind, **fields))
    cached = {"in place": support.adds_mask, "padded": support.hides_padding, "equal lengths": True}
    assert next((name for name, is_correct in cached.items() if support.cache_name and is_correct), "without a cache") == way


def test_flash_attention_gets_a_two_dimensional_mask() -> None:
    model = make("llama")
    model.config._attn_implementation = "flash_attention_2"
    support = decoding_support(model)
    assert not support.adds_mask and support.hides_padding


def test_class_with_a_wrong_cache_is_decoded_by_another_method_and_logged(monkeypatch, caplog) -> None:
    monkeypatch.setattr(probe, "_said", set())
    model = make("bart")  # counts its positions from the first column, padding or not
    expected = [plain(model, prompt)[0] for prompt in PROMPTS]
    wrong = decoding_support(model).__class__(**{**vars(decoding_support(model)), "hides_padding": True})
    monkeypatch.setattr(probe, "decoding_support", lambda model: wrong)
    with caplog.at_level(logging.WARNING):
        generated = sample(model)
    assert [ids[mask].tolist() for ids, mask in zip(generated.response_ids, generated.response_mask, strict=True)] == expected
    assert len(caplog.messages) == 1 and "BartForCausalLM is decoded in batches of equal length" in caplog.messages[0]


def test_model_is_probed_once(monkeypatch) -> None:
    tried = []
    monkeypatch.setattr(probe, "_problem", lambda model, way: tried.append(way))
    mistral, llama = make("mistral"), make("llama")
    for model in (mistral, llama, mistral, llama):
        sample(model)
    assert len(tried) == 1


def test_recurrent_state_rows_can_be_dropped_and_repeated(monkeypatch) -> None:
    model = make("qwen3_next", **HYBRID)
    monkeypatch.setattr(decoding, "COMPACT_BELOW", 1.0)  # at every row that ends
    generated = sample(model, PROMPTS * 2, batch_size=10)
    assert torch.equal(generated.response_ids[:5], generated.response_ids[5:])
    for row, prompt in enumerate(PROMPTS):
        assert generated.response_ids[row][generated.response_mask[row]].tolist() == plain(model, prompt)[0]


@pytest.mark.parametrize(
    "name", ["bloom", "falcon with alibi", "mpt", "mistral", "mixtral", "llama4_text", "mamba", "qwen3_next", "recurrent_gemma", "roberta"]
)
def test_right_padded_sequences_without_a_mask_have_the_log_probabilities_of_their_rows_alone(name: str) -> None:
    kind, fields = VARIANTS[name]
    reference, model = make(kind, **fields), make(kind, **fields)
    disable_dropout(model)
    use_own_layers(model)
    responses = [[5, 6, 7], list(range(8, 28)), [33], list(range(50, 60)), [61]]
    expected = []
    with torch.no_grad():
        for prompt, response in zip(PROMPTS, responses, strict=True):
            logits = reference(input_ids=torch.tensor([prompt + response]), use_cache=False).logits[0, len(prompt) - 1 : -1]
            expected.append(logits.log_softmax(-1)[range(len(response)), response])
    policy = Policy(model.train(), temperature=1.0, autocast=None)
    batch = sequence_batch(PROMPTS, responses, 0, "cpu")
    torch.testing.assert_close(policy.logprobs(batch), torch.cat(expected), rtol=1e-3, atol=1e-4)
    loss = policy.loss(batch, lambda logprobs, entropies, rows: -logprobs)  # the forward pass of training
    loss.summed.backward()
    torch.testing.assert_close(loss.logprobs, torch.cat(expected), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", ["bert", "roberta", "electra", "xlnet"])
def test_a_model_that_looks_ahead_is_refused_when_it_is_loaded(kind: str) -> None:
    model = make(kind, **({} if kind == "xlnet" else {"is_decoder": False}))
    with pytest.raises(ModelError, match=r"'mine' \(\w+\) is not a causal language model"):
        require_causal(model, "mine")
    with pytest.raises(ModelError, match="cannot generate token by token"):
        sample(model)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bloom", "mamba", "rwkv", "bart", "bert"])
def test_a_causal_model_is_not_refused(kind: str) -> None:
    require_causal(make(kind), "mine")


@pytest.mark.parametrize("kind", ["gpt2", "opt", "llama", "roberta"])
def test_prompt_without_room_for_its_completion_gives_one_message(kind: str) -> None:
    model = make(kind)
    positions = 95 if kind == "roberta" else 96  # whose first position is that of the pad token
    fits, too_long = [5] * (positions - NEW_TOKENS), [5] * (positions - NEW_TOKENS + 1)
    sample(model, [fits, [5]])
    with pytest.raises(ModelError, match=rf"1 of 2 prompts .* {positions} positions, of which generation.max_new_tokens=24"):
        sample(model, [too_long, [5]])
