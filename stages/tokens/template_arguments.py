"""Arguments of chat templates, such as ``enable_thinking``, stored in the template as the defaults of its variables.

So a saved model renders the same text in every program. An argument that is given to ``apply_chat_template`` replaces the default.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import lru_cache
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from stages.errors import ModelError

if TYPE_CHECKING:
    from jinja2 import nodes
    from transformers import PreTrainedTokenizerBase

Arguments = Mapping[str, object]
NONE: Arguments = MappingProxyType({})
GIVEN = ("messages", "tools", "add_generation_prompt", "raise_exception", "strftime_now")
"""Names in a template whose values come from the conversation or from transformers."""
_FIRST_LINE = re.compile(r"\A\{#- template arguments: (.*?) -#\}.*\n")


def set_arguments(tokenizer: PreTrainedTokenizerBase, arguments: Arguments, name: str = "") -> None:
    """Set ``arguments`` as defaults in the tokenizer's chat template. Those that it already has stay, unless ``arguments`` has others.

    Raises ModelError with the ``name`` of the model for an argument that no template of the tokenizer uses.
    """
    if not arguments:
        return
    if problem := unknown_arguments(tokenizer, arguments):
        raise ModelError(f"template_arguments of {name or tokenizer.name_or_path or 'the model'}: {problem}")
    own = tokenizer.chat_template
    if isinstance(own, dict):
        tokenizer.chat_template = {key: _with_defaults(template, arguments) for key, template in own.items()}
    else:
        tokenizer.chat_template = _with_defaults(own, arguments)


def unknown_arguments(tokenizer: PreTrainedTokenizerBase, arguments: Arguments) -> str:
    """Say which of ``arguments`` no template of the tokenizer uses; empty if each is used."""
    known = template_variables(tokenizer)
    unknown = ", ".join(name for name in arguments if name not in known)
    if not unknown:
        return ""
    if not tokenizer.chat_template:
        return f"its tokenizer has no chat template that could use {unknown}; remove these arguments"
    uses = f"it uses {', '.join(sorted(known))}" if known else "it has no arguments"
    return f"the chat template does not use {unknown}; {uses}"


def arguments_in(tokenizer: PreTrainedTokenizerBase) -> dict[str, object]:
    """The arguments that ``set_arguments`` stored in the tokenizer's chat template."""
    own = tokenizer.chat_template
    lines = [_FIRST_LINE.match(template) for template in (own.values() if isinstance(own, dict) else [own or ""])]
    return {name: value for line in lines if line for name, value in json.loads(line[1]).items()}


def without_arguments(tokenizer: PreTrainedTokenizerBase) -> object:
    """The tokenizer's chat template (or its named ones) before ``set_arguments``."""
    own = tokenizer.chat_template
    if isinstance(own, dict):
        return {name: _FIRST_LINE.sub("", template, count=1) for name, template in own.items()}
    return _FIRST_LINE.sub("", own or "", count=1)


def template_variables(tokenizer: PreTrainedTokenizerBase, template: str = "") -> set[str]:
    """The variables of ``template`` that a caller may set. Without it: those of the tokenizer's template, or of any of its named ones."""
    own = template or tokenizer.chat_template or ""
    read = {variable for template in (own.values() if isinstance(own, dict) else [own]) for variable in _variables(template)}
    return read - {*GIVEN, *tokenizer.special_tokens_map}


def used_arguments(tokenizer: PreTrainedTokenizerBase, template: str, arguments: Arguments) -> dict[str, Any]:
    """Those of ``arguments`` that ``template``, a chat template of the tokenizer, uses."""
    known = template_variables(tokenizer, template) if arguments else ()
    return {name: value for name, value in arguments.items() if name in known}


@lru_cache
def _variables(template: str) -> frozenset[str]:
    """The names that a template reads before it sets them. A name that it sets itself counts if its first mention is not the setting."""
    from jinja2 import meta
    from transformers.utils.chat_template_utils import _compile_jinja_template

    environment = _compile_jinja_template(template).environment
    tree = environment.parse(template)
    own, read = _set_in(tree), meta.find_undeclared_variables(tree) - set(environment.globals)
    return frozenset(read - own | read & _read_first(tree))


def _set_in(part: nodes.Node) -> set[str]:
    from jinja2 import nodes

    return {name.name for name in part.find_all(nodes.Name) if name.ctx == "store"}


def _read_first(part: nodes.Node) -> set[str]:
    """The names that a template, or a macro in it, mentions first where it reads them: ``{% set mode = mode or 'fast' %}``.

    In a macro only names that it sets itself count: the template may set the others after the macro.
    """
    from jinja2 import nodes

    reads: dict[str, bool] = {}
    in_macros: set[str] = set()
    waiting = [part]
    while waiting:
        node = waiting.pop()
        if isinstance(node, nodes.Name):
            reads.setdefault(node.name, node.ctx == "load")
        if isinstance(node, nodes.Macro) and node is not part:
            in_macros |= _read_first(node) & _set_in(node)
            continue
        first = ("node", "iter") if isinstance(node, nodes.Assign | nodes.For) else ()  # read before the target is set
        parts = [*node.iter_child_nodes(only=first), *node.iter_child_nodes(exclude=first)] if first else [*node.iter_child_nodes()]
        waiting += reversed(parts)
    return in_macros | {name for name, is_read in reads.items() if is_read}


def _with_defaults(template: str, arguments: Arguments) -> str:
    """``template`` with a first line that sets the variables that it uses to ``arguments``, unless the caller sets them.

    transformers passes ``documents=None`` if there are none, so None does not count as set.
    """
    line = _FIRST_LINE.match(template)
    rest = template[line.end() :] if line else template
    used = _variables(rest)
    values = {**(json.loads(line[1]) if line else {}), **{name: value for name, value in arguments.items() if name in used}}
    if not values:
        return template
    content = json.dumps(values, ensure_ascii=False).replace("#}", "#\\u007d")  # the end of a comment in Jinja
    defaults = "".join(
        f"{{%- if {name} is not defined or {name} is none -%}}{{%- set {name} = {_literal(value)} -%}}{{%- endif %}}"
        for name, value in values.items()
    )
    return f"{{#- template arguments: {content} -#}}{defaults}\n{rest}"  # transformers drops a line end after a block


def _literal(value: object) -> str:
    """A JSON value as a Jinja expression."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_literal(key)}: {_literal(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(_literal(item) for item in value) + "]"
    return "none" if value is None else json.dumps(value, ensure_ascii=False)
