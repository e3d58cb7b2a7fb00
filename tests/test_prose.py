"""Checks of names and prose: identifiers without a clear meaning (docs/terms.md has the terms to use), and obscure phrases."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]

BANNED_NAMES = {
    "are_cut": "are_sharded",
    "closing_mask": "bootstrap_mask",
    "closing_returns": "bootstrap_returns",
    "closing_values": "bootstrap_values",
    "exact": "what it makes",
    "found": "what was found",
    "goal": "targets",
    "is_cut": "is_sharded",
    "_note": "log_iteration",
    "passes": "token_budget_batches",
    "place": "index, column, location or field_path",
    "place_of": "location_of",
    "rows_of_a_pass": "rows_per_batch",
    "whole": "unsharded, full or all",
    "whole_rows": "one_sequence_per_row",
    "whole_state_dict": "unsharded_state_dict",
    "whole_targets": "all_targets",
    "whole_text": "full_text",
}
"""Identifier -> what to write instead."""

BANNED_PHRASES = (
    "all the same",
    "anew",
    "as it is written",
    "as they are written",
    "as they stand",
    "at once",
    "beside a",
    "beside the",
    "dealt out",
    "deals out",
    "go on with",
    "goes on",
    "however many",
    "in little",
    "in vain",
    "is no number",
    "laid out",
    "less the",
    "like length",
    "looked after",
    "made up",
    "mended",
    "nothing but",
    "not looked at",
    "of its own",
    "of old",
    "of one's own",
    "of their own",
    "one state behind",
    "paid at",
    "put together",
    "stand on",
    "stands on",
    "that very",
    "the user's to mend",
    "the word for",
    "told from",
    "told of",
    "what became of",
    "whatever",
    "where nothing",
    "word of its own",
)
"""Phrases in lower case. They may be split over two lines."""

PROSE = ("stages/**/*.py", "tests/**/*.py", "docs/*.py", "docs/*.md", "*.md", "recipes/*.yaml", "data/**/*.md", "launch.sh")


def files(*patterns: str) -> list[Path]:
    """The files of the repository that match, without this one, which contains the banned words."""
    return sorted({file for pattern in patterns for file in REPOSITORY.glob(pattern)} - {Path(__file__)})


def identifiers(text: str) -> Iterator[tuple[int, str]]:
    """(line, name) of every name in Python source: variables, parameters, keywords, attributes, functions and classes."""
    for node in ast.walk(ast.parse(text)):
        for field in ("id", "arg", "attr", "name"):
            if isinstance(name := getattr(node, field, None), str):
                yield getattr(node, "lineno", 0), name


def test_identifiers_include_those_in_f_strings() -> None:
    assert {name for _, name in identifiers("def f(a, *, b): g(c=f'{d:.{e}}').h")} == set("abcdefgh")


def test_banned_identifiers_are_not_used() -> None:
    sources = files("stages/**/*.py", "tests/**/*.py", "docs/*.py")
    assert len(sources) > 300
    pattern = re.compile(rf"\b({'|'.join(BANNED_NAMES)})\b")
    used = [
        f"{file.relative_to(REPOSITORY)}:{line}: {name} -> {BANNED_NAMES[name]}"
        for file in sources
        if pattern.search(text := file.read_text(encoding="utf-8"))
        for line, name in identifiers(text)
        if name in BANNED_NAMES
    ]
    assert not used, "\n".join(used)


def test_banned_phrases_are_not_used() -> None:
    phrases = re.compile("|".join(rf"\b{re.escape(phrase)}\b".replace(r"\ ", r"[\s#]+") for phrase in BANNED_PHRASES))
    used = [
        f"{file.relative_to(REPOSITORY)}:{text.count(chr(10), 0, match.start()) + 1}: {match[0]!r}"
        for file in files(*PROSE)
        for text in [file.read_text(encoding="utf-8").lower()]
        for match in phrases.finditer(text)
    ]
    assert not used, "\n".join(used)


def test_banned_identifiers_are_not_used_in_scripts_of_pages() -> None:
    """JavaScript without comments. Words of texts count as well, because texts contain identifiers in ``${...}``."""
    scripts = files("stages/**/*.js")
    assert len(scripts) > 3
    pattern = re.compile(rf"\b({'|'.join(BANNED_NAMES)})\b")
    used = [
        f"{file.relative_to(REPOSITORY)}: {name} -> {BANNED_NAMES[name]}"
        for file in scripts
        for name in pattern.findall(re.sub(r"//[^\n]*|/\*.*?\*/", "", file.read_text(encoding="utf-8"), flags=re.DOTALL))
    ]
    assert not used, "\n".join(used)


def test_no_part_of_a_text_is_lost_in_a_function() -> None:
    """Without parentheses, the second line of a text is a statement that does nothing, and the text ends with its first line."""
    lost = [
        f"{file.relative_to(REPOSITORY)}:{statement.lineno}"
        for file in files("stages/**/*.py")
        for block in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(block, (ast.FunctionDef, ast.If, ast.For, ast.With, ast.Try))
        for index, statement in enumerate(block.body)
        if isinstance(statement, ast.Expr) and isinstance(statement.value, (ast.Constant, ast.JoinedStr))
        if not (index == 0 and isinstance(block, ast.FunctionDef)) and getattr(statement.value, "value", "") is not ...
    ]
    assert not lost, "\n".join(lost)
