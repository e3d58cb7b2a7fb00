"""The local sampler returns the same as ``generate`` with the end tokens of model, tokenizer and template."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from stages.config import GenerationSettings
from stages.sampling.generation import ending_tokens, generate
from stages.sampling.sampler import LocalSampler


def test_local_sampler_equals_generate(tiny_llama_folder: Path, resolve_folder: Any) -> None:
    from stages.models.loading import load_language_model, load_tokenizer

    source = resolve_folder(tiny_llama_folder)
    tokenizer = load_tokenizer(source)
    model = load_language_model(source, dtype=torch.float32, trainable=False, tokenizer=tokenizer)
    prompts, seeds = [[5, 9, 11], [7], [20, 21]], [1, 2, 3]
    settings = GenerationSettings(max_new_tokens=12, stop=["a", "b"], stop_after=2)
    stop, late = ending_tokens(model, tokenizer, settings)
    pad = tokenizer.pad_token_id
    expected = generate(model, prompts, settings, seeds=seeds, stop_ids=stop, late_stop_ids=late, pad_token_id=pad)
    sampled = LocalSampler(model, tokenizer).sample(prompts, settings, seeds)
    for name, value in vars(expected).items():
        assert torch.equal(getattr(sampled, name), value), name
