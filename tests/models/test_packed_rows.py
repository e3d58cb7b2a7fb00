"""Packed rows are refused for models in which a demonstration changes the next one of its row."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1] / "families"))
from catalogue import DECODERS, save  # noqa: E402

from stages.errors import ModelError  # noqa: E402
from stages.models.loading import load_language_model  # noqa: E402
from stages.models.packed_rows import refuse_leaks, refuse_mixing  # noqa: E402

SECOND, THIRD = [30, 31, 32, 33, 34, 35], [50, 51, 52, 53]


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "name", ["llama", "gpt2", "mistral", "gemma2", "qwen3_moe", "falcon-alibi", "mamba", "jamba", "qwen3_next", "bloom", "opt", "gpt_oss"]
)
def test_packing_is_refused_exactly_for_models_that_mix_demonstrations(name: str, precision: torch.dtype, tmp_path: Path) -> None:
    folder = save(DECODERS[name], tmp_path / "model", AutoModelForCausalLM)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    packed = {"input_ids": torch.tensor([SECOND + THIRD]), "position_ids": torch.tensor([[*range(6), *range(4)]])}
    with torch.no_grad():
        in_row = plain(**packed, use_cache=False).logits[0, 6:]
        alone = plain(input_ids=torch.tensor([THIRD]), use_cache=False).logits[0]
    mixes = float((in_row - alone).abs().max()) > 1e-3
    assert mixes == (name in ("mamba", "jamba", "qwen3_next", "bloom", "opt", "gpt_oss"))
    model = load_language_model(str(folder), dtype=torch.float32)
    # The second check reads no weights, for a plan.
    for check in (lambda: refuse_leaks(model, "mine", precision), lambda: refuse_mixing(AutoConfig.from_pretrained(folder), "mine")):
        if not mixes:
            check()
            continue
        with pytest.raises(ModelError) as refusal:
            check()
        problem = "a demonstration changes what the model computes for the next one in its row"
        assert str(refusal.value) == f"packing: true does not work with 'mine' ({type(plain).__name__}): {problem}. Remove packing"
