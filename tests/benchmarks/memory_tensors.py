"""Compares the planned bytes of a step's tensors with the measured bytes, on a CPU, for nine model families.

    .venv/bin/python tests/benchmarks/memory_tensors.py [--only WORDS] [--markdown FILE]

Each step runs with a small model of random weights. The measured value is the largest sum of the bytes of all live tensors, taken after
every tensor operation. The memory that an operation uses inside is not measured. The planned value does not include the overhead of an
allocator (``HEAP``).

Time: 15 minutes on a core that other jobs used too; twenty short steps. Result: printed, and written to --markdown; docs/memory.md.
"""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent / "gpu"))
from measures import _context  # noqa: E402
from workloads import Scale, prepare, settings_of  # noqa: E402

COMMON = {"vocab_size": 4096, "hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "max_position_embeddings": 256}
SHAPES = {
    "Llama": {"model_type": "llama", **COMMON, "intermediate_size": 688, "tie_word_embeddings": True},
    "GPT-NeoX": {"model_type": "gpt_neox", **COMMON, "intermediate_size": 1024},
    "Qwen2": {"model_type": "qwen2", **COMMON, "intermediate_size": 688, "num_key_value_heads": 2, "tie_word_embeddings": False},
    "Gemma 2": {"model_type": "gemma2", **COMMON, "intermediate_size": 688, "num_key_value_heads": 2, "head_dim": 64},
    "DistilBERT": {
        "model_type": "distilbert",
        **{"vocab_size": 4096, "dim": 256, "hidden_dim": 1024, "n_layers": 4, "n_heads": 4, "max_position_embeddings": 256},
    },
    "LFM2": {
        "model_type": "lfm2",
        **COMMON,
        "intermediate_size": 688,
        "block_auto_adjust_ff_dim": False,
        "num_key_value_heads": 2,
        "layer_types": ["conv", "full_attention", "conv", "conv"],
    },
    "Bamba": {
        "model_type": "bamba",
        **{**COMMON, "intermediate_size": 688, "num_key_value_heads": 2, "attn_layer_indices": [1], "tie_word_embeddings": True},
        **{"mamba_n_heads": 16, "mamba_d_head": 32, "mamba_d_state": 64, "mamba_n_groups": 1, "mamba_expand": 2, "mamba_chunk_size": 32},
    },
    "DeepSeek V3": {
        "model_type": "deepseek_v3",
        **{**COMMON, "intermediate_size": 688, "num_key_value_heads": 4, "kv_lora_rank": 64, "q_lora_rank": 96, "v_head_dim": 64},
        **{"qk_rope_head_dim": 32, "qk_nope_head_dim": 64, "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
        **{"moe_intermediate_size": 128, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
    },
    "Gemma 3": {"model_type": "gemma3_text", **COMMON, "intermediate_size": 688, "num_key_value_heads": 1, "head_dim": 64},
}
SCALE = Scale(
    shapes=SHAPES,
    tokens=4096,
    batch=16,
    iterations=2,
    epochs=1,
    shortest_prompt=40,
    longest_prompt=64,
    new_tokens=32,
    microbatches=(),
    decoded_tokens=0,
    waiting_prompts=0,
    decoding_slots=0,
    longest_completion=0,
    rounds=0,
)
STEPS = 6  # optimizer steps of a stage with a Trainer
LORA: dict[str, Any] = {"lora": {"r": 16}}
CHECKPOINTED = {"training": {"gradient_checkpointing": True}}
SETUPS: dict[str, dict[str, Any]] = {
    "Llama, PPO, full": {"shape": "Llama"},
    "Llama, PPO, shared head": {"shape": "Llama", "fields": {"value": "shared"}},
    "Llama, PPO, LoRA": {"shape": "Llama", "fields": LORA, "learned": False},
    "Llama, PPO, checkpointing, 8-bit moments": {
        "shape": "Llama",
        "fields": {"training": {"gradient_checkpointing": True, "optimizer": "adamw_8bit"}},
    },
    "Llama, SFT, full": {"shape": "Llama", "stage": "sft"},
    "Llama, SFT, LoRA with the start of PiSSA": {
        "shape": "Llama",
        "stage": "sft",
        "fields": {"lora": {"r": 64, "init_lora_weights": "pissa"}},
    },
    "GPT-NeoX, PPO, full, bf16": {"shape": "GPT-NeoX", "fields": {"precision": "bf16"}},
    "GPT-NeoX, PPO, LoRA, bf16": {"shape": "GPT-NeoX", "fields": {**LORA, "precision": "bf16"}, "learned": False},
    "GPT-NeoX, SFT, LoRA": {"shape": "GPT-NeoX", "stage": "sft", "fields": LORA},
    "Qwen2, PPO, full": {"shape": "Qwen2"},
    "Qwen2, PPO, nf4 LoRA, checkpointing, bf16": {
        "shape": "Qwen2",
        "fields": {**LORA, **CHECKPOINTED, "precision": "bf16"},
        "learned": False,
        "quantization": "nf4",
    },
    "Qwen2, reward model": {"shape": "Qwen2", "stage": "reward_model"},
    "Llama, reward model, one pass per step": {
        "shape": "Llama",
        "stage": "reward_model",
        "fields": {"training": {"batch_size": 3}},
        "scale": {"shortest_prompt": 64},  # texts of one length
    },
    "Gemma 2 (capped scores and logits), PPO, full": {"shape": "Gemma 2"},
    "Gemma 3, PPO, LoRA": {"shape": "Gemma 3", "fields": LORA, "learned": False},
    "Llama, DPO, full": {"shape": "Llama", "stage": "dpo"},
    "Llama, DPO, LoRA, bf16": {"shape": "Llama", "stage": "dpo", "fields": {**LORA, "precision": "bf16"}},
    "LFM2 (convolutions and attention), PPO, full": {"shape": "LFM2"},
    "Bamba (Mamba 2 and attention), PPO, LoRA": {"shape": "Bamba", "fields": LORA, "learned": False},
    "DeepSeek V3 (compressed keys, experts), PPO, full": {"shape": "DeepSeek V3"},
    "Llama, PPO, LoRA on queries and values, copy of the output layer": {
        "shape": "Llama",
        "fields": {"lora": {"r": 16, "target_modules": ["q_proj", "v_proj"], "modules_to_save": ["lm_head"]}},
        "learned": False,
    },
    "Llama, PPO, LoRA on int8": {"shape": "Llama", "fields": LORA, "learned": False, "quantization": "int8"},
    "DistilBERT, classifier": {"shape": "DistilBERT", "stage": "sentiment", "fields": {"max_length": 128}},
}


def planned_and_measured(setup: dict[str, Any], work: Path) -> tuple[float, float]:
    """(planned bytes, measured bytes) of a step's tensors."""
    import trl.trainer.utils

    from stages.chain.run import run_function
    from stages.memory.estimate import Machine
    from stages.memory.fake_passes import LiveBytes
    from stages.memory.lengths import Counter
    from stages.memory_plan.views import folder_of, loaded, views_of
    from stages.recipe.schema import STAGES, load_recipe
    from stages.registry.ledger import Registry

    # Of a tile that is wider than the vocabulary, a CPU never touches the rest, so it takes no memory.
    trl.trainer.utils._CHUNKED_LOGPROB_CHUNK_SIZE = COMMON["vocab_size"]
    stage, scale = setup.get("stage", "ppo"), replace(SCALE, **setup.get("scale", {}))
    files = prepare(scale, setup["shape"], work / ("other lengths" if "scale" in setup else "usual"), "cpu")
    sys.path.insert(0, str(files))
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        fields = {"precision": "fp32", **setup.get("fields", {})}
        if stage != "ppo":  # enough steps for passes of the planned size
            fields["training"] = {"max_steps": STEPS, **fields.get("training", {})}
        quantization, learned = setup.get("quantization", "none"), setup.get("learned", stage == "ppo")
        settings = settings_of(scale, files, stage=stage, quantization=quantization, learned_reward=learned, fields=fields)
        (home / "recipe.yaml").write_text(json.dumps({"name": "tensors", "steps": [settings]}))
        registry = Registry(home / "registry")
        step = load_recipe(home / "recipe.yaml", [], registry).steps[0]
        planner = importlib.import_module(str(STAGES[stage].memory))
        models = loaded(views_of(step, {}, {}, registry)[0], step.config)
        lengths = planner.lengths_of(step.config, Counter(folder_of(step, registry, {})))
        planned = planner.estimate(step.config, models, lengths, Machine("cpu", 8 << 30, 4, "this machine"), 1)
        context, _ = _context(step, home, registry)
        with LiveBytes(counts_inputs=True) as live:
            run_function(stage)(step.config, context)
    return planned.total, live.peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[], metavar="WORD")
    parser.add_argument("--markdown", type=Path, metavar="FILE")
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    rows = ["| step | planned, MiB | measured, MiB | planned / measured |", "|---|---|---|---|"]
    with tempfile.TemporaryDirectory() as work:
        for name, setup in SETUPS.items():
            if not all(word.lower() in name.lower() for word in options.only):
                continue
            planned, peak = planned_and_measured(setup, Path(work))
            rows.append(f"| {name} | {planned / 2**20:.0f} | {peak / 2**20:.0f} | {planned / peak:.2f} |")
            print(rows[-1], flush=True)
    if options.markdown is not None:
        options.markdown.write_text("\n".join(rows) + "\n")


if __name__ == "__main__":
    main()
