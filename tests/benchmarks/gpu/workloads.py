"""Models of random weights, texts, and PPO settings for the GPU table: the shapes of known models, or toy shapes of the same families.

The prompts are strings of letters, and each letter is one token, so text and tokens correspond. No token ends a response, so every response
has its full length.
"""

from __future__ import annotations

import json
import random
import string
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Scale:
    """The amount of work of one table. Lengths are in tokens. ``microbatches``: the sizes that TRL runs with."""

    shapes: dict[str, dict[str, Any]]  # name -> fields of a transformers config
    tokens: int  # size of the tokenizer's vocabulary
    batch: int  # prompts per iteration
    iterations: int
    epochs: int
    shortest_prompt: int
    longest_prompt: int
    new_tokens: int
    microbatches: tuple[int, ...]
    decoded_tokens: int  # maximum tokens of a completion when only decoding is measured
    waiting_prompts: int  # prompts for continuous batching
    decoding_slots: int
    longest_completion: int  # of continuous batching
    rounds: int


def _pythia(hidden: int, layers: int, heads: int) -> dict[str, Any]:
    return {
        "model_type": "gpt_neox",
        "vocab_size": 50304,
        "hidden_size": hidden,
        "intermediate_size": 4 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "max_position_embeddings": 2048,
    }


SHAPES: dict[str, dict[str, Any]] = {
    "135M": {
        "model_type": "llama",
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
    },
    "410M": _pythia(1024, 24, 16),
    "1B": _pythia(2048, 16, 8),
    "1B Llama": {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
    },
    "7B": {
        "model_type": "qwen2",
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
    },
}
ENCODERS = ("distilbert",)
HALF_ON_DISK = ("7B",)  # saved in bf16, as large models are
TINY_FIELDS = {"vocab_size": 320, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}


def _tiny(fields: dict[str, Any]) -> dict[str, Any]:
    """A toy model of the same family."""
    grouped = {"num_key_value_heads": 1} if "num_key_value_heads" in fields else {}
    kept = {name: value for name, value in fields.items() if name != "head_dim"}
    return {**kept, **TINY_FIELDS, **grouped, "max_position_embeddings": 256}


FULL = Scale(
    shapes=SHAPES,
    tokens=48_000,
    batch=64,
    iterations=5,
    epochs=4,
    shortest_prompt=64,
    longest_prompt=256,
    new_tokens=53,
    microbatches=(8, 16, 32, 64),
    decoded_tokens=128,
    waiting_prompts=256,
    decoding_slots=64,
    longest_completion=512,
    rounds=2,
)
TINY = Scale(
    shapes={name: _tiny(fields) for name, fields in SHAPES.items()},
    tokens=320,
    batch=4,
    iterations=3,
    epochs=1,
    shortest_prompt=4,
    longest_prompt=8,
    new_tokens=4,
    microbatches=(2, 4),
    decoded_tokens=6,
    waiting_prompts=6,
    decoding_slots=2,
    longest_completion=8,
    rounds=1,
)


def shortened(scale: Scale) -> Scale:
    """Three iterations of one epoch: enough for the peak of the memory and a speed after the first iteration."""
    return replace(scale, iterations=3, epochs=1)


def model_config(fields: dict[str, Any]) -> Any:
    """The transformers config of a shape, without special tokens except padding."""
    from transformers import CONFIG_MAPPING

    named = dict(fields)
    return CONFIG_MAPPING[named.pop("model_type")](**named, bos_token_id=None, eos_token_id=None, pad_token_id=0)


def random_model(fields: dict[str, Any], device: str, dtype: Any) -> Any:
    """A causal language model (or an encoder for masked words) of random weights in evaluation mode."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

    torch.manual_seed(0)
    auto = AutoModelForMaskedLM if fields["model_type"] in ENCODERS else AutoModelForCausalLM
    with torch.device(device):
        return auto.from_config(model_config(fields), dtype=dtype).eval()


def random_prompts(scale: Scale, number: int, vocabulary: int) -> list[list[int]]:
    """Prompts of random tokens, of random lengths."""
    draw = random.Random(0)
    lengths = [draw.randint(scale.shortest_prompt, scale.longest_prompt) for _ in range(number)]
    return [[draw.randrange(1, vocabulary) for _ in range(length)] for length in lengths]


def letter_tokens(size: int) -> Any:
    """A tokenizer of ``size`` tokens: padding, letters (from 1 on), the other bytes, and tokens that only random completions contain.

    transformers replaces the tokenizer of some families (Qwen2) by one that splits texts at spaces and digits. In it, too, each letter is a
    token.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    others = sorted(set(pre_tokenizers.ByteLevel.alphabet()) - set(string.ascii_letters))
    named = ["[PAD]", *string.ascii_letters, *others]
    ends = ["<|endoftext|>"]  # Qwen2's tokenizer would add it
    fillers = [f"<{index}>" for index in range(len(named), size - len(ends))]
    vocabulary = {name: index for index, name in enumerate([*named, *fillers, *ends])}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def prepare(scale: Scale, shape: str, folder: Path, device: str) -> Path:
    """The folder of a shape's files, which are made once.

    ``policy`` and ``reward_model`` are models. ``trl_tokenizer`` has an end token, which TRL needs; no logit belongs to it. The texts are
    ``prompts.jsonl``, ``pairs.jsonl`` (prompt, chosen, rejected), ``reviews.jsonl`` (text,
    label), and ``prompt_ids.json`` (token ids, for TRL).
    """
    workdir = folder / shape.replace(" ", "-")
    if (workdir / "ready").exists():
        return workdir
    import torch
    from transformers import PreTrainedTokenizerFast

    from stages.models.heads import RewardModel

    workdir.mkdir(parents=True, exist_ok=True)
    letters = letter_tokens(scale.tokens)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=letters, pad_token="[PAD]")
    half = shape in HALF_ON_DISK
    random_model(scale.shapes[shape], device, torch.bfloat16 if half else torch.float32).save_pretrained(workdir / "policy")
    tokenizer.save_pretrained(workdir / "policy")
    if not half and scale.shapes[shape]["model_type"] not in ENCODERS:
        RewardModel.from_language_model(str(workdir / "policy"), dtype=torch.float32).save(workdir / "reward_model", tokenizer)
    PreTrainedTokenizerFast(tokenizer_object=letters, pad_token="[PAD]", eos_token="[END]").save_pretrained(workdir / "trl_tokenizer")
    rows = random_prompts(scale, scale.batch * scale.iterations, 1 + len(string.ascii_letters))
    texts = ["".join(string.ascii_letters[token - 1] for token in row) for row in rows]
    (workdir / "prompt_ids.json").write_text(json.dumps(rows))
    (workdir / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    reviews = [{"text": text, "label": index % 2} for index, text in enumerate(texts)]
    (workdir / "reviews.jsonl").write_text("".join(json.dumps(review) + "\n" for review in reviews))
    pairs = [{"prompt": text, "chosen": text, "rejected": text[::-1]} for text in texts]
    (workdir / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    (workdir / "counting_reward.py").write_text("def words(prompts, completions):\n    return [float(len(text)) for text in completions]\n")
    (workdir / "ready").touch()
    return workdir


def settings_of(
    scale: Scale, workdir: Path, *, stage: str, quantization: str, learned_reward: bool, fields: dict[str, Any]
) -> dict[str, Any]:
    """The recipe step of one set-up. The program chooses the microbatch size unless ``fields`` has it."""
    policy = {"ref": str(workdir / "policy"), "quantization": quantization}
    common = {"stage": stage, "name": "step", "precision": "bf16"}
    if stage != "ppo":
        rows = str(workdir / ("reviews.jsonl" if stage == "sentiment" else "pairs.jsonl"))
        data = {"train": rows, "validation": {"path": rows, "limit": scale.batch // 4}}
        training = {"max_steps": 2, "batch_size": scale.batch, **fields.get("training", {})}
        return {**common, "model": policy, "data": data, **fields, "training": training}
    reward: dict[str, Any] = {"function": "counting_reward:words"}
    if learned_reward:
        reward = {"model": str(workdir / "reward_model"), "name": "preference"}
    return {
        **common,
        "policy": policy,
        "reward": [reward],
        "data": str(workdir / "prompts.jsonl"),
        "generation": {"max_new_tokens": scale.new_tokens},
        "kl_coef": 0.05,
        "total_episodes": scale.batch * scale.iterations,
        "rollout_batch_size": scale.batch,
        "minibatch_size": scale.batch,
        "ppo_epochs": scale.epochs,
        "checkpoint_seconds": 1e9,
        **({} if learned_reward or "value" in fields else {"value": "policy"}),
        **fields,
        "training": {"learning_rate": 1e-6, "max_grad_norm": None, **fields.get("training", {})},
    }
