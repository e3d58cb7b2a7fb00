"""Models that are refused before a vLLM server starts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from stages.config import GenerationSettings, ModelInput
from stages.engines.opening import Workplace, open_sampler
from stages.errors import ModelError
from stages.models.loaded import LoadedModel
from stages.models.loading import load_language_model, load_tokenizer
from stages.process.runtime import Runtime
from stages.registry.references import ResolvedModel


def test_heads_that_vllm_cannot_compute_on_a_cpu_are_refused_before_a_server_starts(tiny_llama_folder: Path, tmp_path: Path) -> None:
    """The tiny Llama is 32 wide with 4 heads, so its heads have 8 dimensions.

    The interpreter does not exist, so a start would fail with another error.
    """
    source = ResolvedModel("tiny", "folder", str(tiny_llama_folder), "sha256:test", ModelInput(ref=str(tiny_llama_folder)))
    tokenizer = load_tokenizer(source)
    model = load_language_model(source, dtype=torch.float32, trainable=False, tokenizer=tokenizer)
    settings = GenerationSettings.model_validate({"engine": {"vllm": {"start": {"python": "/nowhere"}}}})
    workplace = Workplace(Runtime(quiet=True), tmp_path / "vllm.log", tmp_path)
    opened = open_sampler(settings, LoadedModel(model, tokenizer, source, torch.float32), workplace)
    with pytest.raises(ModelError, match=r"heads of 'tiny' have 8 dimensions, and vLLM's build for CPUs has only heads of 32, 64"), opened:
        pass
