"""Chat templates write the date at which the step began."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any

from stages.chain.run import first_start_time
from stages.corpora.templates import encode_prompt
from stages.tokens.dates import dated, templates_at

TEMPLATE = "{{ 'Today is ' + strftime_now('%d %b %Y') + '. ' }}{% for m in messages %}{{ m.content + eos_token }}{% endfor %}"


def test_a_template_writes_the_date_of_the_step(tokenizer_of: Any) -> None:
    tokenizer = tokenizer_of("byte_bpe")
    tokenizer.chat_template = TEMPLATE
    with templates_at(datetime(2024, 7, 26, 23, 59, 59)):
        ids = encode_prompt(tokenizer, "hello")
    assert tokenizer.decode(ids) == "Today is 26 Jul 2024. hello</s>"
    assert f"Today is {datetime.now():%Y}" not in dated(TEMPLATE) and f"{datetime.now():%Y}" in dated(TEMPLATE)
    assert tokenizer.chat_template == TEMPLATE  # the published template still writes the present date


def test_calls_with_other_quotes_are_replaced_and_a_test_for_the_function_is_not() -> None:
    template = """{% if strftime_now is defined %}{{ strftime_now( "%H:%M" ) }}{% endif %}{{ strftime_now(form) }}"""
    with templates_at(datetime(2024, 7, 26, 8, 5)):
        assert dated(template) == """{% if strftime_now is defined %}{{ "08:05" }}{% endif %}{{ strftime_now(form) }}"""


def test_a_resumed_step_keeps_the_time_of_its_first_beginning(tmp_path: Path) -> None:
    kept = tmp_path / "step.began"
    first = first_start_time(kept)
    assert abs((datetime.now() - first).total_seconds()) < 60
    kept.write_text("2024-07-26T23:59:59")
    assert first_start_time(kept) == datetime(2024, 7, 26, 23, 59, 59)
    kept.write_text("damaged")
    assert first_start_time(kept) >= first
