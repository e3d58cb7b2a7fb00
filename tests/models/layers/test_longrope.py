"""Models with longrope: the outputs of a row do not depend on the other rows of its pass.

The reference is transformers' own model without changes, eager attention, one row at a time.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import Phi3Config, Phi3ForCausalLM

from stages.config import GenerationSettings
from stages.errors import ModelError
from stages.models.heads import hidden_states
from stages.models.layers.longrope import choose_frequencies_by_sequence
from stages.models.passes.likelihood import measure_likelihood
from stages.models.passes.responses import Policy, sequence_batch
from stages.sampling.generation import generate

ORIGINAL = 8  # tokens
LENGTHS = [(3, 2), (10, 4), (6, 2), (7, 2)]  # of prompt and response; the second and the last are longer than ORIGINAL together


@pytest.fixture(scope="module")
def plain() -> Any:
    rope = {"rope_type": "longrope", "short_factor": [1.0, 1.2, 1.4, 1.6], "long_factor": [2.0, 5.0, 9.0, 14.0], "rope_theta": 100.0}
    config = Phi3Config(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        original_max_position_embeddings=ORIGINAL,
        rope_parameters={**rope, "original_max_position_embeddings": ORIGINAL},
        pad_token_id=0,
        eos_token_id=None,
        initializer_range=0.3,  # with the usual small weights, attention hardly depends on positions
        attn_implementation="eager",
    )
    torch.manual_seed(3)
    return Phi3ForCausalLM(config).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def model(plain: Any) -> Any:
    made = copy.deepcopy(plain)
    made.config._attn_implementation = made.model.config._attn_implementation = "sdpa"
    assert choose_frequencies_by_sequence(made) == 1 and choose_frequencies_by_sequence(made) == 0
    return made


@pytest.fixture(scope="module")
def texts() -> list[tuple[list[int], list[int]]]:
    generator = torch.Generator().manual_seed(1)
    return [tuple(torch.randint(1, 40, (count,), generator=generator).tolist() for count in counts) for counts in LENGTHS]  # type: ignore[misc]


def logprobs_alone(plain: Any, prompt: list[int], response: list[int]) -> torch.Tensor:
    """Log-probabilities of a response [R]."""
    ids = torch.tensor([prompt + response])
    logits = plain(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(dim=-1).gather(1, torch.tensor(response)[:, None])[:, 0]


@pytest.mark.parametrize("kernel", [None, "padded"], ids=["rows are padded", "rows are packed"])
def test_logprobs_of_a_row_are_those_of_the_row_alone(plain, model, texts, kernel) -> None:
    expected = torch.cat([logprobs_alone(plain, *text) for text in texts])
    batch = sequence_batch([prompt for prompt, _ in texts], [response for _, response in texts], 0, "cpu", kernel=kernel)
    policy = Policy(model, temperature=1.0, autocast=None)
    torch.testing.assert_close(policy.logprobs(batch), expected, rtol=1e-4, atol=1e-5)
    unchanged = Policy(copy.deepcopy(plain), temperature=1.0, autocast=None).logprobs(batch)
    assert (unchanged - expected).abs().max() > 1e-3  # the mixed pass of transformers differs, so the test can fail


def test_likelihood_of_rows_with_a_mask_is_that_of_the_rows_alone(plain, model, texts) -> None:
    rows = [(prompt + response, [False] * len(prompt) + [True] * len(response)) for prompt, response in texts]
    loss = -torch.cat([logprobs_alone(plain, *text) for text in texts]).mean()
    measured = measure_likelihood(model, rows, pad_token_id=0, batch_size=4, device=torch.device("cpu"), dtype=torch.float32)
    assert measured.loss == pytest.approx(float(loss), rel=1e-4)


def test_hidden_states_of_full_rows_do_not_change(plain, model) -> None:
    for width in (ORIGINAL, ORIGINAL + 1):
        ids = torch.arange(1, 2 * width + 1).reshape(2, width)
        torch.testing.assert_close(hidden_states(model.model, ids), plain.model(input_ids=ids).last_hidden_state, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("slots", [8, 1])
def test_sampled_logprobs_are_those_of_the_row_alone(plain, model, slots) -> None:
    prompts = [[5, 6, 7], [9] * 10, [11, 12]]
    settings = GenerationSettings(max_new_tokens=5, batch_size=slots, ignore_eos=True)
    made = generate(model, prompts, settings, seeds=[1, 2, 3], stop_ids=[], pad_token_id=0)
    for prompt, ids, logprobs in zip(prompts, made.response_ids, made.logprobs, strict=True):
        torch.testing.assert_close(logprobs, logprobs_alone(plain, prompt, ids.tolist()), rtol=1e-4, atol=1e-5)


def test_completion_that_may_cross_the_original_length_is_refused(model) -> None:
    settings = GenerationSettings(max_new_tokens=5)
    with pytest.raises(ModelError, match="1 of 2 prompts, e.g. one of 4 tokens, may get a completion that crosses 8 tokens") as error:
        generate(model, [[1] * 3, [1] * 4], settings, seeds=[1, 2], stop_ids=[], pad_token_id=0)
    assert "Keep prompts of at most 3 tokens" in str(error.value)
