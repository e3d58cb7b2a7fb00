"""Arguments of chat templates: what transformers renders with them as keywords is what the saved template renders without."""

from __future__ import annotations

import logging
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from stages.corpora.conversations.messages import messages_of, prompt_of, split_messages
from stages.corpora.demonstrations import demonstration
from stages.corpora.encoding.training_rows import training_rows
from stages.corpora.rows import Row
from stages.corpora.templates import encode_prompt, render_pair
from stages.errors import DataError, ModelError
from stages.tokens.template_arguments import arguments_in, set_arguments, template_variables, without_arguments

QUESTION = [{"role": "user", "content": "hello there"}]
CHAT = [*QUESTION, {"role": "assistant", "content": "i am fine"}]
THINKS = "{% for m in messages %}{{ m.role + ': ' + m.content + '</s>' }}{% endfor %}"
NOTES = (
    "\n{% if not tone is defined %}{% set tone = 'plain' %}{% endif %}{{ tone }} "
    "{% for d in documents or [] %}{{ d.title ~ d.pages }} {% endfor %}"
    "{% macro end() %}{{ closing | default('.') }}{% endmacro %}{% for m in messages %}{{ m.content + end() }}{% endfor %}"
)


def row(**columns: Any) -> Row:
    made = Row(columns)
    made.location = "chats.jsonl:7"
    return made


def published(name: str) -> str:
    """The chat template of a published model; TRL has copies of them."""
    return (files("trl") / f"chat_templates/{name}.jinja").read_text()


@pytest.mark.parametrize(
    ("template", "arguments"),
    [
        (published("qwen3"), {"enable_thinking": False}),
        (published("gptoss"), {"reasoning_effort": "high", "model_identity": 'You are "T".\n#} %} é 😀'}),
        (published("llama3_2"), {"date_string": "01 Jan 2025", "tools_in_user_message": False}),
        (published("nemotron_3_nano"), {"enable_thinking": False, "truncate_history_thinking": False}),
        (published("lfm2_2_5"), {"preserve_thinking": True}),
        (published("glm4moe"), {"enable_thinking": False}),
        (NOTES, {"documents": [{"title": "t", "pages": [1, None, True, -2.5]}], "tone": "warm", "closing": "!"}),
        ({"default": NOTES, "tool_use": THINKS}, {"tone": "warm"}),
    ],
    ids=["qwen3", "gptoss", "llama3.2", "nemotron3", "lfm2.5", "glm4", "values", "named templates"],
)
def test_the_saved_template_writes_what_the_keywords_write(tokenizer_of, tmp_path: Path, template: Any, arguments: dict[str, Any]) -> None:
    plain, changed = tokenizer_of("byte_bpe"), tokenizer_of("byte_bpe")
    plain.chat_template = changed.chat_template = template
    set_arguments(changed, arguments)
    changed.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    written = {}
    for prompt in (QUESTION, CHAT):
        options = {"tokenize": False, "add_generation_prompt": prompt is QUESTION}
        written[len(prompt)] = plain.apply_chat_template(prompt, **options, **arguments)
        assert loaded.apply_chat_template(prompt, **options) == written[len(prompt)]
        own = dict.fromkeys(arguments, "other")  # the caller's values replace the stored ones
        if "documents" not in own:
            assert loaded.apply_chat_template(prompt, **options, **own) == plain.apply_chat_template(prompt, **options, **own)
    assert arguments_in(loaded) == arguments
    assert without_arguments(loaded) == (template if isinstance(template, dict) else str(template))
    assert loaded.decode(encode_prompt(loaded, "hello there")) == written[1]


def test_later_arguments_are_added_to_those_of_the_model(tokenizer_of) -> None:
    tokenizer = tokenizer_of("byte_bpe")
    tokenizer.chat_template = NOTES
    set_arguments(tokenizer, {"tone": "warm", "closing": "!"})
    set_arguments(tokenizer, {"tone": "cold"})
    assert arguments_in(tokenizer) == {"tone": "cold", "closing": "!"}
    assert tokenizer.apply_chat_template(QUESTION, tokenize=False) == "\ncold hello there!"


def test_an_argument_that_the_template_does_not_use_is_an_error_with_those_that_it_uses(tokenizer_of) -> None:
    tokenizer = tokenizer_of("byte_bpe")
    with pytest.raises(ModelError, match="template_arguments of base: its tokenizer has no chat template that could use tone"):
        set_arguments(tokenizer, {"tone": "warm"}, "base")
    tokenizer.chat_template = NOTES
    with pytest.raises(ModelError, match="of base: the chat template does not use thinking; it uses closing, documents, tone$"):
        set_arguments(tokenizer, {"tone": "warm", "thinking": True}, "base")
    tokenizer.chat_template = THINKS
    with pytest.raises(ModelError, match="does not use messages; it has no arguments"):
        set_arguments(tokenizer, {"messages": []})


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("qwen3", {"enable_thinking"}),  # reasoning_content and content are set in its loops
        ("llama3_2", {"custom_tools", "date_string", "tools_in_user_message"}),
        ("gptoss", {"builtin_tools", "model_identity", "reasoning_effort"}),
        ("phi3", set()),
        ("glm4moe", {"enable_thinking"}),  # content is the parameter of a macro
        ("nemotron_3_nano", {"enable_thinking", "truncate_history_thinking"}),  # system_message is set before it is tested
    ],
)
def test_variables_of_published_templates(tokenizer_of, name: str, expected: set[str]) -> None:
    tokenizer = tokenizer_of("byte_bpe")
    tokenizer.chat_template = published(name)
    assert template_variables(tokenizer) == expected


@pytest.mark.parametrize(
    "beginning",
    [
        "{% set mode = mode or 'fast' %}",
        "{% set mode = mode if mode else 'fast' %}",
        "{% set mode = mode | d('fast', true) %}",
        "{% if mode not in ['slow', 'fast'] %}{% set mode = 'fast' %}{% endif %}",
        "{% if not mode and messages %}{% set mode = 'fast' %}{% endif %}",
        "{% macro begin() %}{% if not mode and messages %}{% set mode = 'fast' %}{% endif %}{{ mode }}{% endmacro %}{{ begin() }}",
    ],
)
def test_a_variable_with_a_default_in_the_template_can_be_set(tokenizer_of, beginning: str) -> None:
    tokenizer = tokenizer_of("byte_bpe")
    tokenizer.chat_template = beginning + "{{ mode }} {{ messages[0].content }}"
    expected = tokenizer.apply_chat_template(QUESTION, tokenize=False, mode="slow")
    set_arguments(tokenizer, {"mode": "slow"})
    assert expected.endswith("slow hello there")
    assert tokenizer.apply_chat_template(QUESTION, tokenize=False) == expected


def test_a_variable_that_the_template_always_sets_cannot_be_set(tokenizer_of) -> None:
    tokenizer = tokenizer_of("byte_bpe")
    tokenizer.chat_template = (
        "{% macro end() %}{{ mode }}{% endmacro %}{% if messages %}{% set mode = 'fast' %}{% else %}{% set mode = 'slow' %}{% endif %}"
        "{% if mode is defined %}{{ mode | default('') }}{% endif %}{{ end() }}"
    )
    with pytest.raises(ModelError, match="does not use mode; it has no arguments"):
        set_arguments(tokenizer, {"mode": "slow"})


def test_arguments_of_a_row_reach_the_template(tokenizer_of) -> None:
    tokenizer = tokenizer_of("byte_bpe")
    tokenizer.chat_template = published("qwen3")
    arguments = {"enable_thinking": False}
    asked = tokenizer.apply_chat_template(QUESTION, tokenize=False, add_generation_prompt=True, **arguments)
    assert asked.endswith("<think>\n\n</think>\n\n")
    for prompt in ({"prompt": "hello there"}, {"prompt": QUESTION}, {"messages": QUESTION}):
        made = row(**prompt, chat_template_kwargs=arguments)
        conversation = messages_of(made, "messages") if "messages" in prompt else prompt_of(made)
        assert render_pair(tokenizer, conversation, "i am fine") == (asked, "i am fine<|im_end|>\n")
        assert conversation != QUESTION  # another prompt than the same turns without arguments
    full_row = row(messages=CHAT, chat_template_kwargs='{"enable_thinking": false, "custom": null}')
    assert split_messages(full_row)[0].arguments == arguments
    (only,) = training_rows(tokenizer, demonstration(full_row), train_on="all_assistant_turns")
    assert tokenizer.decode(only.ids) == tokenizer.apply_chat_template(CHAT, tokenize=False, **arguments)
    assert tokenizer.decode([token for token, counts in zip(only.ids, only.trained, strict=True) if counts]) == "i am fine<|im_end|>\n"


def test_a_text_with_template_arguments_needs_a_template(tokenizer_of) -> None:
    tokenizer, arguments = tokenizer_of("byte_bpe"), {"enable_thinking": False}
    with pytest.raises(
        DataError,
        match="chats.jsonl:7: the row has chat_template_kwargs, but the model has no chat template; set template in its sft step, or "
        "remove chat_template_kwargs from the data",
    ):
        encode_prompt(tokenizer, prompt_of(row(prompt="hello", chat_template_kwargs=arguments)))
    with pytest.raises(DataError, match="chats.jsonl:7: the prompt is a conversation, but the model has no chat template; set template in"):
        encode_prompt(tokenizer, prompt_of(row(prompt=QUESTION)))


def test_arguments_of_a_row_that_the_template_does_not_use_give_a_warning(tokenizer_of, caplog) -> None:
    tokenizer = tokenizer_of("byte_bpe")
    tokenizer.chat_template = NOTES
    with caplog.at_level(logging.WARNING):
        encode_prompt(tokenizer, prompt_of(row(prompt="hello", chat_template_kwargs={"thinking": True, "tone": "warm", "tokenize": True})))
    assert "the model's chat template does not use thinking, tokenize of chat_template_kwargs; the values are ignored" in caplog.text
    tokenizer.chat_template = {"default": THINKS, "rag": NOTES}  # as Command R's; nothing renders a row with rag
    with caplog.at_level(logging.WARNING):
        encode_prompt(tokenizer, prompt_of(row(prompt="hello", chat_template_kwargs={"documents": [{"title": "t"}]})))
    assert "the model's chat template does not use documents of chat_template_kwargs" in caplog.text
    with pytest.raises(DataError, match=r"chats.jsonl:7: chat_template_kwargs is \['thinking'\]; expected an object"):
        prompt_of(row(prompt="hello", chat_template_kwargs=["thinking"]))
