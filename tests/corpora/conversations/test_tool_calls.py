"""A chat template gets the arguments of tool calls in the form that it renders as JSON, for every file format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from stages.config import DataSource
from stages.corpora.conversations.messages import messages_of, tools_of, transcript
from stages.corpora.demonstrations import demonstration
from stages.corpora.files import read_rows
from stages.corpora.rows import Row
from stages.corpora.templates import render_pair
from stages.errors import DataError
from stages.tokens.turns import ArgumentForm, argument_form

START = (
    "{% for m in messages %}{{ '<' + m.role + '>' + (m.content or '') }}{% for call in m.tool_calls or [] %}"
    "{% set f = call.function %}{{ '[' + f.name + ' ' }}"
)
END = "]{% endfor %}<|im_end|>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
OBJECTS = {
    "tojson": START + "{{ f.arguments | tojson }}" + END,
    "complete call": START + "{{ f | tojson }}" + END,
    "items": START + "{% for k, v in f.arguments | items %}{{ k + '=' + v | string }};{% endfor %}" + END,
}
TEXTS = {
    "concatenated": START + "{{ '```json' + f.arguments + '```' }}" + END,
    "printed": START + "{{ f.arguments }}" + END,
}
BOTH = START + "{% if f.arguments is string %}{{ f.arguments }}{% else %}{{ f.arguments | tojson }}{% endif %}" + END
NINE = (
    "{% for m in messages %}{% for call in m.tool_calls or [] if call.id | length != 9 %}{{ raise_exception('id') }}{% endfor %}"
    "{% endfor %}"
)
NAMED = [
    {"name": "default", "template": "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"},
    {"name": "tool_use", "template": OBJECTS["tojson"]},
]
WRITTEN = {
    "tojson": '[look_up {"town": "Köln", "days": 3}]',
    "complete call": '[look_up {"name": "look_up", "arguments": {"town": "Köln", "days": 3}}]',
    "items": "[look_up town=Köln;days=3;]",
    "concatenated": '[look_up ```json{"town": "Köln", "days": 3}```]',
    "printed": '[look_up {"town": "Köln", "days": 3}]',
}
ARGUMENTS = {"town": "Köln", "days": 3}
TOOL = {"type": "function", "function": {"name": "look_up", "parameters": {"type": "object", "properties": {"town": {"type": "string"}}}}}


def call_of(arguments: Any) -> dict[str, Any]:
    function = {"name": "look_up", "arguments": arguments}
    return {"role": "assistant", "content": "", "tool_calls": [{"id": "call00001", "type": "function", "function": function}]}


def row(arguments: Any, **columns: Any) -> Row:
    made = Row({"messages": [{"role": "user", "content": "hi"}, call_of(arguments)], **columns})
    made.location = "calls.jsonl:7"
    return made


def written(tokenizer: Any, row: Row) -> str:
    read = demonstration(row)
    return render_pair(tokenizer, read["prompt"], read["completion"])[1]


@pytest.fixture
def tokenizer(tokenizer_of: Any) -> Any:
    return tokenizer_of("byte_bpe")


@pytest.mark.parametrize("arguments", [ARGUMENTS, json.dumps(ARGUMENTS, ensure_ascii=False)])
@pytest.mark.parametrize("name", list(WRITTEN))
def test_arguments_are_written_as_json_once(tokenizer, name, arguments) -> None:
    tokenizer.chat_template = {**OBJECTS, **TEXTS}[name]
    assert argument_form(tokenizer) == ArgumentForm(objects=name in OBJECTS, texts=name in TEXTS)
    assert written(tokenizer, row(arguments)) == WRITTEN[name] + "<|im_end|>"


def test_template_that_accepts_both_forms_renders_both_equally(tokenizer) -> None:
    tokenizer.chat_template = BOTH
    assert argument_form(tokenizer) == ArgumentForm(objects=True, texts=True)
    for arguments in (ARGUMENTS, json.dumps(ARGUMENTS, indent=1)):
        assert written(tokenizer, row(arguments)) == WRITTEN["tojson"] + "<|im_end|>"
    assert written(tokenizer, row("Köln")) == "[look_up Köln]<|im_end|>"


def test_argument_form_is_detected_inside_conditions_of_a_template(tokenizer) -> None:
    tokenizer.chat_template = NINE + OBJECTS["tojson"]
    assert argument_form(tokenizer) == ArgumentForm(objects=True, texts=False)
    tokenizer.chat_template = {item["name"]: item["template"] for item in NAMED}
    assert argument_form(tokenizer) == ArgumentForm(objects=True, texts=False)
    assert written(tokenizer, row(json.dumps(ARGUMENTS), tools=[TOOL])) == WRITTEN["tojson"] + "<|im_end|>"
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"
    assert argument_form(tokenizer) == ArgumentForm(objects=False, texts=False)


@pytest.mark.parametrize("arguments", ["Köln", "[1, 2]", '{"town": '])
def test_arguments_that_are_not_a_json_object_are_kept_or_refused(tokenizer, arguments) -> None:
    tokenizer.chat_template = TEXTS["printed"]
    for text in (arguments, json.dumps(ARGUMENTS)):  # the text of a JSON object is unchanged, too
        assert written(tokenizer, row(text)) == f"[look_up {text}]<|im_end|>"
    tokenizer.chat_template = OBJECTS["tojson"]
    with pytest.raises(DataError, match=r"^calls.jsonl:7: the arguments of the tool call look_up are .*needs a JSON object$"):
        written(tokenizer, row(arguments))


def test_a_blank_text_is_a_call_without_arguments(tokenizer) -> None:
    tokenizer.chat_template = OBJECTS["tojson"]
    assert written(tokenizer, row("")) == "[look_up {}]<|im_end|>"


def test_a_transcript_shows_arguments_as_json_once() -> None:
    shown = transcript(messages_of(row(json.dumps(ARGUMENTS)), "messages"))
    assert shown == 'user: hi\n\nassistant: [tool call] {"name": "look_up", "arguments": {"town": "Köln", "days": 3}}'


def test_tool_calls_that_are_not_a_list_are_refused() -> None:
    as_json = Row(messages=[{**call_of({}), "tool_calls": json.dumps(call_of({})["tool_calls"])}])
    assert messages_of(as_json, "messages") == [call_of({})]
    for calls in ("look_up()", [1], {"name": "look_up"}):
        with pytest.raises(DataError, match="messages, message 1: .*expected tool_calls, a list of objects"):
            messages_of(Row(messages=[{**call_of({}), "tool_calls": calls}]), "messages")


OTHER = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {"a": {"type": "number"}}}}}


def table() -> list[dict[str, Any]]:
    """Two rows whose objects have different fields."""
    adding = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}]}
    asked = {"role": "user", "content": "hi"}
    return [{"messages": [asked, call_of(ARGUMENTS)], "tools": [TOOL]}, {"messages": [asked, adding], "tools": [OTHER]}]


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "arrow", "saved"])
def test_null_fields_added_by_the_table_are_removed(tmp_path: Path, kind: str) -> None:
    import pyarrow
    from pyarrow import feather, parquet

    path = tmp_path / f"calls.{kind}"
    if kind == "jsonl":
        path.write_text("\n".join(map(json.dumps, table())))
    elif kind == "parquet":
        parquet.write_table(pyarrow.Table.from_pylist(table()), path)
    elif kind == "arrow":
        feather.write_feather(pyarrow.Table.from_pylist(table()), path)
    else:
        from datasets import Dataset

        Dataset.from_list(table()).save_to_disk(path)
    rows = read_rows([DataSource(path=str(path), columns={"messages": "messages"})])
    for row_read, given in zip(rows, table(), strict=True):
        read = messages_of(row_read, "messages")
        assert list(read) == given["messages"] and tools_of(read) == given["tools"]


@pytest.mark.parametrize("saved", [False, True])
def test_json_columns_are_parsed_and_keep_their_nulls(tmp_path: Path, saved: bool) -> None:
    """``datasets`` writes objects of mixed types as JSON: here every message, and one keyword of the tools' schemas."""
    from datasets import Dataset

    rows = table()
    rows[0]["messages"] = [{"role": "user", "content": "hi"}, call_of({"town": None, "days": "three"})]
    rows[1]["messages"][1]["tool_calls"][0]["function"]["arguments"] = {"days": 3}
    rows[1]["tools"] = json.loads(json.dumps([TOOL]).replace('"type": "string"', '"type": ["string", "null"]'))
    path = tmp_path / ("table" if saved else "table.parquet")
    made = Dataset.from_list(rows, on_mixed_types="use_json")
    _ = made.save_to_disk(path) if saved else made.to_parquet(path)
    for row_read, given in zip(read_rows([DataSource(path=str(path))]), rows, strict=True):
        read = messages_of(row_read, "messages")
        assert list(read) == given["messages"] and tools_of(read) == given["tools"]


def test_null_in_json_lines_is_an_argument(tokenizer) -> None:
    tokenizer.chat_template = OBJECTS["tojson"]
    assert written(tokenizer, row({"town": None})) == '[look_up {"town": null}]<|im_end|>'
    assert written(tokenizer, row('{"town": null}')) == '[look_up {"town": null}]<|im_end|>'
