"""Hub ids by the rules of huggingface_hub."""

from __future__ import annotations

import pytest
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from stages.hub.ids import is_hub_id, names_hub_repository

NAMES = ["gpt2", "owner/name", "a/b", "A.b_c-d/e.f", "123", "owner/na--me", "owner/na..me", "owner/name.git", ".owner/name", "owner/.name"]
NAMES += ["owner/name-", "-owner/name", "owner/name/more", "/owner/name", "owner/", "_owner/name_", "café/name", "owner/na%20me", "hub:a/b"]
NAMES += ["~/model", "./model", "C:\\models\\x", "owner/na\tme", "owner/name\n", "o" * 97, f"o/{'n' * 96}", ""]


@pytest.mark.parametrize("name", NAMES)
def test_the_rules_are_those_of_the_hub_client(name: str) -> None:
    try:
        validate_repo_id(name)
        allowed = True
    except HFValidationError:
        allowed = False
    assert is_hub_id(name) == allowed


def test_a_name_alone_is_an_id_if_it_has_a_digit_or_a_hyphen() -> None:
    assert all(names_hub_repository(name) for name in ("owner/name", "gpt2", "bert-base"))
    assert not any(names_hub_repository(name) for name in ("sft", "owner/na--me"))
