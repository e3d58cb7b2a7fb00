"""Sampling: left padding has no effect, each row has its random stream, stop tokens end rows, log-probabilities are the model's."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from stages.config import GenerationSettings
from stages.errors import ModelError
from stages.kernels import token_budget as token_budget
from stages.models.loading import load_language_model
from stages.sampling import cache, decoding
from stages.sampling.generation import (
    Finished,
    Generated,
    decode_completions,
    ending_tokens,
    generate,
    left_pad,
    right_pad,
    stop_token_ids,
)
from stages.sampling.readers import position_ids

PROMPTS = [[10, 11, 12, 13, 14], [20], [30, 31, 32], [40, 41]]


@pytest.fixture(scope="module")
def model(tiny_llama_folder) -> Any:
    return load_language_model(str(tiny_llama_folder), dtype=torch.float32, trainable=False)


def sample(model: Any, prompts: list[list[int]], seeds: list[int], stop: tuple[int, ...] = (0,), **settings: Any) -> Generated:
    chosen = GenerationSettings(**{"max_new_tokens": 12, **settings})
    return generate(model, prompts, chosen, seeds=seeds, stop_ids=stop, pad_token_id=1)


def rows(generated: Generated) -> list[list[int]]:
    return [ids[mask].tolist() for ids, mask in zip(generated.response_ids, generated.response_mask, strict=True)]


def test_prompts_are_padded_on_the_left_and_positions_follow_the_mask() -> None:
    ids, mask = left_pad([[5, 6], [7]], 1)
    assert ids.tolist() == [[5, 6], [1, 7]] and mask.tolist() == [[True, True], [False, True]]
    assert position_ids(mask).tolist() == [[0, 1], [0, 0]]
    assert right_pad([torch.tensor([1, 2]), torch.tensor([3])], 9, width=3).tolist() == [[1, 2, 9], [3, 9, 9]]


def test_a_completion_does_not_depend_on_its_batch(model) -> None:
    seeds = [7, 8, 9, 10]
    stop = tuple(range(100, 160))  # a fifth of the tokens: rows leave the batch at different times
    together = rows(sample(model, PROMPTS, seeds, stop))
    assert len({len(row) for row in together}) > 1
    for row, prompt in enumerate(PROMPTS):
        assert rows(sample(model, [prompt], [seeds[row]], stop)) == [together[row]]
    assert rows(sample(model, PROMPTS, seeds, stop, batch_size=2)) == together
    assert rows(sample(model, PROMPTS[::-1], seeds[::-1], stop)) == together[::-1]


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.7}, {"top_k": 5}, {"top_p": 0.5}, {"temperature": 0.0}])
def test_logprobs_equal_a_plain_forward_pass(model, settings) -> None:
    generated = sample(model, PROMPTS, [1, 2, 3, 4], tuple(range(100, 130)), **settings)
    for row, prompt in enumerate(PROMPTS):
        response = rows(generated)[row]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        expected = (logits / (settings.get("temperature", 1.0) or 1.0)).log_softmax(-1)[range(len(response)), response]
        actual = generated.logprobs[row][generated.response_mask[row]]
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_greedy_equals_transformers(model) -> None:
    ours = rows(sample(model, [PROMPTS[0]], [0], temperature=0.0))
    theirs = model.generate(torch.tensor([PROMPTS[0]]), max_new_tokens=12, do_sample=False, eos_token_id=0, pad_token_id=1)
    assert ours == [theirs[0, len(PROMPTS[0]) :].tolist()]


def test_stop_tokens_end_a_row_and_count(model) -> None:
    free = rows(sample(model, PROMPTS[:1], [3]))[0]
    stopping = free[4]
    first = free.index(stopping)
    generated = sample(model, PROMPTS[:1], [3], (stopping,))
    assert rows(generated) == [free[: first + 1]] and generated.stopped.tolist() == [True]
    assert sample(model, PROMPTS[:1], [3], max_new_tokens=2).stopped.tolist() == [False]
    # late stops are ignored before their position (the papers' truncate_after)
    late = generate(
        model,
        PROMPTS[:1],
        GenerationSettings(max_new_tokens=12, stop_after=first + 1),
        seeds=[3],
        stop_ids=[0],
        pad_token_id=1,
        late_stop_ids=[stopping],
    )
    assert len(rows(late)[0]) > first + 1


def test_finished_completions_are_reported_once_while_others_are_sampled(model, monkeypatch) -> None:
    steps = []
    forward = model.forward

    def counted(*arguments: Any, **options: Any) -> Any:
        steps.append(options["input_ids"].shape)
        return forward(*arguments, **options)

    monkeypatch.setattr(model, "forward", counted)
    reported: list[tuple[int, Finished]] = []
    chosen = GenerationSettings(max_new_tokens=12, batch_size=3)
    made = generate(
        model,
        PROMPTS,
        chosen,
        seeds=[7, 8, 9, 10],
        stop_ids=range(100, 160),
        pad_token_id=1,
        on_finished=lambda rows: reported.extend((len(steps), row) for row in rows),
    )
    assert sorted(row.row for _, row in reported) == [0, 1, 2, 3]
    for _, row in reported:
        assert row.response_ids == rows(made)[row.row] and row.stopped == bool(made.stopped[row.row])
    # Three rows in the first batch: the first one that ends is reported before the last one has ended.
    assert reported[0][0] < reported[2][0]


def test_callback_error_ends_sampling_and_restores_the_model(model) -> None:
    def fail(rows: list[Finished]) -> None:
        raise KeyError("mine")

    model.train()
    usual = model.config._attn_implementation
    with pytest.raises(KeyError, match="mine"):
        generate(model, PROMPTS, GenerationSettings(max_new_tokens=2), seeds=range(4), stop_ids=[], pad_token_id=1, on_finished=fail)
    assert model.training and model.config._attn_implementation == usual
    model.eval()


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.0}, {"top_k": 5, "top_p": 0.9}, {"continuous_batching": True, "batch_size": 1}])
def test_logits_that_are_not_finite_are_refused(model, settings: dict[str, Any]) -> None:
    bias = torch.zeros(300)
    bias[7] = float("nan")
    handle = model.lm_head.register_forward_hook(lambda module, inputs, logits: logits + bias)
    try:
        with pytest.raises(ModelError, match="LlamaForCausalLM computed logits that are not finite for 2 of 2 completions"):
            sample(model, [[5, 6], [7]], [1, 2], **settings)
    finally:
        handle.remove()


def test_training_mode_of_the_model_is_restored(model) -> None:
    model.train()
    sample(model, PROMPTS[:1], [0])
    assert model.training
    model.eval()


def test_equal_prompts_are_read_once(model, monkeypatch) -> None:
    shapes = []
    forward = model.forward

    def counted(*arguments: Any, **options: Any) -> Any:
        shapes.append(tuple(options["input_ids"].shape))
        return forward(*arguments, **options)

    alone = [rows(sample(model, [PROMPTS[0]], [seed]))[0] for seed in range(3)]
    monkeypatch.setattr(model, "forward", counted)
    together = rows(sample(model, [PROMPTS[0], PROMPTS[1], PROMPTS[0], PROMPTS[0]], [0, 9, 1, 2]))
    assert shapes[0] == (2, 5) and shapes[1] == (4, 1)
    assert [together[row] for row in (0, 2, 3)] == alone


@pytest.mark.parametrize("layer_room", ["COLUMN_ROOM", "FIRST_ROOM"])
def test_the_cache_grows_and_loses_rows_without_changing_a_text(model, monkeypatch, layer_room) -> None:
    monkeypatch.setattr(cache, "reads_by_columns", lambda model: layer_room == "COLUMN_ROOM")
    stop = tuple(range(100, 115))  # a twentieth of the tokens: rows last for different times
    settings = {"max_new_tokens": 60, "stop": stop}
    expected = rows(sample(model, PROMPTS, [1, 2, 3, 4], **settings))
    assert len({len(row) for row in expected}) > 1
    for room, compact_below in ((3, 0.0), (200, 1.0)):
        monkeypatch.setattr(cache, layer_room, room)
        monkeypatch.setattr(decoding, "COMPACT_BELOW", compact_below)
        assert rows(sample(model, PROMPTS, [1, 2, 3, 4], **settings)) == expected


def test_prompts_of_similar_length_are_read_together_without_padding(model, monkeypatch) -> None:
    prompts = [[row + 5, *range(20, 20 + length)] for row, length in enumerate([2, 9, 3, 3, 8, 1])]
    seeds = list(range(6))
    together = sample(model, prompts, seeds)
    shapes = []
    forward = model.forward

    def counted(*arguments: Any, **options: Any) -> Any:
        shapes.append(tuple(options["input_ids"].shape))
        return forward(*arguments, **options)

    monkeypatch.setattr(model, "forward", counted)
    monkeypatch.setattr(token_budget, "CPU_TOKENS", 12)
    parts = sample(model, prompts, seeds)
    # lengths in order: 2, 3 | 4, 4 | 9 | 10, because a pass has at most 12 tokens with padding
    assert shapes[:4] == [(2, 3), (2, 4), (1, 9), (1, 10)] and shapes[4] == (6, 1)
    assert rows(parts) == rows(together)
    torch.testing.assert_close(parts.logprobs, together.logprobs, rtol=1e-4, atol=1e-5)


def test_a_model_with_a_sliding_window_samples_like_transformers(tiny_tokenizer) -> None:
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=4,
        max_position_embeddings=128,
        attn_implementation="sdpa",
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=1,
    )
    sliding = MistralForCausalLM(config).eval()
    for prompt in PROMPTS:
        ours = rows(sample(sliding, [prompt, PROMPTS[0]], [0, 0], temperature=0.0))[0]
        theirs = sliding.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=0, pad_token_id=1)
        assert ours == theirs[0, len(prompt) :].tolist()


def test_stop_words_are_single_tokens(model, tiny_tokenizer) -> None:
    eos = tiny_tokenizer.eos_token_id
    assert stop_token_ids(model, tiny_tokenizer) == [eos]
    assert stop_token_ids(model, tiny_tokenizer, ["a"]) == sorted([eos, tiny_tokenizer.convert_tokens_to_ids("a")])
    with pytest.raises(ModelError, match=r"'happy ending!' is \d+ tokens"):
        stop_token_ids(model, tiny_tokenizer, ["happy ending!"])


def test_a_stop_word_is_encoded_as_in_a_completion(model, tokenizer_of) -> None:
    tokenizer = tokenizer_of("sentencepiece")  # a tab alone is a space and a byte, and after other text one byte
    (tab,) = set(stop_token_ids(model, tokenizer, ["\t"])) - set(stop_token_ids(model, tokenizer))
    assert tokenizer.convert_ids_to_tokens(tab) == "<0x09>"


def test_with_ignore_eos_only_stop_tokens_end_a_completion(model, tiny_tokenizer) -> None:
    eos, letter = tiny_tokenizer.eos_token_id, tiny_tokenizer.convert_tokens_to_ids("a")
    assert ending_tokens(model, tiny_tokenizer, GenerationSettings(stop=["a"])) == ([eos], [letter])
    for stop, late in (([], []), (["a"], [letter]), (["a", "<|endoftext|>"], sorted([eos, letter]))):
        assert ending_tokens(model, tiny_tokenizer, GenerationSettings(stop=stop, ignore_eos=True)) == ([], late)
    free = sample(model, PROMPTS[:1], [3], stop=())
    assert free.lengths.tolist() == [12] and free.stopped.tolist() == [False]


def test_decoding_leaves_out_stop_tokens(tiny_tokenizer) -> None:
    ids = tiny_tokenizer(" the film", add_special_tokens=False)["input_ids"] + [tiny_tokenizer.eos_token_id]
    generated = Generated(
        *(torch.tensor([[0]]),) * 2, torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.bool), *(torch.zeros(1),) * 2
    )
    assert decode_completions(tiny_tokenizer, generated) == ["the film"]


def test_a_completion_ends_where_the_chat_template_ends_a_turn(model, tokenizer_of) -> None:
    """The turn end is neither the end token nor, here, a special token of the tokenizer."""
    tokenizer = tokenizer_of("byte_bpe")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role + ':' + m.content + '</tool_call>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    )
    end = tokenizer.convert_tokens_to_ids("</tool_call>")
    assert end not in tokenizer.all_special_ids
    assert ending_tokens(model, tokenizer, GenerationSettings()) == (sorted([tokenizer.eos_token_id, end, 0]), [])
    assert ending_tokens(model, tokenizer, GenerationSettings(ignore_eos=True)) == ([], [])
    ids = tokenizer(" there was", add_special_tokens=False)["input_ids"] + [end]
    generated = Generated(
        *(torch.tensor([[9]]),) * 2, torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.bool), *(torch.zeros(1),) * 2
    )
    assert decode_completions(tokenizer, generated) == ["there was"]


def test_a_completion_is_decoded_after_its_prompt(tokenizer_of) -> None:
    """A word piece that continues the prompt's last word has no marker before it."""
    tokenizer = tokenizer_of("wordpiece")
    prompt = tokenizer("the weather is wa", add_special_tokens=False)["input_ids"]
    ids = tokenizer("the weather is warm today", add_special_tokens=False)["input_ids"][-1:]
    piece = tokenizer.convert_tokens_to_ids("##r")
    generated = Generated(
        torch.tensor([prompt]),
        torch.ones(1, len(prompt), dtype=torch.bool),
        torch.tensor([[piece, *ids]]),
        torch.ones(1, 1 + len(ids), dtype=torch.bool),
        *(torch.zeros(1),) * 2,
    )
    assert decode_completions(tokenizer, generated) == ["r today"]
