"""Ten kinds of chat templates on five kinds of tokenizers: the trained tokens are those that the template renders for the replies.

The full rendering is transformers' ``apply_chat_template``. ``REPLY`` has, by hand, the text that each template writes for a reply.
"""

from __future__ import annotations

import re
from importlib.resources import files
from itertools import groupby
from typing import Any

import pytest

from stages.corpora.conversations.messages import Conversation
from stages.corpora.demonstrations import demonstration
from stages.corpora.encoding.training_rows import training_rows
from stages.corpora.rows import Row
from stages.corpora.templates import encode_pair, encode_prompt, render_pair
from stages.errors import DataError, ModelError
from stages.tokens.template_arguments import set_arguments
from stages.tokens.turns import turn_end_ids, turn_form

REFUSE_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system turns here') }}{% endif %}"
MERGE_SYSTEM = (
    "{% set sys = messages[0].content if messages[0].role == 'system' else '' %}"
    "{% set turns = messages[1:] if messages[0].role == 'system' else messages %}"
)
ALTERNATE = "{% if (loop.index0 % 2 == 0) != (m.role == 'user') %}{{ raise_exception('roles must take turns') }}{% endif %}"
TEMPLATES = {
    "chatml": "{% if tools %}{{ '<|im_start|>system\\nTools: ' + tools | tojson + '<|im_end|>\\n' }}{% endif %}{% for m in messages %}"
    "{{ '<|im_start|>' + m.role + '\\n' }}{% if m.content %}{{ m.content }}{% endif %}{% for call in m.tool_calls or [] %}"
    "{{ '<tool_call>' + call.function | tojson + '</tool_call>' }}{% endfor %}{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
    "llama2": MERGE_SYSTEM + "{% for m in turns %}" + ALTERNATE + "{% if m.role == 'user' %}{{ bos_token + '[INST] ' }}"
    "{% if loop.first and sys %}{{ '<<SYS>>\\n' + sys + '\\n<</SYS>>\\n\\n' }}{% endif %}{{ m.content.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}",
    "llama3": "{{ '<|begin|>' }}{% for m in messages %}"
    "{{ '<|head|>' + m.role + '<|headend|>\\n\\n' + m.content | trim + '<|eot|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|head|>assistant<|headend|>\\n\\n' }}{% endif %}",
    "gemma": "{{ bos_token }}" + REFUSE_SYSTEM + "{% for m in messages %}"
    "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\\n' + m.content | trim + '<end_of_turn>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}",
    "tekken": "{{ bos_token }}" + MERGE_SYSTEM + "{% set asked = turns | selectattr('role', 'equalto', 'user') | list %}"
    "{% for m in turns %}{% if m.role == 'user' %}{% if tools and m is sameas asked[-1] %}"
    "{{ '[TOOLS]' + tools | tojson + '[/TOOLS]' }}{% endif %}{{ '[INST]' }}{% if loop.first and sys %}{{ sys + '\\n\\n' }}{% endif %}"
    "{{ m.content + '[/INST]' }}{% else %}{{ m.content + eos_token }}{% endif %}{% endfor %}",
    "phi": "{% for m in messages %}{{ '<|' + m.role + '|>\\n' + m.content + '<|end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}",
    "zephyr": "{% for m in messages %}{{ '<|' + m.role + '|>\\n' + m.content + eos_token + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}",
    "qwen3": "{% set ns = namespace(asked=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.asked = loop.index0 %}{% endif %}"
    "{% endfor %}{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}{% set text = m.content or '' %}{% if m.role == 'assistant' %}"
    "{% set thought = m.reasoning_content or '' %}{% if '</think>' in text %}"
    "{% set thought = text.split('</think>')[0].split('<think>')[-1] %}{% set text = text.split('</think>')[-1].lstrip('\\n') %}{% endif %}"
    "{% if loop.index0 > ns.asked %}"
    "{{ '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' }}{% endif %}{% endif %}{{ text + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
    "deepseek": "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}"
    "{{ '<|assistant|>' + m.content.split('</think>')[-1] + eos_token }}{% elif m.role == 'user' %}{{ '<|user|>' + m.content }}"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|><think>\\n' }}{% endif %}",
    "marked": MERGE_SYSTEM + "{% for m in turns %}{% if m.role == 'user' %}{{ '<|user|>' }}{% if loop.first and sys %}{{ sys + '\\n' }}"
    "{% endif %}{{ m.content + '<|end|>' }}{% else %}{{ '<|assistant|>' }}{% generation %}{{ m.content + '<|end|>' }}{% endgeneration %}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}",
}
REPLY = {  # the text that each template writes for a reply after its generation prompt
    "chatml": "{}<|im_end|>\n",
    "llama2": " {} </s>",
    "llama3": "{}<|eot|>",
    "gemma": "{}<end_of_turn>\n",
    "tekken": "{}</s>",
    "phi": "{}<|end|>\n",
    "zephyr": "{}</s>\n",
    "qwen3": "<think>\n\n</think>\n\n{}<|im_end|>\n",
    "deepseek": "so\n</think>\n\n{}</s>",  # the generation prompt opens the think block, and replies contain one
    "marked": "{}<|end|>",
}
CLOSING = {"phi": "</s>"}  # the text that it writes once, after the last turn
TURN_END = {
    "chatml": "<|im_end|>",
    "llama2": "</s>",
    "llama3": "<|eot|>",
    "gemma": "<end_of_turn>",
    "tekken": "</s>",
    "phi": "<|end|>",
    "zephyr": "</s>",
    "qwen3": "<|im_end|>",
    "deepseek": "</s>",
    "marked": "<|end|>",
}
DROPS_THOUGHTS = ("qwen3", "deepseek")  # of replies before the last user turn: such replies are trained in separate rows
KINDS = ("byte_bpe", "sentencepiece", "metaspace", "unigram", "wordpiece")

USER, ASSISTANT, SYSTEM = "user", "assistant", "system"
SINGLE = [(USER, "hello there"), (ASSISTANT, "i am fine")]
MULTI = [*SINGLE, (USER, "how are you?"), (ASSISTANT, "the sun is warm"), (USER, "one two"), (ASSISTANT, "three")]


def said(name: str, reply: str) -> str:
    """A reply in the format of data for this template."""
    return f"<think>\nso\n</think>\n\n{reply}" if name == "deepseek" else reply


def last(name: str, reply: str) -> str:
    """The text that the template writes for the last reply of a conversation."""
    return REPLY[name].format(reply) + CLOSING.get(name, "")


def turns(name: str, spoken: list[tuple[str, str]]) -> list[dict[str, Any]]:
    return [{"role": role, "content": said(name, text) if role == ASSISTANT else text} for role, text in spoken]


def row(**columns: Any) -> Row:
    made = Row(columns)
    made.location = "chats.jsonl:7"
    return made


@pytest.fixture(params=list(TEMPLATES))
def name(request: Any) -> str:
    return request.param


@pytest.fixture
def tokenizer(tokenizer_of: Any, name: str) -> Any:
    made = tokenizer_of("byte_bpe")
    made.chat_template = TEMPLATES[name]
    return made


def trained_runs(tokenizer: Any, made: Any) -> list[str]:
    """The text of every run of trained tokens."""
    runs = groupby(zip(made.ids, made.trained, strict=True), key=lambda pair: pair[1])
    return [tokenizer.decode([token for token, _ in run]) for trains, run in runs if trains]


def prompt_text(tokenizer: Any, messages: list[dict[str, Any]]) -> str:
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


@pytest.mark.parametrize("spoken", [SINGLE, MULTI], ids=["single", "multi"])
def test_last_reply_trains_on_the_template_tokens(tokenizer, name, spoken) -> None:
    messages = turns(name, spoken)
    (made,) = training_rows(tokenizer, demonstration(row(messages=messages)), train_on="last_reply")
    expected = last(name, spoken[-1][1])
    assert trained_runs(tokenizer, made) == [expected]
    assert tokenizer.decode(made.ids) == prompt_text(tokenizer, messages[:-1]) + expected
    if name != "deepseek":  # this template does not write the block that its generation prompt opens
        assert tokenizer.decode(made.ids) == tokenizer.apply_chat_template(messages, tokenize=False)


def test_a_reply_with_weight_0_is_context_only(tokenizer, name) -> None:
    messages = turns(name, MULTI)
    replies = [index for index, message in enumerate(messages) if message["role"] == ASSISTANT]
    for skipped in replies:
        weighted = [{**message, "weight": int(index != skipped)} if index in replies else message for index, message in enumerate(messages)]
        made = training_rows(tokenizer, demonstration(row(messages=weighted)), train_on="all_assistant_turns")
        trained = "".join(text for one in made for text in trained_runs(tokenizer, one))
        assert [messages[index]["content"].split("</think>")[-1].strip() in trained for index in replies] == [
            index != skipped for index in replies
        ]
    nothing = [{**message, "weight": 0} for message in messages]
    assert training_rows(tokenizer, demonstration(row(messages=nothing)), train_on="all_assistant_turns") == []
    assert training_rows(tokenizer, demonstration(row(messages=nothing)), train_on="last_reply") == []


def test_every_reply_of_a_conversation_trains(tokenizer, name) -> None:
    messages = turns(name, MULTI)
    made = training_rows(tokenizer, demonstration(row(messages=messages)), train_on="all_assistant_turns")
    *earlier, final = [text for role, text in MULTI if role == ASSISTANT]
    expected = [*(REPLY[name].format(text) for text in earlier), last(name, final)]
    if name not in DROPS_THOUGHTS:
        assert len(made) == 1 and trained_runs(tokenizer, made[0]) == expected
        assert tokenizer.decode(made[0].ids) == tokenizer.apply_chat_template(messages, tokenize=False)
        return
    # Each reply is the last turn of its row, after the history that the template renders for that row.
    ordered = sorted(made, key=lambda one: len(one.ids))
    assert [trained_runs(tokenizer, one) for one in ordered] == [[text] for text in expected]
    for one, end in zip(ordered, (1, 3, 5), strict=True):
        assert tokenizer.decode(one.ids[: one.prompt_length]) == prompt_text(tokenizer, messages[:end])


def test_only_the_completion_of_a_row_with_a_prompt_trains(tokenizer, name) -> None:
    messages = turns(name, MULTI)
    made = training_rows(tokenizer, demonstration(row(prompt=messages[:3], completion=messages[3:])), train_on="all_assistant_turns")
    runs = [run for one in sorted(made, key=lambda one: len(one.ids)) for run in trained_runs(tokenizer, one)]
    assert runs == [REPLY[name].format("the sun is warm"), last(name, "three")]


def test_a_system_turn_is_written_or_refused(tokenizer, name) -> None:
    messages = [{"role": SYSTEM, "content": "be kind"}, *turns(name, SINGLE)]
    read = demonstration(row(messages=messages))
    if name == "gemma":
        with pytest.raises(DataError, match=r"chats.jsonl:7: the model's chat template rejects .*no system turns here"):
            training_rows(tokenizer, read, train_on="all_assistant_turns")
        return
    (made,) = training_rows(tokenizer, read, train_on="all_assistant_turns")
    assert trained_runs(tokenizer, made) == [last(name, "i am fine")]
    assert "be kind" in tokenizer.decode(made.ids[: made.prompt_length])


TOOLS = [{"type": "function", "function": {"name": "look_up", "parameters": {"type": "object", "properties": {}}}}]


def test_tools_are_written_or_refused(tokenizer, name) -> None:
    read = demonstration(row(messages=turns(name, SINGLE), tools=TOOLS))
    if name not in ("chatml", "tekken"):
        with pytest.raises(DataError, match=r"chats.jsonl:7: the model's chat template drops the tools of the row \(look_up\)"):
            training_rows(tokenizer, read, train_on="all_assistant_turns")
        return
    (made,) = training_rows(tokenizer, read, train_on="all_assistant_turns")
    assert tokenizer.decode(made.ids[: made.prompt_length]).count("look_up") == 1
    assert trained_runs(tokenizer, made) == [last(name, "i am fine")]


def test_tool_calls_train_or_are_refused(tokenizer, name) -> None:
    function = {"name": "look_up", "arguments": {"a": 1}}
    call = {"role": ASSISTANT, "content": None, "tool_calls": [{"type": "function", "function": function}]}
    answered = {"role": "tool", "tool_call_id": "1", "content": "22"}
    read = demonstration(row(messages=[{"role": USER, "content": "hello"}, call, answered, {"role": ASSISTANT, "content": "22 degrees"}]))
    if name != "chatml":
        with pytest.raises(DataError, match=r"chats.jsonl:7: "):
            training_rows(tokenizer, read, train_on="all_assistant_turns")
        return
    (made,) = training_rows(tokenizer, read, train_on="all_assistant_turns")
    assert trained_runs(tokenizer, made) == [
        '<tool_call>{"name": "look_up", "arguments": {"a": 1}}</tool_call><|im_end|>\n',
        "22 degrees<|im_end|>\n",
    ]


def test_generation_stops_at_the_turn_end(tokenizer, name) -> None:
    assert tokenizer.convert_ids_to_tokens(turn_end_ids(tokenizer)) == [TURN_END[name]]


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_equal_those_of_the_full_rendering(tokenizer_of, name, kind) -> None:
    """For every kind of tokenizer, the tokens of prompt and reply are those of the full rendering."""
    tokenizer = tokenizer_of(kind)
    tokenizer.chat_template = TEMPLATES[name]
    messages = turns(name, MULTI[:4])
    ids, length = encode_pair(tokenizer, Conversation(messages[:3]), messages[3]["content"])
    assert ids[:length] == encode_prompt(tokenizer, messages[:3])
    rendered = prompt_text(tokenizer, messages[:3]) + last(name, "the sun is warm")
    assert ids == tokenizer(rendered, add_special_tokens=False)["input_ids"]
    assert ids.count(tokenizer.bos_token_id) == rendered.count("<s>")
    assert re.sub(r"\s", "", tokenizer.decode(ids[length:])) == re.sub(r"\s", "", last(name, "the sun is warm"))


@pytest.mark.parametrize("reply", ["i am fine", "<think>\nhm\n</think>\n\ni am fine", "hm\n</think>\n\ni am fine"])
def test_think_blocks_are_written_as_the_template_writes_them(tokenizer_of, reply) -> None:
    tokenizer = tokenizer_of("byte_bpe")
    tokenizer.chat_template = TEMPLATES["qwen3"]
    thought = "hm" if "hm" in reply else ""
    assert render_pair(tokenizer, "hello", reply)[1] == f"<think>\n{thought}\n</think>\n\ni am fine<|im_end|>\n"
    tokenizer.chat_template = TEMPLATES["deepseek"]
    if thought:  # the generation prompt has already opened the block
        assert render_pair(tokenizer, "hello", reply) == ("<s><|user|>hello<|assistant|><think>\n", "hm\n</think>\n\ni am fine</s>")
        return
    with pytest.raises(DataError, match="the generation prompt opens <think>: end the reasoning in each reply with </think>"):
        render_pair(tokenizer, "hello", reply)
    # A sample that ended inside the block is scored unchanged, followed by the turn end.
    assert render_pair(tokenizer, "hello", reply, sampled=True)[1] == "i am fine</s>"


def test_reasoning_that_the_data_has_twice_is_trained_once(tokenizer_of) -> None:
    """As Qwen 3's template, this one writes the field and leaves the text of the reply as it is."""
    tokenizer = tokenizer_of("byte_bpe")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|' + m.role + '|>' }}{% if m.reasoning_content %}{{ '<think>' + m.reasoning_content + '</think>' }}"
        "{% endif %}{{ m.content + '<|end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
    )
    both = {"role": ASSISTANT, "content": "<think>look outside</think>22", "reasoning_content": "look outside"}
    (made,) = training_rows(tokenizer, demonstration(row(messages=[{"role": USER, "content": "hello"}, both])), train_on="last_reply")
    assert trained_runs(tokenizer, made) == ["<think>look outside</think>22<|end|>"]


def test_reasoning_reaches_the_template_or_is_refused(tokenizer_of) -> None:
    tokenizer = tokenizer_of("byte_bpe")
    reply = [{"role": ASSISTANT, "content": "22", "reasoning_content": "look outside"}]
    tokenizer.chat_template = TEMPLATES["qwen3"]
    assert render_pair(tokenizer, "hello", reply)[1] == "<think>\nlook outside\n</think>\n\n22<|im_end|>\n"
    tokenizer.chat_template = TEMPLATES["deepseek"]  # ignores the field, and its generation prompt opens the block
    assert render_pair(tokenizer, "hello", reply)[1] == "look outside\n</think>\n\n22</s>"
    messages = [*turns("deepseek", MULTI[:3]), *reply]
    made = training_rows(tokenizer, demonstration(row(messages=messages)), train_on="last_reply")
    assert [trained_runs(tokenizer, one) for one in made] == [["look outside\n</think>\n\n22</s>"]]
    tokenizer.chat_template = TEMPLATES["chatml"]
    with pytest.raises(DataError, match="drops the reasoning of the last reply"):
        render_pair(tokenizer, "hello", reply)


def published(tokenizer_of: Any, name: str) -> Any:
    """A tokenizer with TRL's copy of a published template."""
    tokenizer = tokenizer_of("byte_bpe")
    tokenizer.chat_template = (files("trl") / f"chat_templates/{name}.jinja").read_text()
    return tokenizer


@pytest.mark.parametrize("name", ["qwen3_5_think", "qwen3_8", "nemotron_3_nano"])
def test_a_think_block_of_the_text_is_written_once(tokenizer_of, name) -> None:
    """Qwen 3.8's template writes another, empty block before one in the text; in the field it writes only that."""
    tokenizer = published(tokenizer_of, name)
    question = {"role": USER, "content": "hello"}
    in_field = {"role": ASSISTANT, "content": "22", "reasoning_content": "hm"}
    reference = tokenizer.apply_chat_template([question, in_field], tokenize=False)
    for reply in ("<think>\nhm\n</think>\n\n22", "hm\n</think>\n\n22"):
        for sampled in (False, True):
            written = "".join(render_pair(tokenizer, "hello", reply, sampled=sampled))
            assert written.count("</think>") == 1 and written.split() == reference.replace("</think>\n22", "</think>\n\n22").split()


@pytest.mark.parametrize("name", ["qwen3_5_think", "qwen3_8", "nemotron_3_nano", "deepseek_r1_distill"])
def test_a_sample_that_ends_in_its_reasoning_gets_no_empty_block(tokenizer_of, name) -> None:
    """The generation prompt opens the block, so a text without an end of the block is reasoning."""
    tokenizer = published(tokenizer_of, name)
    shown, written = render_pair(tokenizer, "hello", "let me see", sampled=True)
    assert shown.endswith("<think>\n") and written == "let me see" + turn_form(tokenizer).ending


def test_a_message_says_how_to_write_replies_without_reasoning(tokenizer_of) -> None:
    tokenizer = published(tokenizer_of, "nemotron_3_nano")
    advice = r"A reply without reasoning begins with <think></think>, or set template_arguments: \{enable_thinking: false\} of the model"
    with pytest.raises(DataError, match=advice):
        render_pair(tokenizer, "hello", "22")
    assert render_pair(tokenizer, "hello", "<think></think>22")[1] == "</think>22<|im_end|>\n"
    set_arguments(tokenizer, {"enable_thinking": False})
    with pytest.raises(
        DataError, match=r"remove the reasoning from the replies, or set template_arguments: \{enable_thinking: true\} of the"
    ):
        render_pair(tokenizer, "hello", "<think>\nhm\n</think>\n22")
    assert render_pair(tokenizer, "hello", "22") == (
        tokenizer.apply_chat_template([{"role": USER, "content": "hello"}], tokenize=False, add_generation_prompt=True),
        "22<|im_end|>\n",
    )


PARTS_ONLY = (
    "{% for m in messages %}{{ '<|' + m.role + '|>' }}{% for part in m.content %}{{ part.text }}{% endfor %}{{ '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


@pytest.mark.parametrize("template", [TEMPLATES["phi"], PARTS_ONLY], ids=["takes texts", "takes parts"])
@pytest.mark.parametrize("content", ["one two", [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]], ids=["text", "parts"])
def test_content_is_given_in_the_form_that_the_template_takes(tokenizer_of, template, content) -> None:
    tokenizer = tokenizer_of("byte_bpe")
    tokenizer.chat_template = template
    prompt = demonstration(row(messages=[{"role": USER, "content": content}, {"role": ASSISTANT, "content": content}]))
    (made,) = training_rows(tokenizer, prompt, train_on="all_assistant_turns")
    closing = "</s>" if "eos_token" in template else ""
    assert re.sub(r"\n", "", tokenizer.decode(made.ids)) == f"<|user|>one two<|end|><|assistant|>one two<|end|>{closing}"


def test_a_template_that_drops_a_system_turn_is_refused(tokenizer_of) -> None:
    tokenizer = tokenizer_of("byte_bpe")
    tokenizer.chat_template = "{% for m in messages if m.role != 'system' %}{{ m.content + eos_token }}{% endfor %}"
    messages = [{"role": SYSTEM, "content": "be kind"}, {"role": USER, "content": "hello"}]
    with pytest.raises(DataError, match="drops the system turn 'be kind'"):
        encode_prompt(tokenizer, messages)


def test_names_of_speakers_that_a_template_does_not_write_give_a_warning(tokenizer_of, caplog) -> None:
    tokenizer = tokenizer_of("byte_bpe")
    asked = [{"role": USER, "content": "hello", "name": "tom"}]
    tokenizer.chat_template = "{% for m in messages %}{{ '<|user|>' + (m.name or '') + ':' + m.content }}{% endfor %}"
    assert tokenizer.decode(encode_prompt(tokenizer, asked)) == "<|user|>tom:hello" and caplog.messages == []
    tokenizer.chat_template = TEMPLATES["chatml"]
    encode_prompt(tokenizer, asked)
    assert caplog.messages == ["the model's chat template does not write the field name of messages, so the model does not see who speaks"]


def test_named_templates_need_a_default(tokenizer_of) -> None:
    """Command R has the templates default, tool_use and rag. transformers uses tool_use for conversations with tools."""
    tokenizer = tokenizer_of("byte_bpe")
    tokenizer.chat_template = {"default": TEMPLATES["zephyr"], "tool_use": TEMPLATES["chatml"]}
    messages = turns("zephyr", SINGLE)
    for tools, expected in (([], "i am fine</s>\n"), (TOOLS, "i am fine<|im_end|>\n")):
        (made,) = training_rows(tokenizer, demonstration(row(messages=messages, tools=tools)), train_on="last_reply")
        assert trained_runs(tokenizer, made) == [expected]
    tokenizer.chat_template = {"chat": TEMPLATES["zephyr"], "rag": TEMPLATES["phi"]}
    with pytest.raises(ModelError, match="has the chat templates chat, rag, but none with the name default"):
        training_rows(tokenizer, demonstration(row(messages=messages)), train_on="last_reply")


def test_generation_markers_are_followed_to_the_token(tokenizer_of) -> None:
    """The markers may enclose the line end of the generation prompt. In a row with a prompt, only tokens of the completion are trained."""
    tokenizer = tokenizer_of("byte_bpe")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role }}{% if m.role == 'assistant' %}{% generation %}"
        "{{ '\\n' + m.content + '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}{% else %}"
        "{{ '\\n' + m.content + '<|im_end|>\\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n<think>\\n' }}{% endif %}"
    )
    messages = turns("chatml", MULTI)
    (made,) = training_rows(tokenizer, demonstration(row(messages=messages)), train_on="all_assistant_turns")
    theirs = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    assert made.ids == theirs["input_ids"] and made.trained == theirs["assistant_masks"]
    parted = demonstration(row(prompt=messages[:3], completion=messages[3:]))
    (made,) = training_rows(tokenizer, parted, train_on="all_assistant_turns")
    assert trained_runs(tokenizer, made) == ["\nthe sun is warm<|im_end|>", "\nthree<|im_end|>"]


def test_dropped_tool_call_is_detected_although_its_name_is_in_the_tools(tokenizer_of) -> None:
    tokenizer = tokenizer_of("byte_bpe")
    listed = "{% if tools %}{{ tools | tojson }}{% endif %}"
    tokenizer.chat_template = listed + "{% for m in messages %}{{ m.content or '' }}<|im_end|>{% endfor %}"
    call = {"role": ASSISTANT, "content": "", "tool_calls": [{"type": "function", "function": {"name": "look_up", "arguments": {}}}]}
    with pytest.raises(DataError, match=r"drops tool calls \(look_up\)"):
        read = demonstration(row(messages=[{"role": USER, "content": "hello"}, call], tools=TOOLS))
        training_rows(tokenizer, read, train_on="last_reply")


CALLS = [{"type": "function", "function": {"name": name, "arguments": {"a": 1}}} for name in ("look_up", "add")]
WRITES_CALLS = "{% for call in m.tool_calls or [] %}{{ '<tool_call>' + call.function | tojson }}{% endfor %}"


@pytest.mark.parametrize(
    ("written", "problem"),
    [
        ("{% if m.role != 'tool' %}{{ m.content or '' }}" + WRITES_CALLS + "<|im_end|>{% endif %}", "drops the tool turn '22'"),
        ("{% if not m.tool_calls %}{{ m.content }}{% endif %}" + WRITES_CALLS + "<|im_end|>", "drops the text 'wait' beside tool calls"),
        (
            "{{ m.content or '' }}{% if m.tool_calls %}{{ m.tool_calls[0].function | tojson }}{% endif %}<|im_end|>",
            r"drops tool calls \(add\)",
        ),
    ],
    ids=["tool result", "text beside calls", "second call"],
)
@pytest.mark.parametrize("train_on", ["all_assistant_turns", "last_reply"])
def test_what_a_template_drops_of_a_tool_conversation_is_named(tokenizer_of, written, problem, train_on) -> None:
    tokenizer = tokenizer_of("byte_bpe")
    tokenizer.chat_template = f"{{% for m in messages %}}{{{{ '<|' + m.role + '|>' }}}}{written}{{% endfor %}}" + (
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    called = {"role": ASSISTANT, "content": "wait", "tool_calls": CALLS}
    answered = {"role": "tool", "content": "22"}
    read = demonstration(row(messages=[{"role": USER, "content": "hello"}, called, answered, {"role": ASSISTANT, "content": "warm"}]))
    with pytest.raises(DataError, match=f"chats.jsonl:7: the model's chat template {problem}"):
        training_rows(tokenizer, read, train_on=train_on)


def test_a_reply_trains_after_reasoning_that_the_template_drops_once_it_is_written(tokenizer_of) -> None:
    """As gpt-oss: the text next to a tool call is reasoning, which the template writes until the conversation has a final reply."""
    tokenizer = tokenizer_of("byte_bpe")
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.tool_calls %}{% if m.content and messages[-1].role != 'assistant' or loop.last %}"
        "{{ '<|assistant|>(' + m.content + ')' }}{% endif %}{{ '<|assistant|>' + m.tool_calls[0].function | tojson + '<|end|>' }}"
        "{% else %}{{ '<|' + m.role + '|>' + ('=' if m.role == 'assistant' else '') + m.content + '<|end|>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    called = {"role": ASSISTANT, "content": "wait", "tool_calls": CALLS[1:]}
    messages = [{"role": USER, "content": "hello"}, called, {"role": "tool", "content": "22"}, {"role": ASSISTANT, "content": "warm"}]
    call = '<|assistant|>{"name": "add", "arguments": {"a": 1}}<|end|>'
    made = training_rows(tokenizer, demonstration(row(messages=messages)), train_on="all_assistant_turns")
    assert [trained_runs(tokenizer, one) for one in made] == [[f"(wait){call}"], ["=warm<|end|>"]]
    assert tokenizer.decode(made[1].ids) == f"<|user|>hello<|end|><|assistant|>(wait){call}<|tool|>22<|end|><|assistant|>=warm<|end|>"
    (alone,) = training_rows(tokenizer, demonstration(row(messages=messages)), train_on="last_reply")
    assert alone.ids == made[1].ids and trained_runs(tokenizer, alone) == ["=warm<|end|>"]


def test_think_block_that_the_template_rewrites_trains_or_is_refused(tokenizer_of) -> None:
    """The generation prompt and the replies of this template both begin with the mark and differ after it."""
    tokenizer = tokenizer_of("byte_bpe")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|' + m.role + '|>' }}{% if m.role == 'assistant' and '</think>' not in m.content %}"
        "{{ '<think></think>' }}{% endif %}{{ m.content.split('</think>')[-1] + '<|end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|><think>\\n' }}{% endif %}"
    )
    assert render_pair(tokenizer, "hello", "<think>\nhm\n</think>fine")[1] == "hm\n</think>fine<|end|>"
    with pytest.raises(DataError, match="end the reasoning in each reply with </think>"):
        render_pair(tokenizer, "hello", "fine")


def test_a_turn_may_end_with_the_start_of_the_next_turn(tokenizer_of) -> None:
    """Like GLM's template: generation stops where the next speaker begins."""
    tokenizer = tokenizer_of("byte_bpe")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|' + m.role + '|>\\n' + m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
    )
    assert tokenizer.convert_ids_to_tokens(turn_end_ids(tokenizer)) == ["<|user|>"]
    (made,) = training_rows(tokenizer, demonstration(row(messages=turns("", MULTI))), train_on="all_assistant_turns")
    assert trained_runs(tokenizer, made) == ["i am fine<|user|>", "the sun is warm<|user|>", "three<|user|>"]
    ids, length = encode_pair(tokenizer, "hello", "i am fine")
    assert tokenizer.decode(ids[length:]) == "i am fine<|user|>"
    assert tokenizer.decode(encode_pair(tokenizer, "hello", "i am fine", eos=False)[0][length:]) == "i am fine"


def test_trained_tokens_of_glm_are_those_that_its_training_template_marks(tokenizer_of) -> None:
    """TRL's copy of GLM-4.5's template marks the trained tokens. A reply ends with the token of the next speaker."""
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "rome"}}}
    messages = [
        *turns("", MULTI[:3]),
        {"role": ASSISTANT, "content": "wait", "tool_calls": [call]},
        {"role": "tool", "content": "22"},
        {"role": ASSISTANT, "content": "warm"},
    ]
    folder = files("trl") / "chat_templates"
    tokenizer = tokenizer_of("byte_bpe")
    marks = ["[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": marks})
    tokenizer.chat_template = (folder / "glm4moe.jinja").read_text()
    for spoken in (messages, messages[:4]):  # the last one calls a tool
        reference = tokenizer.apply_chat_template(
            spoken,
            chat_template=(folder / "glm4moe_training.jinja").read_text(),
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        (made,) = training_rows(tokenizer, demonstration(row(messages=spoken)), train_on="all_assistant_turns")
        assert (made.ids, made.trained) == (reference["input_ids"], reference["assistant_masks"])


REWRITES = {  # as Falcon-Instruct's and SmolLM3's templates
    "line breaks": ("{{ m.content.strip().replace('\\n\\n', '\\n') }}", "one\n\ntwo", "one\ntwo"),
    "a mark": ("{{ m.content.replace('/no_think', '').rstrip() }}", "be kind /no_think", "be kind"),
}


@pytest.mark.parametrize("rewrites", REWRITES)
def test_a_turn_in_another_form_is_not_a_dropped_turn(tokenizer_of, rewrites) -> None:
    written, content, expected = REWRITES[rewrites]
    tokenizer = tokenizer_of("byte_bpe")
    tokenizer.chat_template = f"{{% for m in messages %}}{{{{ '<|' + m.role + '|>' }}}}{written}{{% endfor %}}"
    messages = [{"role": SYSTEM, "content": content}, {"role": USER, "content": content}]
    assert tokenizer.decode(encode_prompt(tokenizer, messages)) == f"<|system|>{expected}<|user|>{expected}"


def test_a_short_turn_that_the_template_drops_is_found_although_other_words_contain_it(tokenizer_of) -> None:
    tokenizer = tokenizer_of("byte_bpe")
    tokenizer.chat_template = "{{ '<|user|>' + messages[-1].content }}"
    with pytest.raises(DataError, match="drops the user turn 'hi'"):
        encode_prompt(
            tokenizer, [{"role": USER, "content": "hi"}, {"role": ASSISTANT, "content": "yes"}, {"role": USER, "content": "this"}]
        )


def test_a_generation_prompt_at_the_end_of_a_conversation_is_not_trained(tokenizer_of) -> None:
    """This template ignores add_generation_prompt, and always writes the beginning of a reply."""
    tokenizer = tokenizer_of("byte_bpe")
    turn = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
    tokenizer.chat_template = turn + "{{ '<|im_start|>assistant\\n' }}"
    (made,) = training_rows(tokenizer, demonstration(row(messages=turns("chatml", MULTI))), train_on="all_assistant_turns")
    assert trained_runs(tokenizer, made) == ["i am fine<|im_end|>\n", "the sun is warm<|im_end|>\n", "three<|im_end|>\n"]
    (alone,) = training_rows(tokenizer, demonstration(row(messages=turns("chatml", SINGLE))), train_on="all_assistant_turns")
    assert trained_runs(tokenizer, alone) == ["i am fine<|im_end|>\n"] and tokenizer.decode(alone.ids).endswith("fine<|im_end|>\n")


def test_a_missing_generation_prompt_gives_a_warning(tokenizer_of, caplog) -> None:
    tokenizer = tokenizer_of("byte_bpe")
    tokenizer.chat_template = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
    turn_form(tokenizer)
    assert "ignores add_generation_prompt: the model itself must write '<|im_start|>assistant" in caplog.text


def test_a_marked_reply_that_later_turns_change_gets_its_own_row(tokenizer_of) -> None:
    """As LFM2.5's template: it has generation markers, and drops the reasoning of earlier replies."""
    tokenizer = tokenizer_of("byte_bpe")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|' + m.role + '|>' }}{% if m.role == 'assistant' %}{% generation %}"
        "{% if not loop.last %}{{ m.content.split('</think>')[-1] }}{% else %}{{ m.content }}{% endif %}{{ '<|end|>' }}{% endgeneration %}"
        "{% else %}{{ m.content + '<|end|>' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
    )
    spoken = [(USER, "hello there"), (ASSISTANT, "<think>so</think>fine"), (USER, "and now"), (ASSISTANT, "<think>hm</think>three")]
    messages = [{"role": role, "content": text} for role, text in spoken]
    last, first = training_rows(tokenizer, demonstration(row(messages=messages)), train_on="all_assistant_turns")
    assert trained_runs(tokenizer, last) == ["<think>hm</think>three<|end|>"]
    assert trained_runs(tokenizer, first) == ["<think>so</think>fine<|end|>"]
    assert tokenizer.decode(last.ids).startswith("<|user|>hello there<|end|><|assistant|>fine<|end|>")
    assert tokenizer.decode(first.ids) == "<|user|>hello there<|end|><|assistant|><think>so</think>fine<|end|>"
