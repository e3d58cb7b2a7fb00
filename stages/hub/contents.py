"""Digests of what Hub repositories contain, for the fingerprints of steps: only the files that a step reads count.

So a commit that only changes a README does not re-run a step. The Hub gives an id of each file's content; no file is downloaded for a
digest. The ids of a commit are kept with the downloaded files, so they can also be read offline.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from functools import lru_cache

from stages.errors import HubError
from stages.hub.models import is_read
from stages.hub.repositories import Kind, content_ids, folder_of, write_in_cache

FOLDER = "contents"  # in the cache folder of a repository: <commit>.json, path -> id of the content
DOCUMENTS = ("CHANGELOG", "COPYING", "LICENSE", "NOTICE", "README", "USE_POLICY")


def model_content(identifier: str, commit: str) -> str:
    """What a model contains at a commit: a digest of its weights, configuration, tokenizer and code; the commit if that is unknown."""
    return content_digest("model", identifier, commit, lambda name: is_read(name) and not name.upper().startswith(DOCUMENTS)) or commit


def content_digest(kind: Kind, identifier: str, commit: str, counts: Callable[[str], bool]) -> str | None:
    """A digest of the files whose path ``counts``; None if the Hub does not say what they contain, or no file counts."""
    ids = {name: content for name, content in _ids(kind, identifier, commit).items() if counts(name)}
    if not ids or None in ids.values():
        return None
    return hashlib.sha256(json.dumps(ids, sort_keys=True).encode()).hexdigest()


@lru_cache(maxsize=256)
def _ids(kind: Kind, identifier: str, commit: str) -> dict[str, str | None]:
    """The id of each file's content, by path; empty if it is unknown. A commit cannot change, so each is looked up once."""
    path = folder_of(kind, identifier) / FOLDER / f"{commit}.json"
    try:
        known: dict[str, str | None] = json.loads(path.read_text(encoding="utf-8"))
        return known
    except (OSError, ValueError):
        pass
    try:
        ids = content_ids(kind, identifier, commit)
    except HubError:
        return {}
    write_in_cache(path, json.dumps(ids))
    return ids
