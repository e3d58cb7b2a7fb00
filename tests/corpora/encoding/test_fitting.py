"""A long post is cut at its end; the format around it is kept."""

from __future__ import annotations

import pytest

from stages.corpora.encoding.fitting import PromptFit, fit_prompt
from stages.corpora.templates import encode_prompt
from stages.errors import DataError

FIT = {"after": "POST: ", "before": "\n\nTL;DR:"}


def post(text: str) -> str:
    return f"SUBREDDIT: r/film\n\nTITLE: a film\n\nPOST: {text}\n\nTL;DR:"


@pytest.mark.detail("G7")
def test_lines_are_cut_from_the_end_of_the_post(tiny_tokenizer) -> None:
    lines = ["the acting was warm", "the plot was dull", "the ending was weak"]
    full = post("\n".join(lines))
    lengths = [len(encode_prompt(tiny_tokenizer, post("\n".join(lines[:kept])))) for kept in range(4)]
    for kept in (3, 2, 1):
        for limit in (lengths[kept], lengths[kept] + 3):  # exactly the limit, or a few tokens more
            if kept < 3 and limit >= lengths[kept + 1]:
                continue
            assert fit_prompt(full, PromptFit(max_tokens=limit, **FIT), tiny_tokenizer) == post("\n".join(lines[:kept]))


@pytest.mark.detail("G7")
def test_a_single_line_is_cut_by_characters(tiny_tokenizer) -> None:
    full = post("a fine film with a bright and honest story")
    limit = len(encode_prompt(tiny_tokenizer, full)) - 4
    fitted = fit_prompt(full, PromptFit(max_tokens=limit, **FIT), tiny_tokenizer)
    assert fitted.endswith("\n\nTL;DR:") and fitted.startswith("SUBREDDIT: r/film\n\nTITLE: a film\n\nPOST: a fine film")
    assert len(encode_prompt(tiny_tokenizer, fitted)) <= limit
    # one more character would not fit
    kept = len(fitted.split("POST: ")[1].split("\n\nTL;DR:")[0])
    longer = post("a fine film with a bright and honest story"[: kept + 1])
    assert len(encode_prompt(tiny_tokenizer, longer)) > limit


def test_prompt_that_cannot_be_shortened_is_refused(tiny_tokenizer) -> None:
    with pytest.raises(DataError, match="has no text between 'BODY' and"):
        fit_prompt(post("x" * 99), PromptFit(max_tokens=50, after="BODY", before="TL"), tiny_tokenizer)
    with pytest.raises(DataError, match="more than 5 tokens even without"):
        fit_prompt(post("x" * 99), PromptFit(max_tokens=5, **FIT), tiny_tokenizer)
    assert fit_prompt(post("x"), PromptFit(max_tokens=500, **FIT), tiny_tokenizer) == post("x")
    plain = fit_prompt("one\ntwo\nthree", PromptFit(max_tokens=len(encode_prompt(tiny_tokenizer, "one\ntwo"))), tiny_tokenizer)
    assert plain == "one\ntwo"


@pytest.mark.detail("G8")
def test_the_form_of_a_post_is_the_papers() -> None:
    from stages.corpora.rows import Row
    from stages.corpora.summaries import post_prompt

    row = Row({"subreddit": "tifu", "title": "by asking", "post": "Line one.\nLine two.", "summary": "x"})
    assert post_prompt(row) == "SUBREDDIT: r/tifu\n\nTITLE: by asking\n\nPOST: Line one.\nLine two.\n\nTL;DR:"
