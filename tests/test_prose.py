"""Words that are not used: identifiers without a meaning of their own (docs/terms.md has the words to use), and obscure phrases."""

from __future__ import annotations

import io
import re
import tokenize
from pathlib import Path

import pytest

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
    "whole_state_dict": "unsharded_state_dict",
    "whole_targets": "all_targets",
}
"""Identifier -> what to write instead."""

BANNED_PHRASES = ("made anew", "the user's to mend", "not looked at", "of one's own")


def sources() -> list[Path]:
    return sorted((REPOSITORY / "stages").rglob("*.py"))


def test_banned_identifiers_are_not_used() -> None:
    pattern = re.compile(rf"\b({'|'.join(BANNED_NAMES)})\b")
    used = []
    for file in sources():
        text = file.read_text(encoding="utf-8")
        if not pattern.search(text):
            continue
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type == tokenize.NAME and token.string in BANNED_NAMES:
                used.append(f"{file.relative_to(REPOSITORY)}:{token.start[0]}: {token.string} -> {BANNED_NAMES[token.string]}")
    assert not used, "\n".join(used)


@pytest.mark.parametrize("phrase", BANNED_PHRASES)
def test_banned_phrases_are_not_used(phrase: str) -> None:
    files = [*sources(), *sorted((REPOSITORY / "docs").glob("*.md"))]
    used = [str(file.relative_to(REPOSITORY)) for file in files if phrase in file.read_text(encoding="utf-8").lower()]
    assert not used, used
