"""Continuous batching: completions equal those of single prompts for every kind of ending, with at most one row per slot."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

from stages.config import GenerationSettings
from stages.models.loading import load_language_model
from stages.sampling import cache, generation
from stages.sampling.choosing import sample_tokens
from stages.sampling.generation import Finished, Generated, generate
from tests.sampling.test_families import HYBRID, make

# Equal prompts, and prompts of every length from 1 to 12: more prompts than slots.
PROMPTS = [[row + 5, *range(20, 20 + length)] for row, length in enumerate([2, 9, 3, 3, 0, 8, 11, 1, 5])] + [[40, 41]] * 3
STOPS = tuple(range(100, 115))  # a twentieth of the tokens: completions have many lengths


@pytest.fixture(scope="module")
def model(tiny_llama_folder) -> Any:
    return load_language_model(str(tiny_llama_folder), dtype=torch.float32, trainable=False)


def sample(model: Any, *, stops: Any = STOPS, late: Any = (), prompts: Any = PROMPTS, seeds: Any = None, **settings: Any) -> Generated:
    chosen = GenerationSettings(**{"max_new_tokens": 24, "batch_size": 4, "continuous_batching": True, **settings})
    seeds = range(len(prompts)) if seeds is None else seeds
    return generate(model, prompts, chosen, seeds=seeds, stop_ids=stops, late_stop_ids=late, pad_token_id=1)


def rows(generated: Generated) -> list[list[int]]:
    return [ids[mask].tolist() for ids, mask in zip(generated.response_ids, generated.response_mask, strict=True)]


CASES: dict[str, dict[str, Any]] = {
    "ended early": {},
    "full length": {"stops": ()},
    "minimum length": {"stops": (), "late": STOPS, "stop_after": 7},
    "two kinds of ends": {"stops": STOPS[:4], "late": STOPS, "stop_after": 7, "temperature": 0.7, "top_k": 20, "top_p": 0.9},
    "greedy": {"temperature": 0.0},
    "one token": {"max_new_tokens": 1},
    "one slot": {"batch_size": 1},
}


def check_by_plain_passes(model: Any, generated: Generated, options: dict[str, Any]) -> None:
    """Compare tokens and log-probabilities with a pass over one sequence without cache or padding, and the ends with their definition."""
    most, temperature = options.get("max_new_tokens", 24), options.get("temperature", 1.0)
    chosen = {name: options[name] for name in ("temperature", "top_k", "top_p") if name in options}
    stops, late, stop_after = options.get("stops", STOPS), options.get("late", ()), options.get("stop_after", 0)
    for row, (prompt, text) in enumerate(zip(PROMPTS, rows(generated), strict=True)):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + text]), use_cache=False).logits[0, len(prompt) - 1 : -1]
        noise = torch.rand(most, generator=torch.Generator().manual_seed(row), dtype=torch.float64)[: len(text)]
        assert sample_tokens(logits, noise, **chosen)[0].tolist() == text
        expected = (logits / (temperature or 1.0)).log_softmax(-1)[range(len(text)), text]
        torch.testing.assert_close(generated.logprobs[row][generated.response_mask[row]], expected, rtol=1e-4, atol=1e-5)
        ends = [token in stops or (token in late and position >= stop_after) for position, token in enumerate(text)]
        assert not any(ends[:-1]) and (ends[-1] or len(text) == most)
        assert bool(generated.stopped[row]) == ends[-1]


@pytest.mark.parametrize("case", CASES)
def test_completions_equal_those_of_plain_forward_passes(model, case: str) -> None:
    generated = sample(model, **CASES[case])
    check_by_plain_passes(model, generated, CASES[case])
    assert len(set(generated.lengths.tolist())) > 1 or case in ("full length", "one token")
    if case == "minimum length":
        assert min(generated.lengths.tolist()) > 7


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_quantized_weights_give_the_same_completions_in_slots(tiny_llama_folder, resolve_folder, quantization: str) -> None:
    source = resolve_folder(tiny_llama_folder, quantization=quantization)
    quantized = load_language_model(source, dtype=torch.float32, trainable=False)
    generated, expected = (sample(quantized, continuous_batching=continuous) for continuous in (True, False))
    assert rows(generated) == rows(expected)


def test_completions_equal_those_of_plain_forward_passes_with_a_cache_by_tokens(model, monkeypatch) -> None:
    monkeypatch.setattr(cache, "reads_by_columns", lambda model: False)
    check_by_plain_passes(model, sample(model), {})


def test_a_finished_completion_is_replaced_and_the_batch_stays_full(model, monkeypatch) -> None:
    batches: list[tuple[int, int]] = []
    forward = model.forward

    def counted(*arguments: Any, **options: Any) -> Any:
        batches.append(tuple(options["input_ids"].shape))
        return forward(*arguments, **options)

    monkeypatch.setattr(model, "forward", counted)
    generated = sample(model)
    steps = [number for number, width in batches if width == 1]
    assert max(number for number, _ in batches) == 4
    assert sum(steps) == int(generated.lengths.sum()) - len(PROMPTS)  # no surplus row is computed; the last token of a response is not read
    batches.clear()
    sample(model, continuous_batching=False)
    assert len(steps) < 0.8 * len([number for number, width in batches if width == 1])


def test_finished_completions_are_reported_as_they_end(model) -> None:
    reported: list[Finished] = []
    settings = GenerationSettings(max_new_tokens=24, batch_size=4, continuous_batching=True)
    made = generate(
        model, PROMPTS, settings, seeds=range(len(PROMPTS)), stop_ids=STOPS, pad_token_id=1, on_finished=lambda new: reported.extend(new)
    )
    assert sorted(finished.row for finished in reported) == list(range(len(PROMPTS)))
    for finished in reported:
        assert finished.response_ids == rows(made)[finished.row] and finished.stopped == bool(made.stopped[finished.row])


def test_cpu_default_decodes_batch_by_batch_bitwise_equal(model, monkeypatch) -> None:
    expected = sample(model, continuous_batching=False)
    monkeypatch.setattr(generation, "SlotDecoder", None)  # would fail if it was used
    generated = sample(model, continuous_batching="auto")
    few = sample(model, batch_size=len(PROMPTS))  # no prompt waits
    assert torch.equal(generated.logprobs, expected.logprobs) and torch.equal(generated.response_ids, expected.response_ids)
    assert rows(few) == rows(expected)


def on_small_tokens(options: dict[str, Any]) -> dict[str, Any]:
    prompts = [[token % 60 + 2 for token in prompt] for prompt in PROMPTS[:6]]
    return {"stops": (3, 9, 27), "prompts": prompts, "max_new_tokens": 12, "batch_size": 2, **options}


@pytest.mark.parametrize(
    ("kind", "fields", "reason"),
    [
        ("mistral", {}, "looks back over 8 tokens, and a prompt and its completion have up to 22"),
        ("qwen3_next", HYBRID, "its cache cannot give the slot"),
        ("bart", {}, "its cache cannot give the slot"),
    ],
)
def test_model_whose_rows_cannot_be_replaced_is_decoded_batch_by_batch_and_logged_once(
    kind: str, fields: dict[str, Any], reason: str, monkeypatch, caplog
) -> None:
    monkeypatch.setattr(generation, "_said", set())
    model = make(kind, **fields)
    with caplog.at_level(logging.WARNING):
        generated = [sample(model, **on_small_tokens({})) for _ in range(2)]
    said = [message for message in caplog.messages if "batch by batch" in message]
    assert len(said) == 1 and type(model).__name__ in said[0] and reason in said[0]
    expected = sample(model, **on_small_tokens({"continuous_batching": False}))
    assert all(torch.equal(made.response_ids, expected.response_ids) for made in generated)


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("mistral", {}),
        ("gemma2", {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 5.0}),
        ("gemma3_text", {"layer_types": ["sliding_attention", "full_attention"]}),
        ("gpt_oss", {}),
        ("llama4_text", {"attention_chunk_size": 24}),
    ],
)
def test_model_with_sliding_windows_is_decoded_in_slots_if_no_text_is_longer(kind: str, fields: dict[str, Any], caplog) -> None:
    model = make(kind, **{"sliding_window": 24, **fields} if "attention_chunk_size" not in fields else fields)
    expected = sample(model, **on_small_tokens({"continuous_batching": False}))
    seen = []
    decoder = generation.SlotDecoder
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generation, "SlotDecoder", lambda *given, **named: seen.append(kind) or decoder(*given, **named))
        generated = sample(model, **on_small_tokens({}))
    assert seen == [kind]
    assert torch.equal(generated.response_ids, expected.response_ids)
    torch.testing.assert_close(generated.logprobs, expected.logprobs, rtol=1e-3, atol=1e-4)
