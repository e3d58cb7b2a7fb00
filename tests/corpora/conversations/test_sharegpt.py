"""Rows in ShareGPT's format give the same conversations as rows with roles."""

from __future__ import annotations

import json
from typing import Any

import pytest

from stages.corpora.comparisons import comparison
from stages.corpora.completions import completion_in
from stages.corpora.conversations.messages import messages_of
from stages.corpora.demonstrations import demonstration
from stages.corpora.prompts import prompt_in
from stages.corpora.rows import Row
from stages.errors import DataError


def row(**columns: Any) -> Row:
    made = Row(columns)
    made.location = "chats.jsonl:7"
    return made


def said(speaker: str, text: Any) -> dict[str, Any]:
    return {"from": speaker, "value": text}


def turn(role: str, text: str) -> dict[str, Any]:
    return {"role": role, "content": text}


ASKED = [said("human", "hi"), said("gpt", "hello"), said("human", "so?")]
READ = [turn("user", "hi"), turn("assistant", "hello"), turn("user", "so?")]
SYSTEM = turn("system", "be kind")


@pytest.mark.parametrize(
    ("speaker", "role"),
    [
        ("human", "user"),
        ("user", "user"),
        ("gpt", "assistant"),
        ("assistant", "assistant"),
        ("chatgpt", "assistant"),
        ("bard", "assistant"),
        ("system", "system"),
        ("tool", "tool"),
        ("observation", "tool"),
        ("function", "tool"),
        ("GPT", "assistant"),
    ],
)
def test_every_speaker_has_a_role(speaker, role) -> None:
    assert messages_of(row(conversations=[said(speaker, "hi")]), "conversations") == [turn(role, "hi")]


def test_conversations_are_read_wherever_messages_are() -> None:
    conversation = row(conversations=[*ASKED, said("gpt", "a")])
    made = demonstration(conversation)
    assert made == {"prompt": READ, "completion": "a"} and made.is_full_conversation
    assert prompt_in(conversation) == READ and completion_in(conversation) == (READ, "a")
    assert prompt_in(row(conversations=ASKED)) == READ
    with_roles = row(conversations=[*READ, turn("assistant", "a")])
    assert demonstration(with_roles) == made and completion_in(with_roles) == (READ, "a")
    assert demonstration(row(prompt=ASKED, completion=[said("gpt", "a")])) == made


def test_the_column_system_is_the_first_turn() -> None:
    read = demonstration(row(conversations=[*ASKED, said("gpt", "a")], system="be kind", tools='[{"name": "look_up"}]'))["prompt"]
    assert list(read) == [SYSTEM, *READ] and read.tools == [{"name": "look_up"}]
    assert prompt_in(row(conversations=[said("system", "be kind"), *ASKED], system="be kind")) == [SYSTEM, *READ]
    assert prompt_in(row(conversations=ASKED, system="")) == READ
    pair = comparison(row(system="be kind", chosen=[*ASKED, said("gpt", "a")], rejected=[*ASKED, said("gpt", "b")]))
    assert (pair.prompt, pair.completions) == ([SYSTEM, *READ], ["a", "b"])
    with pytest.raises(DataError, match="chats.jsonl:7: the column system and the first turn of conversations are different system turns"):
        prompt_in(row(conversations=[said("system", "be rude"), *ASKED], system="be kind"))


@pytest.mark.parametrize(
    "columns",
    [
        {"chosen": [*ASKED, said("gpt", "a")], "rejected": [*ASKED, said("gpt", "b")]},
        {"conversations": ASKED, "chosen": said("gpt", "a"), "rejected": said("gpt", "b")},
        {"conversations": ASKED, "chosen": [said("gpt", "a")], "rejected": [said("gpt", "b")]},
        {"conversations": ASKED, "chosen": "a", "rejected": "b"},
        {"prompt": ASKED, "chosen": [said("gpt", "a")], "rejected": [said("gpt", "b")]},
    ],
)
def test_chosen_and_rejected(columns) -> None:
    made = comparison(row(**columns))
    assert (made.prompt, list(made.completions), made.ranks) == (READ, ["a", "b"], [0, 1])
    assert prompt_in(row(**columns)) == READ
    shown = demonstration(row(**columns))
    assert shown == {"prompt": READ, "completion": "a"}
    assert shown.is_full_conversation == ("prompt" not in columns and "conversations" not in columns)


def test_a_function_call_becomes_tool_calls() -> None:
    call = {"name": "look_up", "arguments": {"town": "Rome"}}
    calls = [{"type": "function", "function": call}]
    for value in (json.dumps(call), json.dumps([call])):
        turns = [said("human", "hi"), said("function_call", value), said("observation", "22")]
        read = messages_of(row(conversations=turns), "conversations")
        assert read[1:] == [{"role": "assistant", "content": None, "tool_calls": calls}, turn("tool", "22")]
    with pytest.raises(DataError, match=r"chats.jsonl:7: conversations, message 1: the function call is 'look_up\(\)'; expected JSON"):
        messages_of(row(conversations=[said("function_call", "look_up()")]), "conversations")


def test_weight_without_effect_is_left_out() -> None:
    weighted = [{**said("human", "hi"), "weight": 0.0}, {**said("gpt", "a"), "weight": 1.0}, {**said("gpt", "b"), "weight": 0}]
    read = messages_of(row(conversations=weighted), "conversations")
    assert read == [turn("user", "hi"), turn("assistant", "a"), {**turn("assistant", "b"), "weight": 0}]


@pytest.mark.parametrize("column", ["conversations", "messages"])
def test_an_unknown_speaker_is_named_with_those_known(column) -> None:
    known = "expected one of human, user, gpt, assistant, chatgpt, bard, system, tool, observation, function, function_call"
    with pytest.raises(DataError, match=rf"^chats.jsonl:7: {column}, message 2: the speaker is 'narrator'; {known}$"):
        messages_of(row(**{column: [said("human", "hi"), said("narrator", "later")]}), column)
    with pytest.raises(DataError, match=rf"^chats.jsonl:7: {column}, message 1: .*expected text content"):
        messages_of(row(**{column: [said("human", None)]}), column)
