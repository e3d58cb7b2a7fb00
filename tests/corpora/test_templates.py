"""The template is saved with the tokenizer. Prompt and completion are encoded as one text."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from stages.corpora.templates import encode_pair, encode_prompt, render_prompt, set_template
from stages.errors import DataError, ModelError


@pytest.fixture
def tokenizer(tiny_tokenizer: Any) -> Any:
    return copy.deepcopy(tiny_tokenizer)


def test_a_plain_template_survives_saving(tokenizer, tmp_path) -> None:
    from transformers import AutoTokenizer

    set_template(tokenizer, 'Say "{prompt}"\nReview:')
    tokenizer.save_pretrained(tmp_path)
    assert render_prompt(AutoTokenizer.from_pretrained(tmp_path), "{{ hi }}") == 'Say "{{ hi }}"\nReview:'


def test_a_plain_template_is_chosen_by_name(tokenizer) -> None:
    set_template(tokenizer, "question")
    assert render_prompt(tokenizer, "why?") == "Question: why?\nAnswer:"


def test_completion_gets_a_space_after_a_prompt_without_trailing_white_space(tokenizer) -> None:
    set_template(tokenizer, "question")
    ids, prompt_length = encode_pair(tokenizer, "why?", "because")
    assert tokenizer.decode(ids[:prompt_length]) == "Question: why?\nAnswer:"
    assert tokenizer.decode(ids[prompt_length:]) == " because<|endoftext|>"
    set_template(tokenizer, "instruction")
    ids, prompt_length = encode_pair(tokenizer, "why?", "because", eos=False)
    assert tokenizer.decode(ids[prompt_length:]) == "because"


def test_conversations_need_a_template_and_render_every_turn(tokenizer) -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    with pytest.raises(DataError, match="no chat template; set template in its sft step"):
        encode_prompt(tokenizer, messages)
    set_template(tokenizer, "dialogue")
    # An earlier reply in the prompt has the same form as in training: with the space before a completion.
    assert render_prompt(tokenizer, messages) == "\n\nHuman: a\n\nAssistant: b<|endoftext|>\n\nHuman: c\n\nAssistant:"


def test_a_template_with_a_token_that_the_tokenizer_lacks(tokenizer) -> None:
    tokenizer.chat_template = "{% for m in messages %}{{ bos_token + m.content }}{% endfor %}"
    with pytest.raises(DataError, match="'bos_token' is undefined; set bos_token in its tokenizer_config.json"):
        render_prompt(tokenizer, "a")


@pytest.mark.parametrize(("template", "message"), [("chat", "has no chat template"), ("no place", "a text with {prompt} once")])
def test_bad_templates_are_refused(tokenizer, template, message) -> None:
    with pytest.raises(ModelError, match=message):
        set_template(tokenizer, template)


def test_chatml_writes_turns_that_end_with_one_token(tokenizer) -> None:
    from stages.tokens.turns import turn_form

    with pytest.raises(
        ModelError, match=r"chatml, and the tokenizer has no token <\|im_start\|>, <\|im_end\|>; name a plain template \(plain"
    ):
        set_template(tokenizer, "chatml")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    set_template(tokenizer, "chatml")
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    opened = "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n"
    assert render_prompt(tokenizer, messages) == opened
    ids, prompt_length = encode_pair(tokenizer, "why?", "because")
    assert tokenizer.decode(ids[prompt_length:]) == "because<|im_end|>\n"
    assert not turn_form(tokenizer).borrowed
