"""Plain templates, such as ``Question: {prompt}`` and ``Answer:`` on the next line, stored as chat templates.

They are the tokenizer's ``chat_template``, so they are saved with the model. Their text is encoded as plain text.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MARK = "{#- plain template -#}"
"""Marks a chat template as a plain template."""

_FIRST_FORM = re.compile(
    r"\{%- for message in messages -%\}\{%- if message\['role'\] == 'assistant' -%\}\{\{ message\['content'\] \}\}\{\{ eos_token \}\}"
    r"\{%- else -%\}\{\{ (\".*?\") \}\}\{\{ message\['content'\] \}\}\{\{ (\".*\") \}\}\{%- endif -%\}\{%- endfor -%\}",
    re.DOTALL,
)
"""Plain templates of models from earlier versions. They do not write the space before a completion."""


def plain_template(beginning: str, before: str, after: str) -> str:
    """A chat template that writes ``beginning`` once, and wraps every non-assistant turn in ``before`` and ``after``.

    It inserts a space before an assistant turn if neither side has one, and appends the end token.
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


def is_plain(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer uses plain texts: it has a plain template or no template."""
    template = tokenizer.chat_template
    return not template or (isinstance(template, str) and (template.startswith(MARK) or bool(_FIRST_FORM.fullmatch(template))))


def is_begun(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the plain template writes the tokenizer's prefix tokens; templates of earlier versions do not."""
    return isinstance(tokenizer.chat_template, str) and tokenizer.chat_template.startswith(MARK)


def template_to_apply(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The template to render with if it is not the tokenizer's own: the current form of an earlier version's plain template."""
    own = tokenizer.chat_template
    match = _FIRST_FORM.fullmatch(own) if isinstance(own, str) else None
    return plain_template("", json.loads(match[1]), json.loads(match[2])) if match else None


def _quoted(text: str) -> str:
    """A Jinja string literal."""
    return json.dumps(text, ensure_ascii=False)
