"""Plain templates as chat templates: a form with the prompt in it, such as ``Question: {prompt}`` and ``Answer:`` on the next line.

They are kept as the tokenizer's ``chat_template``, so that they travel with the model. Their text is encoded as a plain text.
"""

from __future__ import annotations

import json
import re
from typing import Any

MARK = "{#- plain template -#}"
"""Begins a chat template that is a plain one."""

_FIRST_FORM = re.compile(
    r"\{%- for message in messages -%\}\{%- if message\['role'\] == 'assistant' -%\}\{\{ message\['content'\] \}\}\{\{ eos_token \}\}"
    r"\{%- else -%\}\{\{ (\".*?\") \}\}\{\{ message\['content'\] \}\}\{\{ (\".*\") \}\}\{%- endif -%\}\{%- endfor -%\}",
    re.DOTALL,
)
"""Plain templates as models of earlier versions keep them: they do not write the space before a completion."""


def plain_template(beginning: str, before: str, after: str) -> str:
    """A chat template that writes ``beginning`` once and wraps every turn but the assistant's in ``before`` and ``after``.

    An assistant's turn gets a space before it where neither side has one, and the end token after it.
    """
    return (
        f"{MARK}{{{{- {_quoted(beginning)} -}}}}{{%- set ns = namespace(gap=false) -%}}"
        "{%- for message in messages -%}{%- if message['role'] == 'assistant' -%}"
        "{%- if ns.gap and message['content'] and not message['content'][:1].isspace() -%}{{- ' ' -}}{%- endif -%}"
        "{{- message['content'] -}}{{- eos_token -}}{%- set ns.gap = false -%}"
        f"{{%- else -%}}{{%- set shown = {_quoted(before)} ~ message['content'] ~ {_quoted(after)} -%}}"
        "{{- shown -}}{%- set ns.gap = shown != '' and not shown[-1:].isspace() -%}"
        "{%- endif -%}{%- endfor -%}"
    )


def is_plain(tokenizer: Any) -> bool:
    """Whether the tokenizer's texts are plain ones: by a plain template, or because it has no template."""
    template = tokenizer.chat_template
    return not template or (isinstance(template, str) and (template.startswith(MARK) or bool(_FIRST_FORM.fullmatch(template))))


def is_begun(tokenizer: Any) -> bool:
    """Whether the tokenizer's plain template writes the tokens that begin a text; those of earlier versions do not."""
    return isinstance(tokenizer.chat_template, str) and tokenizer.chat_template.startswith(MARK)


def template_to_apply(tokenizer: Any) -> str | None:
    """The template to render with where it is not the tokenizer's own: a plain template of an earlier version in its present form."""
    own = tokenizer.chat_template
    found = _FIRST_FORM.fullmatch(own) if isinstance(own, str) else None
    return plain_template("", json.loads(found[1]), json.loads(found[2])) if found else None


def _quoted(text: str) -> str:
    """A jinja string literal."""
    return json.dumps(text, ensure_ascii=False)
