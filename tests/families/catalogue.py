"""The families of the matrix: for each, one tiny model of random weights with the kind of tokenizer that the family has.

Sizes are chosen so that errors show: heads share keys, the width of the heads is not the width of the model divided by their
number if a config allows it, sliding windows are shorter than the texts, and caps and scales change the results.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

STORY = (
    "once upon a time there was a little girl named lily who liked to play in the park with her friend tom they found a shiny stone "
    "and a red ball the cat ran after them because it wanted to play too mum said be careful the sun was warm and the sky was blue"
)
WORDS = STORY.split()
TEXTS = [" ".join(WORDS[start : start + 9]) + "." for start in range(len(WORDS) - 9)]
TEXTS += ["Größe, naïve café: 12 of 345?", "“quotes” — dash…"]
POSITIONS = 64


@dataclass(frozen=True)
class Family:
    """``kind``: transformers' model type. ``without``: unsupported checks and the message, as in docs/families.md."""

    kind: str
    fields: dict[str, Any] = field(default_factory=dict)
    tokenizer: str = "byte"
    without: dict[str, str] = field(default_factory=dict)


def _plain(**fields: Any) -> dict[str, Any]:
    """Fields that most families share."""
    return {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": POSITIONS,
        "initializer_range": 0.2,
        **fields,
    }


def _llama(**fields: Any) -> dict[str, Any]:
    """Fields that most decoders share: two heads share keys and values."""
    return _plain(**{"num_key_value_heads": 2, **fields})


def _gpt(**fields: Any) -> dict[str, Any]:
    return {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": POSITIONS, "initializer_range": 0.2, **fields}


MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
ROUTED = {"n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1, "topk_group": 1}
LATENT = {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
MLA = {**LATENT, "head_dim": 8}
LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 4,
}
EVEN = {"num_key_value_heads": 4}
WINDOW = {"sliding_window": 6}
FALCON = {"LoRA on nf4": "bitsandbytes quantizes only plain linear layers"}
LAYERS = {"layer_types": ["sliding_attention", "full_attention"]}

DECODERS: dict[str, Family] = {
    "gpt2": Family("gpt2", _gpt()),
    "gpt_neox": Family("gpt_neox", _llama(rotary_pct=0.25)),
    "gptj": Family("gptj", _gpt(rotary_dim=4)),
    "gpt_neo": Family(
        "gpt_neo",
        {
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
            "window_size": 6,
            "max_position_embeddings": POSITIONS,
            "initializer_range": 0.2,
        },
    ),
    "gpt_bigcode": Family("gpt_bigcode", _gpt()),
    "codegen": Family("codegen", _gpt(rotary_dim=4)),
    "opt": Family("opt", _llama(ffn_dim=48, word_embed_proj_dim=32, init_std=0.2)),
    "opt-projected": Family("opt", _llama(ffn_dim=48, word_embed_proj_dim=16, do_layer_norm_before=False, init_std=0.2)),
    "bloom": Family("bloom", {"hidden_size": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.2}),
    "falcon": Family("falcon", _llama(new_decoder_architecture=True, num_kv_heads=2), without=dict(FALCON)),
    "falcon-alibi": Family(
        "falcon", _llama(alibi=True, new_decoder_architecture=False, multi_query=True, parallel_attn=False, bias=True), without=dict(FALCON)
    ),
    "mpt": Family("mpt", {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": POSITIONS, "initializer_range": 0.2}),
    "llama": Family("llama", _llama(), "sentencepiece"),
    "mistral": Family("mistral", _llama(**WINDOW), "sentencepiece"),
    "mixtral": Family("mixtral", _llama(num_local_experts=4), "sentencepiece"),
    "qwen2": Family("qwen2", _llama(tie_word_embeddings=True)),
    "qwen3": Family("qwen3", _llama(head_dim=16, tie_word_embeddings=True)),
    "qwen3_moe": Family("qwen3_moe", _llama(head_dim=16, **MOE)),
    "qwen2_moe": Family("qwen2_moe", _llama(shared_expert_intermediate_size=16, **MOE)),
    "gemma": Family("gemma", _llama(head_dim=16), "unigram"),
    "gemma2": Family(
        "gemma2",
        _llama(head_dim=16, query_pre_attn_scalar=16, attn_logit_softcapping=2.0, final_logit_softcapping=3.0, **WINDOW),
        "unigram",
    ),
    "gemma3": Family("gemma3_text", _llama(head_dim=16, query_pre_attn_scalar=16, **LAYERS, **WINDOW), "unigram"),
    "phi": Family("phi", _llama(partial_rotary_factor=0.5)),
    "phi3": Family("phi3", _llama(), "sentencepiece"),
    "granite": Family("granite", _llama(embedding_multiplier=3.0, residual_multiplier=0.5, attention_multiplier=0.3, logits_scaling=4.0)),
    "granitemoe": Family("granitemoe", _llama(num_local_experts=4, logits_scaling=4.0, embedding_multiplier=3.0)),
    "cohere": Family("cohere", _llama(logit_scale=0.25, use_qk_norm=True)),
    "cohere2": Family("cohere2", _llama(logit_scale=0.25, head_dim=16, **LAYERS, **WINDOW)),
    "olmo": Family("olmo", _llama()),
    "olmo2": Family("olmo2", _llama()),
    "olmoe": Family("olmoe", _llama(num_experts=4, num_experts_per_tok=2)),
    "starcoder2": Family("starcoder2", _llama(**WINDOW)),
    "stablelm": Family("stablelm", _llama(use_qkv_bias=True)),
    "smollm3": Family("smollm3", _llama()),
    "glm4": Family("glm4", _llama(head_dim=8)),
    "nemotron": Family("nemotron", _llama(head_dim=8)),
    "exaone4": Family("exaone4", _llama(head_dim=8, **LAYERS, **WINDOW)),
    "gpt_oss": Family("gpt_oss", _llama(head_dim=8, num_local_experts=4, num_experts_per_tok=2, **LAYERS, **WINDOW)),
    "deepseek_v2": Family(
        "deepseek_v2",
        _llama(
            n_routed_experts=4,
            n_shared_experts=1,
            num_experts_per_tok=2,
            first_k_dense_replace=1,
            moe_intermediate_size=16,
            n_group=1,
            topk_group=1,
            **{**MLA, **EVEN},
        ),
    ),
    "deepseek_v3": Family(
        "deepseek_v3",
        _llama(
            n_routed_experts=4,
            n_shared_experts=1,
            num_experts_per_tok=2,
            first_k_dense_replace=1,
            moe_intermediate_size=16,
            n_group=1,
            topk_group=1,
            **{**MLA, **EVEN},
        ),
    ),
    "nanochat": Family("nanochat", _llama(final_logit_softcapping=3.0)),
    "minicpm3": Family("minicpm3", _llama(**{**MLA, **EVEN})),
    "mamba": Family("mamba", {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4, "time_step_rank": 4, "initializer_range": 0.2}),
    "falcon_mamba": Family(
        "falcon_mamba", {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4, "time_step_rank": 4, "initializer_range": 0.2}
    ),
    "mamba2": Family(
        "mamba2",
        {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "state_size": 8,
            "num_heads": 8,
            "head_dim": 8,
            "n_groups": 1,
            "expand": 2,
            "chunk_size": 8,
            "initializer_range": 0.2,
        },
    ),
    "rwkv": Family(
        "rwkv",
        {"hidden_size": 32, "num_hidden_layers": 2, "attention_hidden_size": 32, "intermediate_size": 48, "context_length": POSITIONS},
        without={"LoRA on nf4": "whose class cannot rescale nf4 weights"},
    ),
    "jamba": Family(
        "jamba",
        _llama(
            attn_layer_period=2,
            attn_layer_offset=1,
            expert_layer_period=2,
            expert_layer_offset=1,
            num_experts=2,
            mamba_d_state=4,
            mamba_dt_rank=4,
            use_mamba_kernels=False,
        ),
    ),
    "bamba": Family(
        "bamba",
        _llama(
            attn_layer_indices=[1], mamba_n_heads=8, mamba_d_head=8, mamba_d_state=8, mamba_n_groups=1, mamba_expand=2, mamba_chunk_size=8
        ),
    ),
    "lfm2": Family("lfm2", _llama(layer_types=["conv", "full_attention"], block_ff_dim=48, block_multiple_of=8)),
    "falcon_h1": Family(
        "falcon_h1",
        _llama(
            mamba_d_ssm=64,
            mamba_n_heads=8,
            mamba_d_head=8,
            mamba_d_state=8,
            mamba_n_groups=1,
            mamba_chunk_size=8,
            lm_head_multiplier=0.5,
            embedding_multiplier=2.0,
        ),
    ),
}


RECENT: dict[str, Family] = {
    "qwen3_next": Family(
        "qwen3_next",
        _llama(**MOE, **LINEAR, head_dim=8, shared_expert_intermediate_size=16, layer_types=["linear_attention", "full_attention"]),
    ),
    "qwen3_5_text": Family("qwen3_5_text", _llama(**LINEAR, head_dim=8, layer_types=["linear_attention", "full_attention"])),
    "gemma3n_text": Family(
        "gemma3n_text",
        _llama(
            **WINDOW,
            **LAYERS,
            head_dim=8,
            hidden_size_per_layer_input=8,
            num_kv_shared_layers=0,
            laurel_rank=4,
            vocab_size_per_layer_input=320,
        ),
    ),
    "gemma4_text": Family(
        "gemma4_text",
        _llama(
            **WINDOW,
            **LAYERS,
            head_dim=8,
            num_experts=4,
            moe_intermediate_size=16,
            hidden_size_per_layer_input=8,
            num_kv_shared_layers=0,
            vocab_size_per_layer_input=320,
        ),
    ),
    "llama4_text": Family(
        "llama4_text", _llama(head_dim=8, num_local_experts=4, num_experts_per_tok=2, layer_types=["chunked_attention", "full_attention"])
    ),
    "phimoe": Family("phimoe", _llama(**WINDOW, num_local_experts=4, num_experts_per_tok=2)),
    "granitemoehybrid": Family(
        "granitemoehybrid",
        _llama(
            num_local_experts=4,
            num_experts_per_tok=2,
            mamba_n_heads=8,
            mamba_d_head=8,
            mamba_d_state=8,
            mamba_n_groups=1,
            mamba_expand=2,
            mamba_chunk_size=8,
            layer_types=["mamba", "mamba"],
        ),
    ),
    "zamba2": Family(
        "zamba2",
        _llama(
            **EVEN,
            num_hidden_layers=3,
            mamba_d_state=8,
            mamba_expand=2,
            chunk_size=8,
            mamba_headdim=8,
            use_mamba_kernels=False,
            layer_types=["mamba", "hybrid", "mamba"],
            hybrid_layer_ids=[1],
            adapter_rank=4,
            num_mem_blocks=1,
            attention_head_dim=16,
            attention_hidden_size=64,
            n_mamba_heads=8,
        ),
    ),
    "xlstm": Family("xlstm", {"hidden_size": 64, "num_hidden_layers": 2, "num_heads": 4, "chunk_size": 8, "initializer_range": 0.2}),
    "recurrent_gemma": Family(
        "recurrent_gemma",
        {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "lru_width": 32,
            "attention_window_size": 6,
            "block_types": ["recurrent", "recurrent", "attention"],
            "initializer_range": 0.2,
        },
    ),
    "nemotron_h": Family(
        "nemotron_h",
        {
            **ROUTED,
            **WINDOW,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": POSITIONS,
            "initializer_range": 0.2,
            "head_dim": 8,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "moe_shared_expert_intermediate_size": 16,
            "num_nextn_predict_layers": 0,
            "mamba_num_heads": 8,
            "mamba_head_dim": 8,
            "ssm_state_size": 8,
            "n_groups": 1,
            "chunk_size": 8,
            "use_mamba_kernels": False,
        },
    ),
    "apertus": Family("apertus", _llama()),
    "olmo3": Family("olmo3", _llama(**WINDOW, **LAYERS)),
    "ernie4_5": Family("ernie4_5", _llama(head_dim=8)),
    "ernie4_5_moe": Family("ernie4_5_moe", _llama(moe_intermediate_size=16, moe_num_experts=4, moe_k=2, moe_num_shared_experts=1)),
    "hunyuan_v1_dense": Family("hunyuan_v1_dense", _llama(head_dim=8)),
    "minimax": Family(
        "minimax",
        _llama(**WINDOW, head_dim=8, num_local_experts=4, num_experts_per_tok=2, layer_types=["full_attention", "linear_attention"]),
    ),
    "minimax_m2": Family("minimax_m2", _llama(head_dim=8, num_local_experts=4, num_experts_per_tok=2)),
    "dots1": Family(
        "dots1",
        _llama(
            **ROUTED,
            **WINDOW,
            num_experts_per_tok=2,
            moe_intermediate_size=16,
            first_k_dense_replace=1,
            layer_types=["full_attention", "full_attention"],
        ),
    ),
    "glm4_moe": Family(
        "glm4_moe", _llama(**ROUTED, num_experts_per_tok=2, moe_intermediate_size=16, first_k_dense_replace=1, num_nextn_predict_layers=0)
    ),
    "glm4_moe_lite": Family("glm4_moe_lite", _llama(**LATENT, **ROUTED, **EVEN, num_experts_per_tok=2, moe_intermediate_size=16)),
    "arcee": Family("arcee", _llama(head_dim=8)),
    "helium": Family("helium", _llama(head_dim=8)),
    "kimi_linear": Family(
        "kimi_linear",
        _llama(
            **MOE,
            **MLA,
            **EVEN,
            n_shared_experts=1,
            n_group=1,
            topk_group=1,
            linear_conv_kernel_dim=4,
            layer_types=["linear_attention", "full_attention"],
        ),
    ),
    "longcat_flash": Family(
        "longcat_flash",
        {
            **MLA,
            **EVEN,
            "hidden_size": 32,
            "num_attention_heads": 4,
            "max_position_embeddings": POSITIONS,
            "initializer_range": 0.2,
            "n_routed_experts": 4,
            "num_layers": 2,
            "expert_ffn_hidden_size": 16,
            "ffn_hidden_size": 48,
            "moe_topk": 2,
            "num_hidden_layers": 4,
        },
    ),
    "modernbert-decoder": Family("modernbert-decoder", _plain(**WINDOW, layer_types=["full_attention", "sliding_attention"])),
    "ctrl": Family("ctrl", _gpt()),
    "xglm": Family(
        "xglm",
        {
            "max_position_embeddings": POSITIONS,
            "d_model": 32,
            "num_layers": 2,
            "ffn_dim": 48,
            "attention_heads": 4,
            "initializer_range": 0.2,
        },
    ),
    "biogpt": Family("biogpt", _plain()),
    "axk1": Family("axk1", _llama(**MLA, **ROUTED, **EVEN, num_experts_per_tok=2, moe_intermediate_size=16)),
    "diffllama": Family("diffllama", _llama(head_dim=8)),
    "doge": Family("doge", _llama(**WINDOW, num_experts=4, num_experts_per_tok=2)),
    "vaultgemma": Family("vaultgemma", _llama(**WINDOW, **LAYERS, head_dim=8)),
    "persimmon": Family("persimmon", _plain()),
}
"""Decoders of which tests/families tests only a few; the full matrix (benchmarks/families.py) tests all of them."""
DECODERS |= RECENT


ROBERTA = {"max_position_embeddings": POSITIONS + 2, "type_vocab_size": 1}

CLASSIFIERS: dict[str, Family] = {
    "bert": Family("bert", _plain(), "wordpiece"),
    "roberta": Family("roberta", _plain(**ROBERTA), "roberta"),
    "xlm-roberta": Family("xlm-roberta", _plain(**ROBERTA), "roberta"),
    "deberta-v2": Family(
        "deberta-v2", _plain(relative_attention=True, position_buckets=16, pos_att_type=["p2c", "c2p"], pooler_hidden_size=32), "wordpiece"
    ),
    "deberta": Family("deberta", _plain(relative_attention=True, pos_att_type=["p2c", "c2p"], pooler_hidden_size=32), "wordpiece"),
    "distilbert": Family(
        "distilbert",
        {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4, "max_position_embeddings": POSITIONS, "initializer_range": 0.2},
        "wordpiece",
    ),
    "electra": Family("electra", _plain(embedding_size=16), "wordpiece"),
    "albert": Family("albert", _plain(embedding_size=16), "wordpiece"),
    "modernbert": Family("modernbert", _plain(local_attention=8, global_attn_every_n_layers=2), "wordpiece"),
    "mpnet": Family("mpnet", _plain(max_position_embeddings=POSITIONS + 2), "wordpiece"),
    "camembert": Family("camembert", _plain(**ROBERTA), "roberta"),
}


# Tokenizers


@cache
def tokenizer_of(kind: str) -> Any:
    """byte: byte-level BPE. sentencepiece: BPE with a space before each text, byte fallback and BOS. unigram: the same as a unigram model.
    wordpiece: lower-casing, with [CLS] and [SEP]. roberta: byte-level BPE with <s> and </s>. None names a model_max_length."""
    return {"byte": _byte, "sentencepiece": _sentencepiece, "unigram": _unigram, "wordpiece": _wordpiece, "roberta": _roberta}[kind]()


def _byte() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|endoftext|>", "<|pad|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    made.train_from_iterator(TEXTS, trainer)
    return _fast(made, eos_token="<|endoftext|>", bos_token="<|endoftext|>", pad_token="<|pad|>")


def _roberta() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<mask>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    made.train_from_iterator(TEXTS, trainer)
    ends = [("<s>", 0), ("</s>", 2)]
    made.post_processor = processors.TemplateProcessing(single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=ends)
    names = {"bos_token": "<s>", "cls_token": "<s>", "eos_token": "</s>", "sep_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    return _fast(made, **names)


def _sentencepiece() -> Any:
    from tokenizers import Tokenizer, decoders, models, normalizers, processors, trainers

    special = ["<unk>", "<s>", "</s>", "<pad>", *(f"<0x{byte:02X}>" for byte in range(256))]
    made = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    made.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=360, special_tokens=special, show_progress=False))
    made.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)])
    return _fast(made, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>")


def _unigram() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    made = Tokenizer(models.Unigram())
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(prepend_scheme="always"), decoders.Metaspace(prepend_scheme="always")
    special = ["<pad>", "<eos>", "<bos>", "<unk>"]
    trainer = trainers.UnigramTrainer(vocab_size=120, special_tokens=special, unk_token="<unk>", show_progress=False)
    made.train_from_iterator(TEXTS, trainer)
    made.post_processor = processors.TemplateProcessing(single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", 2)])
    return _fast(made, bos_token="<bos>", eos_token="<eos>", unk_token="<unk>", pad_token="<pad>")


def _wordpiece() -> Any:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer, made.pre_tokenizer = normalizers.BertNormalizer(lowercase=True), pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    made.train_from_iterator(TEXTS, trainers.WordPieceTrainer(vocab_size=200, special_tokens=special, show_progress=False))
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return _fast(made, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]", mask_token="[MASK]")


def _fast(made: Any, **names: str) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=made, **names)


# Models


def config_of(family: Family, **more: Any) -> Any:
    """The family's config, with its tokenizer's vocabulary. Raises for a field that the config class does not know."""
    from transformers import CONFIG_MAPPING

    tokenizer, made = tokenizer_of(family.tokenizer), CONFIG_MAPPING[family.kind]
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    return made(**{"vocab_size": len(tokenizer), **special, **family.fields, **more})


def save(family: Family, folder: Path, auto: Any, *, seed: int = 0, **more: Any) -> Path:
    """A model of random weights with its tokenizer in ``folder``; norms and biases are drawn, too, so that none is 1 or 0."""
    import torch

    torch.manual_seed(seed)
    model = auto.from_config(config_of(family, **more), attn_implementation="eager")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 and not name.endswith(("A_log", "dt_bias", "dt_proj.bias", "time_decay", ".D")):
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(folder)
    tokenizer_of(family.tokenizer).save_pretrained(folder)
    return folder
