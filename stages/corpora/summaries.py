"""Posts to summarize, in the published form of the TL;DR data (Stiennon et al. 2020). The prompt template is theirs.

subreddit, title, post, summary                        a demonstration (tldr_3_filtered)
info {subreddit, title, post | article}, summaries [{text, ...}], choice, worker        a comparison of two (comparisons)
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from stages.corpora.rows import Row, text_of
from stages.errors import DataError

POST = "SUBREDDIT: r/{subreddit}\n\nTITLE: {title}\n\nPOST: {post}\n\nTL;DR:"
ARTICLE = "Article:\n{article}\n\nTL;DR:"


def is_post(row: Mapping[str, object]) -> bool:
    return "post" in row and "title" in row and "subreddit" in row


def is_comparison(row: Mapping[str, object]) -> bool:
    return "info" in row and "summaries" in row


def post_prompt(row: Row) -> str:
    """The prompt for a post."""
    fields = {name: text_of(row, name, empty=name != "post") for name in ("subreddit", "title", "post")}
    return _filled(POST, fields)


def compared_prompt(row: Row) -> str:
    """The prompt of a comparison: a Reddit post, or a news article (in the batches named cnndm).

    Raises DataError if the row has no such object.
    """
    info = row["info"]
    if not isinstance(info, dict):
        raise DataError(f"{row.location}: info is {type(info).__name__}; expected an object with subreddit, title and post, or article")
    inner = Row(info)
    inner.location = f"{row.location}, info"
    if info.get("post") is None:
        return _filled(ARTICLE, {"article": text_of(inner, "article")})
    return post_prompt(inner)


def compared_summaries(row: Row) -> tuple[list[str], list[int]]:
    """Return (summaries, ranks). ``choice`` is the index of the better summary. Raises DataError for another form."""
    summaries, choice = row["summaries"], row.get("choice")
    good = isinstance(summaries, list) and all(isinstance(item, dict) and isinstance(item.get("text"), str) for item in summaries)
    if not good or len(summaries) < 2:
        raise DataError(f"{row.location}: summaries is {summaries!r:.80}; expected a list of at least two objects with a text")
    if isinstance(choice, bool) or not isinstance(choice, int) or not 0 <= choice < len(summaries):
        raise DataError(f"{row.location}: choice is {choice!r}; expected the index of the better summary, from 0 to {len(summaries) - 1}")
    return [item["text"] for item in summaries], [int(index != choice) for index in range(len(summaries))]


def _filled(form: str, fields: Mapping[str, str]) -> str:
    """Fill the slots of ``form`` in one pass, so that braces inside a post stay as they are."""
    return re.sub(r"\{(\w+)\}", lambda slot: fields[slot[1]], form)
