"""Compares the memory that ``stages plan`` predicts for a step with the measured memory, on a CPU.

    .venv/bin/python tests/benchmarks/memory_plan.py [--only NAME]

The measured memory is the peak resident memory of the run minus that of an idle process. The steps use a Llama of random weights with 30 M
parameters (512 wide, 8 layers, 8,192 tokens). Its tokens are words, and its tokenizer has no end token. So every response has its full
length, and only the settings of the step decide how much memory it needs.

Time: not measured; seven short steps. Result: printed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
VOCABULARY = 8192
IMPORTS = (
    "import torch, transformers, trl, datasets, peft, torch.utils.tensorboard, stages.ppo.loop, stages.sft.run, stages.reward_model.run"
)

PPO = {
    "stage": "ppo",
    "name": "step",
    "precision": "fp32",
    "policy": "MODEL",
    "reward": [{"model": "REWARD"}],
    "data": "prompts.jsonl",
    "generation": {"max_new_tokens": 48},
    "total_episodes": 128,
    "rollout_batch_size": 64,
    "minibatch_size": 64,
    "microbatch_size": 16,
    "ppo_epochs": 1,
    "checkpoint_seconds": 1e9,
    "training": {"learning_rate": 1e-5},
}
DATA = {"train": "pairs.jsonl", "validation": {"path": "pairs.jsonl", "limit": 8}}
TRAINING = {"max_steps": 2, "batch_size": 16, "microbatch_size": 16}
SETUPS: dict[str, dict[str, Any]] = {
    "ppo, four models": PPO,
    "ppo, value head on the policy": {**PPO, "value": "shared", "microbatch_size": 32},
    "ppo, 8-bit moments, checkpointing": {
        **PPO,
        "microbatch_size": 64,
        "training": {"learning_rate": 1e-5, "optimizer": "adamw_8bit", "gradient_checkpointing": True},
    },
    "ppo, LoRA on one backbone": {**PPO, "reward": [{"model": "ADAPTED REWARD"}], "lora": {"r": 16}, "microbatch_size": 32},
    "sft": {"stage": "sft", "name": "step", "precision": "fp32", "model": "MODEL", "data": DATA, "training": TRAINING},
    "sft, LoRA": {
        "stage": "sft",
        "name": "step",
        "precision": "fp32",
        "model": "MODEL",
        "data": DATA,
        "training": TRAINING,
        "lora": {"r": 16},
    },
    "reward model": {"stage": "reward_model", "name": "step", "precision": "fp32", "model": "MODEL", "data": DATA, "training": TRAINING},
}


def prepare(folder: Path) -> dict[str, str]:
    """Write models and data. Returns the paths of the models: name in ``SETUPS`` -> path."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from stages.config import LoraSettings
    from stages.models.heads import RewardModel

    vocabulary = {"[PAD]": 0, **{f"w{index}": index for index in range(1, VOCABULARY)}}
    blank = Tokenizer(models.WordLevel(vocabulary, unk_token="w1"))
    blank.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=blank, pad_token="[PAD]")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=512,
        intermediate_size=1376,
        num_hidden_layers=8,
        num_attention_heads=8,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    RewardModel.from_language_model(str(folder / "model"), dtype=torch.float32).save(folder / "reward", tokenizer)
    RewardModel.from_language_model(str(folder / "model"), dtype=torch.float32, lora=LoraSettings(r=16)).save(folder / "adapted", tokenizer)
    draw = random.Random(0)

    def words(number: int) -> str:
        return " ".join(f"w{draw.randrange(1, VOCABULARY)}" for _ in range(number))

    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": words(32)}) + "\n" for _ in range(128)))
    pairs = [{"prompt": words(32), "chosen": words(96), "rejected": words(96)} for _ in range(64)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return {"MODEL": str(folder / "model"), "REWARD": str(folder / "reward"), "ADAPTED REWARD": str(folder / "adapted")}


def with_paths(value: Any, names: dict[str, str]) -> Any:
    """Settings in which the names of models are replaced by paths."""
    if isinstance(value, dict):
        return {key: with_paths(item, names) for key, item in value.items()}
    if isinstance(value, list):
        return [with_paths(item, names) for item in value]
    return names.get(value, value) if isinstance(value, str) else value


def run(command: list[str]) -> str:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    return done.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=list(SETUPS))
    options = parser.parse_args()
    idle_code = f"{IMPORTS}\nimport resource; print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)"
    idle = int(run([sys.executable, "-W", "ignore", "-c", idle_code]).split()[-1])
    print(f"an idle process: {idle / 2**20:.0f} MiB")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        names = prepare(folder)
        for name, step in SETUPS.items():
            if options.only not in (None, name):
                continue
            recipe = folder / "recipe.yaml"
            recipe.write_text(json.dumps({"name": "memory", "steps": [with_paths(step, names)]}))  # JSON is YAML
            home = folder / "home" / name.replace(" ", "-").replace(",", "")
            command = [sys.executable, "-W", "ignore", "-m", "stages"]
            planned = json.loads(run([*command, "plan", str(recipe), "--home", str(home), "--json"]))["memory"][0]["bytes"]["total"]
            run([*command, "run", str(recipe), "--home", str(home)])
            summary = json.loads((home / "runs" / "memory" / "latest" / "summary.json").read_text())
            needed = summary["peak_memory_bytes"] - idle
            comparison = f"planned {planned / 2**20:6.0f} MiB   measured {needed / 2**20:6.0f} MiB   ratio {planned / needed:.2f}"
            print(f"{name:36s} {comparison}", flush=True)


if __name__ == "__main__":
    main()
