"""Decoding with a CUDA graph gives the same tokens as decoding without. Needs a GPU.

.venv/bin/python -m pytest -m gpu tests/gpu/test_decoding.py
"""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from stages.config import GenerationSettings
from stages.sampling import graphs, workspace
from stages.sampling.generation import Generated, generate

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"), pytest.mark.timeout(600)]


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each recording was accepted."""
    workspace.drop_kept_workspace()
    outcomes: list[bool] = []
    own = graphs.checked_recording

    def checked_recording(*arguments: Any) -> graphs.Recording | None:
        made = own(*arguments)
        outcomes.append(made is not None)
        return made

    monkeypatch.setattr(graphs, "checked_recording", checked_recording)
    return outcomes


@pytest.mark.parametrize("stops", [(), tuple(range(16))], ids=["full", "ragged"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_recorded_steps_decode_the_same_tokens_as_computed_ones(recorded, stops: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
        attn_implementation="sdpa",
    )
    model: Any = LlamaForCausalLM(config).eval().to("cuda", dtype)
    draw = random.Random(0)
    prompts = [[draw.randrange(1, 512) for _ in range(draw.randint(4, 24))] for _ in range(32)]

    def sample(**fields: Any) -> Generated:
        settings = GenerationSettings(max_new_tokens=150, batch_size=16, **fields)
        return generate(model, prompts, settings, seeds=range(32), stop_ids=stops, pad_token_id=0)

    expected = sample(cuda_graphs=False)
    assert recorded == []
    recorded_sample = sample()
    assert recorded and all(recorded)
    same = (
        (recorded_sample.response_ids == expected.response_ids)
        if recorded_sample.response_ids.shape == expected.response_ids.shape
        else torch.zeros(1)
    )
    # With a mask, another kernel runs, so one token in thousands may differ by rounding.
    assert same.float().mean() > (0.97 if dtype == torch.float32 else 0.3)
    first = recorded_sample.response_mask[:, :8] & expected.response_mask[:, :8] & same[:, :8].bool()
    torch.testing.assert_close(
        recorded_sample.logprobs[:, :8][first], expected.logprobs[:, :8][first], rtol=0, atol=1e-3 if dtype == torch.float32 else 0.1
    )
    number = len(recorded)
    assert torch.equal(sample().response_ids, recorded_sample.response_ids) and len(recorded) == number  # kept from call to call
