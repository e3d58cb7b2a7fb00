"""How a prompt becomes tokens. The template is the tokenizer's ``chat_template``, so that it travels with the model that learned it.

A model without a template gets the prompt's text as it is; its tokenizer's own beginning token, if it adds one, comes first.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from stages.corpora.messages import Prompt
from stages.errors import DataError, ModelError

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedTokenizerBase

PLAIN_TEMPLATES = {
    "plain": "{prompt}",
    "instruction": "### Instruction:\n{prompt}\n\n### Response:\n",
    "dialogue": "\n\nHuman: {prompt}\n\nAssistant:",
    "question": "Question: {prompt}\nAnswer:",
    "tldr": "{prompt}\n\nTL;DR:",
}


def set_template(tokenizer: PreTrainedTokenizerBase, template: str) -> None:
    """Give ``tokenizer`` a template: ``chat`` (its own), a name of PLAIN_TEMPLATES, or a text with ``{prompt}``.

    Raises ModelError for ``chat`` where the tokenizer has none, and for a text without ``{prompt}``.
    """
    if template == "chat":
        if not tokenizer.chat_template:
            names = ", ".join(PLAIN_TEMPLATES)
            raise ModelError(f"template: chat, and the tokenizer has no chat template; name a plain one ({names}) or write {{prompt}}")
        return
    text = PLAIN_TEMPLATES.get(template, template)
    if text.count("{prompt}") != 1:
        raise ModelError(f"template {template!r}: expected chat, one of {', '.join(PLAIN_TEMPLATES)}, or a text with {{prompt}} once")
    before, after = text.split("{prompt}")
    # The user's turns are wrapped; an assistant's turn stands as it is and ends with the end token.
    tokenizer.chat_template = (
        "{%- for message in messages -%}{%- if message['role'] == 'assistant' -%}{{ message['content'] }}{{ eos_token }}{%- else -%}"
        f"{{{{ {_quoted(before)} }}}}{{{{ message['content'] }}}}{{{{ {_quoted(after)} }}}}"
        "{%- endif -%}{%- endfor -%}"
    )


def _quoted(text: str) -> str:
    """A jinja string literal."""
    return json.dumps(text, ensure_ascii=False)


def render_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> str:
    """The text that the model is shown. Raises DataError for a conversation where the tokenizer has no template."""
    if not tokenizer.chat_template:
        if isinstance(prompt, str):
            return prompt
        raise DataError("the prompt is a conversation, and the model has no chat template; set template in its sft step")
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> list[int]:
    """Token ids of a prompt as the model is shown it. A template writes its own special tokens; without one the tokenizer adds them."""
    text = render_prompt(tokenizer, prompt)
    ids = list(tokenizer(text, add_special_tokens=not tokenizer.chat_template)["input_ids"])
    if not tokenizer.chat_template and len(ids) > 1 and ids[-1] == tokenizer.eos_token_id:
        ids = ids[:-1]  # a tokenizer that closes every text would end the completion before it begins
    if not ids:  # an empty prompt: the model needs something to begin from
        begin = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        ids = [begin] if begin is not None else []
    return ids


def encode_completion(tokenizer: PreTrainedTokenizerBase, completion: str, *, eos: bool = True) -> list[int]:
    """Token ids of a completion, closed by the end token."""
    ids = list(tokenizer(completion, add_special_tokens=False)["input_ids"])
    return [*ids, tokenizer.eos_token_id] if eos and tokenizer.eos_token_id is not None else ids


def encode_pair(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, completion: str, *, eos: bool = True) -> tuple[list[int], int]:
    """(token ids of prompt and completion, how many of them are the prompt).

    Prompt and completion are tokenized apart: at sampling time the prompt's tokens are there before the completion's.
    """
    prompt_ids = encode_prompt(tokenizer, prompt)
    return prompt_ids + encode_completion(tokenizer, joined(tokenizer, prompt, completion), eos=eos), len(prompt_ids)


def joined(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, completion: str) -> str:
    """The completion with a leading space where the prompt as shown ends in a letter or a mark and the completion begins without one."""
    shown = render_prompt(tokenizer, prompt)
    if shown and completion and not shown[-1].isspace() and not completion[0].isspace():
        return " " + completion
    return completion


def count_tokens(tokenizer: PreTrainedTokenizerBase) -> Callable[[str], int]:
    """How many tokens a text has, without those that a template adds."""
    return lambda text: len(tokenizer(text, add_special_tokens=False)["input_ids"])
