"""Chat templates write the date at which the step began."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any

from stages.chain.run import first_start_time
from stages.corpora.demonstrations import Demonstration
from stages.corpora.encoding.training_rows import training_rows
from stages.corpora.templates import encode_prompt
from stages.tokens.dates import templates_at

TEMPLATE = "{{ 'Today is ' + strftime_now('%d %b %Y') + '. ' }}{% for m in messages %}{{ m.content + eos_token }}{% endfor %}"


def test_a_template_writes_the_date_of_the_step(tokenizer_of: Any) -> None:
    tokenizer = tokenizer_of("byte_bpe")
    tokenizer.chat_template = TEMPLATE
    with templates_at(datetime(2024, 7, 26, 23, 59, 59)):
        ids = encode_prompt(tokenizer, "hello")
    assert tokenizer.decode(ids) == "Today is 26 Jul 2024. hello</s>"
    assert f" {datetime.now():%Y}. " in tokenizer.decode(encode_prompt(tokenizer, "hello"))
    assert tokenizer.chat_template == TEMPLATE  # the published template still writes the present date


CALLS = (
    """{% macro year(form) %}{{ strftime_now(form) }} {% endmacro %}{% set form = '%H:%M' %}{{ strftime_now(form) }} {{ year("%Y") }}"""
    "{% if strftime_now is defined %}{{ strftime_now(format='%d' + '.') }} {% endif %}"
    "{% for m in messages %}{% generation %}{{ m.content + eos_token }}{% endgeneration %}{% endfor %}"
)


def test_every_form_of_call_writes_the_date_of_the_step_also_in_rows_of_marked_replies(tokenizer_of: Any) -> None:
    tokenizer = tokenizer_of("byte_bpe")
    tokenizer.chat_template = CALLS
    with templates_at(datetime(2024, 7, 26, 8, 5)):
        (row,) = training_rows(tokenizer, Demonstration(prompt="hello", completion="there"), train_on="all_assistant_turns")
        assert tokenizer.decode(encode_prompt(tokenizer, "hello")) == "08:05 2024 26. hello</s>"
    assert tokenizer.decode(row.ids) == "08:05 2024 26. hello</s>there</s>"


def test_a_resumed_step_keeps_the_time_of_its_first_beginning(tmp_path: Path) -> None:
    kept = tmp_path / "step.began"
    first = first_start_time(kept)
    assert abs((datetime.now() - first).total_seconds()) < 60
    kept.write_text("2024-07-26T23:59:59")
    assert first_start_time(kept) == datetime(2024, 7, 26, 23, 59, 59)
    kept.write_text("damaged")
    assert first_start_time(kept) >= first
