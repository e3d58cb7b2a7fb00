"""PPO with random weights of the shapes in the recipes for one GPU: it runs, and its peak memory is as planned.

.venv/bin/python -m pytest -m gpu tests/gpu/test_sizes.py -s        # prints peak memory and tokens per second

On the pretended GPU (tests/pretend_gpu/run.py) the models and the texts are tiny. Then only the run is tested, not its memory.
"""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from stages.memory.shapes import KNOWN_MODELS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.timeout(3600),
]
PRETENDED = "PRETEND_GPU" in os.environ
VOCABULARY, PROMPTS, WORDS, NEW_TOKENS = (500, 16, 24, 8) if PRETENDED else (8192, 128, 256, 53)
"""Number of words in the prompts (the vocabularies of the models are larger); prompts; words of a prompt; tokens of a completion."""
TINY = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES = {
    # recipe: (known model, minimum memory of the GPU in bytes, step fields)
    "instructgpt-1b, LoRA": ("EleutherAI/pythia-1b-deduped", 16, {"lora": {"r": 16}, "microbatch_size": 8}),
    "instructgpt-1b, full": ("EleutherAI/pythia-1b-deduped", 48, {"microbatch_size": 8}),
    "instructgpt-7b-qlora": (
        "Qwen/Qwen2.5-7B",
        24,
        {"lora": {"r": 16}, "microbatch_size": 8, "quantized": True, "training": {"gradient_checkpointing": True}},
    ),
}


@pytest.fixture
def random_model(tmp_path: Path) -> Any:
    """random_model(hub id) -> folder of a model of that shape with random weights and a tokenizer of words without an end token."""
    from ruamel.yaml import YAML
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedTokenizerFast

    def make(identifier: str) -> Path:
        fields = dict(YAML(typ="safe").load(KNOWN_MODELS)[identifier])
        if PRETENDED:
            fields |= {**TINY, **({"num_key_value_heads": 2} if "num_key_value_heads" in fields else {})}
        config = CONFIG_MAPPING[fields.pop("model_type")](**fields, bos_token_id=None, eos_token_id=None, pad_token_id=0)
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model.save_pretrained(tmp_path / "model")
        blank = Tokenizer(models.WordLevel({"[PAD]": 0, **{f"w{index}": index for index in range(1, VOCABULARY)}}, unk_token="w1"))
        blank.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        PreTrainedTokenizerFast(tokenizer_object=blank, pad_token="[PAD]").save_pretrained(tmp_path / "model")
        return tmp_path / "model"

    return make


@pytest.mark.parametrize("size", SIZES)
def test_ppo_needs_the_planned_memory(random_model, step_context, resolve_folder, tmp_path, monkeypatch, capsys, size) -> None:
    from stages.memory.estimate import Machine
    from stages.memory.models import View
    from stages.memory.shapes import shape_of_folder
    from stages.memory_plan.steps import lengths_of, memory_of
    from stages.ppo.config import PPOStepConfig
    from stages.ppo.loop import run
    from stages.process.gpus import own_peak

    identifier, gibibytes, fields = SIZES[size]
    total = torch.cuda.get_device_properties(0).total_memory
    if total < gibibytes * 2**30 * 0.95:
        pytest.skip(f"needs a card of {gibibytes} GiB")
    folder = random_model(identifier)
    draw = random.Random(0)
    prompts = [" ".join(f"w{draw.randrange(1, VOCABULARY)}" for _ in range(WORDS)) for _ in range(PROMPTS)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    (tmp_path / "counting_reward.py").write_text("def words(prompts, completions): return [len(text.split()) for text in completions]")
    monkeypatch.syspath_prepend(str(tmp_path))
    fields = dict(fields)
    quantization = "nf4" if fields.pop("quantized", False) else "none"
    config = PPOStepConfig.model_validate(
        {
            "name": "aligned",
            "policy": {"ref": "policy", "quantization": quantization},
            "value": "policy",
            "precision": "bf16",
            "reward": [{"function": "counting_reward:words"}],
            "data": str(tmp_path / "prompts.jsonl"),
            "generation": {"max_new_tokens": NEW_TOKENS},
            "total_episodes": PROMPTS,
            "rollout_batch_size": PROMPTS // 2,
            "minibatch_size": PROMPTS // 2,
            "ppo_epochs": 1,
            **fields,
        }
    )
    context = step_context("sizes/aligned", models={"policy": resolve_folder(folder, quantization=quantization)})
    with own_peak() as measured:  # the maximum of this run: each of its phases resets the counter of torch
        run(config, context)
    peak = measured.total
    shape = shape_of_folder(folder)
    assert shape is not None
    view = View(shape, "base", quantization=quantization)
    planned = memory_of(config, {"policy": view}, lengths_of(config, folder), Machine("cuda", total, 2, "this card"), 1)
    assert planned is not None
    last = json.loads((context.folder / "metrics.jsonl").read_text().splitlines()[-1])
    with capsys.disabled():
        print(  # noqa: T201
            f"\n{size}: peak {peak / 2**30:.2f} GiB, planned {planned.total / 2**30:.2f} GiB; generation "
            f"{last['time/generation_tokens_per_second']:.0f} tokens/s, update {last['time/update_tokens_per_second']:.0f} tokens/s, "
            f"{last['time/update_matmul_share']:.0%} of the matmul peak"
        )
    assert PRETENDED or 0.85 < planned.total / peak < 1.15
