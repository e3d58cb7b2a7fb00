"""Conversations of data sets: no field is lost, and the completion begins at an assistant turn."""

from __future__ import annotations

import json
import pickle
from typing import Any

import pytest

from stages.corpora.comparisons import comparison
from stages.corpora.completions import prompt_key
from stages.corpora.conversations.messages import Conversation, completion_text, messages_of, tools_of, transcript
from stages.corpora.demonstrations import demonstration
from stages.corpora.prompts import plain_text, prompt_in
from stages.corpora.rows import Row
from stages.errors import DataError
from stages.process.console import announcing


def row(**columns: Any) -> Row:
    made = Row(columns)
    made.location = "chats.jsonl:7"
    return made


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def bot(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


TOOLS = [{"type": "function", "function": {"name": "look_up", "parameters": {}}}]
CALL = {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": {"name": "look_up", "arguments": {"a": 1}}}]}
RESULT = {"role": "tool", "name": "look_up", "tool_call_id": "x1", "content": "22"}


def test_every_field_of_a_message_is_kept() -> None:
    thinking = {**bot("22"), "reasoning_content": "easy", "name": None}
    read = messages_of(row(messages=[{**user("hi"), "name": "Bob"}, CALL, RESULT, thinking], tools=TOOLS), "messages")
    assert read == Conversation([{**user("hi"), "name": "Bob"}, CALL, RESULT, {**bot("22"), "reasoning_content": "easy"}], tools=TOOLS)
    assert read[1]["content"] is None and read.location == "chats.jsonl:7"


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
@pytest.mark.parametrize("content", ["<think>\nit is  easy\n</think>\n\n22", "it is easy</think>22", "<think></think>22", "22"])
def test_reasoning_in_a_field_and_in_the_text_is_kept_once(name: str, content: str) -> None:
    read = messages_of(row(messages=[user("hi"), {**bot(content), name: "it is easy"}]), "messages")
    assert read[1] == {**bot("22"), name: "it is easy"}
    as_parts = {**bot(""), "content": [{"type": "text", "text": content}], name: "it is easy"}
    assert completion_text(messages_of(row(messages=[user("hi"), as_parts]), "messages")[1:]) == "<think>\nit is easy\n</think>\n22"


def test_blank_reasoning_gives_way_to_the_think_block_of_the_text() -> None:
    read = messages_of(row(messages=[user("hi"), {**bot("<think>so</think>22"), "reasoning_content": "\n"}]), "messages")
    assert read[1] == bot("<think>so</think>22")


def test_two_different_reasonings_of_one_reply_are_refused() -> None:
    with pytest.raises(
        DataError, match=r"chats.jsonl:7: messages, message 2: .*'easy' in reasoning_content and another think block .*'hard'"
    ):
        messages_of(row(messages=[user("hi"), {**bot("<think>hard</think>22"), "reasoning_content": "easy"}]), "messages")
    mentions = {**bot("the tag </think> ends it"), "reasoning_content": "easy"}
    assert messages_of(row(messages=[user("hi"), mentions]), "messages")[1] == mentions


def test_tools_make_another_prompt_and_travel_between_processes() -> None:
    plain, with_tools = Conversation([user("hi")]), Conversation([user("hi")], tools=TOOLS, location="a:1")
    assert plain == [user("hi")] and plain != with_tools and prompt_key(plain) != prompt_key(with_tools)
    assert prompt_key(plain) == prompt_key([user("hi")])
    again = pickle.loads(pickle.dumps(with_tools))
    assert again == with_tools and tools_of(again) == TOOLS and again.location == "a:1"
    as_json = row(messages=[user("hi"), bot("a")], tools='[{"name": "look_up"}]')
    assert tools_of(demonstration(as_json)["prompt"]) == [{"name": "look_up"}]
    assert demonstration(row(prompt="hi", completion="a", tools=TOOLS))["prompt"] == with_tools


SYSTEM = {"role": "system", "content": "be kind"}


@pytest.mark.parametrize(
    "columns",
    [
        {"prompt": "hi", "completion": "a"},
        {"prompt": "hi", "chosen": "a", "rejected": "b"},
        {"prompt": [user("hi")], "completion": "a"},
        {"prompt": "hi ", "chosen": [user("hi"), bot("a")], "rejected": [user("hi"), bot("b")]},
        {"prompt": "hi", "chosen": [SYSTEM, user("hi"), bot("a")], "rejected": [SYSTEM, user("hi"), bot("b")]},
        {"instruction": "hi", "output": "a"},
        {"messages": [user("hi"), bot("a")]},
        {"messages": [SYSTEM, user("hi"), bot("a")]},
    ],
    ids=lambda columns: "+".join(columns),
)
def test_the_column_system_is_the_first_turn_of_every_format(columns) -> None:
    with_system = row(**columns, system="be kind")
    assert demonstration(with_system)["prompt"] == [SYSTEM, user("hi")]
    assert prompt_in(with_system) == [SYSTEM, user("hi")]
    assert demonstration(row(**columns, system=" "))["completion"] == "a"
    with pytest.raises(DataError, match="chats.jsonl:7: system is int; expected a text"):
        demonstration(row(**columns, system=3))


def test_the_column_history_holds_earlier_turns() -> None:
    read = demonstration(row(instruction="more", input="please", output="c", system="be kind", history=[["hi", "a"], ["and", "b"]]))
    assert read == {"prompt": [SYSTEM, user("hi"), bot("a"), user("and"), bot("b"), user("more\n\nplease")], "completion": "c"}
    assert demonstration(row(instruction="more", output="c", history=[])) == {"prompt": "more", "completion": "c"}
    with pytest.raises(DataError, match=r"chats.jsonl:7: history is \['hi'\]; expected pairs"):
        demonstration(row(instruction="more", output="c", history=["hi"]))


def test_a_weight_is_0_or_1_and_only_replies_train() -> None:
    assert messages_of(row(messages=[{**user("hi"), "weight": 0}, {**bot("a"), "weight": 1}]), "messages") == [user("hi"), bot("a")]
    assert messages_of(row(messages=[user("hi"), {**bot("a"), "weight": 0}]), "messages")[1]["weight"] == 0
    with pytest.raises(DataError, match=r"message 2: .*weight is 0.5; expected 0 \(do not train on this reply\) or 1"):
        messages_of(row(messages=[user("hi"), {**bot("a"), "weight": 0.5}]), "messages")
    with pytest.raises(DataError, match="message 1: .*only the assistant's turns are trained on, and this is a user turn"):
        messages_of(row(messages=[{**user("hi"), "weight": 1}, bot("a")]), "messages")


@pytest.mark.parametrize(
    ("message", "problem"),
    [
        ({"role": "boss", "content": "a"}, "expected a role"),
        ({"role": "user", "content": None}, "expected text content"),
        ({"role": "assistant", "content": None}, "only an assistant message with tool_calls may have none"),
        ({"role": "user", "content": [{"type": "image", "url": "x"}]}, "images and audio are not supported"),
        ("hi", "expected a role"),
    ],
)
def test_a_message_that_cannot_be_read_is_named(message, problem) -> None:
    with pytest.raises(DataError, match=f"chats.jsonl:7: messages, message 2: .*{problem}"):
        messages_of(row(messages=[user("hi"), message]), "messages")


@pytest.mark.parametrize("tools", ["hammer", {"name": "a"}, [1]])
def test_invalid_tools_are_refused(tools) -> None:
    with pytest.raises(DataError, match=r"chats.jsonl:7: tools is .* expected a list of JSON descriptions"):
        messages_of(row(messages=[user("hi")], tools=tools), "messages")


HISTORY = [user("hi"), bot("hello")]


@pytest.mark.parametrize(
    ("columns", "prompt", "completions"),
    [
        # turns that follow the prompt; the common beginning of both sides belongs to the prompt
        ({"prompt": [user("hi")], "chosen": [bot("a")], "rejected": [bot("b")]}, [user("hi")], ["a", "b"]),
        (
            {"prompt": [user("hi")], "chosen": [bot("hello"), user("and?"), bot("a")], "rejected": [bot("hello"), user("what?"), bot("b")]},
            [user("hi")],
            [[bot("hello"), user("and?"), bot("a")], [bot("hello"), user("what?"), bot("b")]],
        ),
        (
            {"prompt": [user("hi")], "chosen": [bot("hello"), user("so?"), bot("a")], "rejected": [bot("hello"), user("so?"), bot("b")]},
            [user("hi"), bot("hello"), user("so?")],
            ["a", "b"],
        ),
        # complete conversations, with or without a prompt column
        ({"chosen": [*HISTORY, user("so?"), bot("a")], "rejected": [*HISTORY, user("so?"), bot("b")]}, [*HISTORY, user("so?")], ["a", "b"]),
        ({"prompt": "hi", "chosen": [user("hi"), bot("a")], "rejected": [user("hi"), bot("b")]}, "hi", ["a", "b"]),
        (
            {
                "prompt": "hi",
                "chosen": [{"role": "system", "content": "s"}, user("hi"), bot("a")],
                "rejected": [{"role": "system", "content": "s"}, user("hi"), bot("b")],
            },
            [{"role": "system", "content": "s"}, user("hi")],
            ["a", "b"],
        ),
        ({"prompt": [user("hi")], "chosen": [user("hi"), bot("a")], "rejected": [user("hi"), bot("b")]}, [user("hi")], ["a", "b"]),
        # a text prompt and an assistant turn; the two sides have different formats and lengths
        ({"prompt": "hi", "chosen": [bot("a")], "rejected": "b"}, "hi", ["a", "b"]),
        ({"prompt": "hi", "chosen": [CALL, RESULT, bot("a")], "rejected": [bot("b")]}, "hi", [[CALL, RESULT, bot("a")], "b"]),
        # several ranked completions
        (
            {"prompt": "hi", "responses": [[bot("a")], [bot("b")], [bot("c"), user("x"), bot("d")]]},
            "hi",
            ["a", "b", [bot("c"), user("x"), bot("d")]],
        ),
    ],
)
def test_comparisons_keep_every_turn(columns, prompt, completions) -> None:
    made = comparison(row(**columns))
    assert made.prompt == prompt and list(made.completions) == completions


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"chosen": [user("x"), bot("a")], "rejected": [user("y"), bot("b")]}, "share no first turn that the assistant answers"),
        ({"prompt": "other", "chosen": [user("x"), bot("a")], "rejected": [user("x"), bot("b")]}, "does not contain the prompt 'other'"),
        ({"prompt": "hi", "chosen": [bot("a"), user("b")], "rejected": [bot("b")]}, "chosen ends with the role 'user'"),
    ],
)
def test_conversations_that_do_not_fit_together_are_refused(columns, message) -> None:
    with pytest.raises(DataError, match=f"chats.jsonl:7: .*{message}"):
        comparison(row(**columns))


def test_demonstrations_keep_every_turn() -> None:
    made = demonstration(row(prompt=[user("hi")], completion=[bot("hello"), user("and?"), bot("a")]))
    assert made == {"prompt": [user("hi")], "completion": [bot("hello"), user("and?"), bot("a")]}
    assert made.location == "chats.jsonl:7" and not made.is_full_conversation
    conversation = demonstration(row(messages=[*HISTORY, user("so?"), CALL]))
    assert conversation == {"prompt": [*HISTORY, user("so?")], "completion": [CALL]} and conversation.is_full_conversation
    chosen = demonstration(row(chosen=[*HISTORY, user("so?"), bot("a")], rejected="-"))
    assert chosen == {"prompt": [*HISTORY, user("so?")], "completion": "a"} and chosen.is_full_conversation
    columns = demonstration(row(prompt="hi", completion=[user("hi"), bot("a")]))
    assert columns == {"prompt": "hi", "completion": "a"}


def test_prompts_of_rows_of_conversations() -> None:
    assert prompt_in(row(messages=[*HISTORY, user("so?")])) == [*HISTORY, user("so?")]
    assert prompt_in(row(messages=[*HISTORY, user("so?"), bot("a")])) == [*HISTORY, user("so?")]
    assert prompt_in(row(chosen=[user("hi"), bot("a")], rejected=[user("hi"), bot("b")])) == [user("hi")]
    with pytest.raises(DataError, match="chats.jsonl:7: prompt ends with an assistant turn"):
        prompt_in(row(prompt=HISTORY))


def test_a_transcript_says_who_speaks() -> None:
    one, other = [user("a"), bot("b"), user("c")], [user("a\n\nb"), bot("c"), user("")]
    assert plain_text(one) == "user: a\n\nassistant: b\n\nuser: c" and transcript(one) != transcript(other)
    assert transcript("hi") == transcript([user("hi")]) == "hi"
    long = Conversation([{"role": "system", "content": "s"}, {**user("x"), "name": "Bob"}, CALL, RESULT], tools=[{"name": "look_up"}])
    assert transcript(long) == (
        'tools: [{"name": "look_up"}]\n\nsystem: s\n\nuser (Bob): x\n\n'
        'assistant: [tool call] {"name": "look_up", "arguments": {"a": 1}}\n\ntool (look_up): 22'
    )
    assert completion_text([{**bot("a"), "reasoning_content": "hm"}, user("x"), bot("b")]) == (
        "<think>\nhm\n</think>\na\n\nuser: x\n\nassistant: b"
    )


@pytest.mark.parametrize("column", ["messages", "conversations"])
def test_a_conversation_may_be_json_text_as_in_a_table_of_texts(column: str) -> None:
    assert messages_of(row(**{column: json.dumps([user("a"), bot("b")])}), column) == [user("a"), bot("b")]


def test_a_conversation_as_python_text_is_refused_with_its_beginning() -> None:
    written = str([user("a"), bot("b")])  # as pandas writes a list to a CSV file
    with pytest.raises(DataError, match=r"^chats.jsonl:7: messages is str .*'role': 'user'.*; expected a list of messages .* JSON text$"):
        messages_of(row(messages=written), "messages")


@pytest.mark.parametrize("text", ['[{"role": "user", "content": "a"}]', "[ {'from': 'human', 'value': 'a'}]", '[{"name": "a"}]', "[role]"])
def test_messages_as_a_text_are_said_once_where_a_text_is_possible(text: str) -> None:
    said: list[str] = []
    with announcing(said.append):
        for _ in range(2):
            assert demonstration(row(prompt="p", completion=text))["completion"] == text
    expected = "chats.jsonl:7: completion is the text of a list of messages, and the model reads it as this text. "
    assert said == (
        [expected + "For a conversation, store the list itself, e.g. in .jsonl or .parquet"] if "user" in text or "human" in text else []
    )
