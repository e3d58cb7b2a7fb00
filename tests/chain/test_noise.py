"""A run without problems prints nothing on stderr: no warnings of libraries, for several families, adapters, nf4 and checkpointing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

FAMILIES = {
    "gpt2": {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64},
    "llama": {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "tie_word_embeddings": True},
    "gemma2": {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
    },
    "roberta": {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 66,
    },
}
TRAINING = {"max_steps": 1, "batch_size": 4, "microbatch_size": 2}
CHECKPOINTED = {**TRAINING, "gradient_checkpointing": True}
LORA = {"r": 2}
QUANTIZED = {"ref": "sft-gpt2", "quantization": "nf4"}
PPO = {
    "stage": "ppo",
    "data": "prompts.jsonl",
    "generation": {"max_new_tokens": 3},
    "total_episodes": 4,
    "rollout_batch_size": 4,
    "minibatch_size": 4,
    "microbatch_size": 4,
    "ppo_epochs": 1,
}
STEPS: list[dict[str, Any]] = [
    {"stage": "sft", "name": "sft-gpt2", "model": "./gpt2", "data": {"train": "rows.jsonl"}, "lora": LORA, "training": CHECKPOINTED},
    {"stage": "sft", "name": "sft-gemma2", "model": "./gemma2", "data": {"train": "rows.jsonl"}, "training": CHECKPOINTED},
    {"stage": "sft", "name": "sft-llama", "model": "./llama", "data": {"train": "rows.jsonl"}, "lora": LORA, "training": TRAINING},
    {"stage": "sentiment", "name": "taste", "model": "./roberta", "data": {"train": "reviews.jsonl"}, "training": CHECKPOINTED},
    {
        "stage": "reward_model",
        "name": "preference",
        "model": "sft-gpt2",
        "data": {"train": "rows.jsonl"},
        "lora": LORA,
        "training": TRAINING,
    },
    {"stage": "dpo", "name": "direct", "model": QUANTIZED, "data": {"train": "rows.jsonl"}, "lora": LORA, "training": CHECKPOINTED},
    {
        **PPO,
        "name": "aligned",
        "policy": QUANTIZED,
        "reward": [{"model": "preference"}],
        "lora": LORA,
        "training": {"gradient_checkpointing": True},
    },
    {
        **PPO,
        "name": "steered",
        "policy": "sft-llama",
        "reward": [{"model": "taste", "label": "positive"}],
        "advantages": "rloo",
        "samples_per_prompt": 2,
    },
    {
        "stage": "evaluation",
        "name": "verdict",
        "candidates": {"sft": "sft-gpt2", "aligned": "aligned", "gemma": "sft-gemma2"},
        "data": "prompts.jsonl",
        "judges": [{"model": "taste", "label": "positive", "output": "logit"}],
        "generation": {"max_new_tokens": 3},
    },
]


@pytest.fixture
def workdir(tmp_path: Path, tiny_tokenizer: Any) -> Path:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    ids = {"vocab_size": len(tiny_tokenizer), "eos_token_id": 0, "bos_token_id": 0, "pad_token_id": 1}
    for kind, fields in FAMILIES.items():
        auto = AutoModelForSequenceClassification if kind == "roberta" else AutoModelForCausalLM
        auto.from_config(AutoConfig.for_model(kind, **ids, **fields)).save_pretrained(tmp_path / kind)
        tiny_tokenizer.save_pretrained(tmp_path / kind)
    rows = [
        {"prompt": f"film {n}", "completion": " warm", "chosen": " warm", "rejected": " dull", "text": f"film {n}", "label": n % 2}
        for n in range(12)
    ]
    tables = {"rows": ("prompt", "completion", "chosen", "rejected"), "prompts": ("prompt",), "reviews": ("text", "label")}
    for name, columns in tables.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({key: row[key] for key in columns}) + "\n" for row in rows))
    steps = "".join(f"  - {json.dumps({'precision': 'fp32', **step})}\n" for step in STEPS)
    (tmp_path / "quiet.yaml").write_text(f"name: quiet\nsteps:\n{steps}")
    return tmp_path


def test_clean_run_of_several_families_prints_nothing_on_stderr(workdir: Path) -> None:
    command = [sys.executable, "-m", "stages", "run", "quiet.yaml"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(command, cwd=workdir, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    for word in ("warn", "deprecat", "Traceback"):
        assert word not in done.stdout.lower(), done.stdout
