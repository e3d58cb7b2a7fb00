"""The page: everything foreign is escaped, nothing is fetched, the verdict says what the numbers say."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from typing import Any

from stages.config import ModelInput
from stages.evaluation import Answers
from stages.report.page import render_page
from stages.report.results import candidate_rows, compare, evaluation_table, verdict
from stages.runtime import ResolvedModel

EVIL = "<script>alert('x')</script><img src=x onerror=alert(1)> & \"quotes\" </p>"


def answers(completions: list[str], scores: list[float]) -> Answers:
    ids = [[index] for index in range(len(completions))]
    return Answers(completions, ids, ids, [[-1.0]] * len(completions), [True] * len(completions), scores={"gold": scores})


def outcome(**given: Answers) -> Any:
    models = {name: ResolvedModel(f"recipe/{name}", "folder", name, f"sha256:{name}", ModelInput(ref=name)) for name in given}
    return compare(given, ["gold"], models)


def test_foreign_text_stays_text() -> None:
    given = {"base": answers([EVIL], [0.0]), "aligned": answers(["fine"], [1.0])}
    page = render_page(f"run {EVIL}", [EVIL], given, outcome(**given), ["gold"])
    assert page.count("<script>") == 1 and "<img" not in page
    assert "&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt;" in page

    class Tags(HTMLParser):
        def __init__(self) -> None:
            super().__init__()
            self.open: list[str] = []

        def handle_starttag(self, tag: str, attrs: Any) -> None:
            assert not {"src", "href"} & {name for name, _ in attrs}
            if tag not in ("meta", "input", "link", "br"):
                self.open.append(tag)

        def handle_endtag(self, tag: str) -> None:
            assert self.open.pop() == tag

    parser = Tags()
    parser.feed(page)
    assert parser.open == []
    assert "http" not in page.replace("http-equiv", "")


def test_the_winner_is_marked() -> None:
    given = {"base": answers(["a", "b", "c"], [0.0, 1.0, 0.5]), "aligned": answers(["d", "e", "f"], [1.0, 0.0, 0.5])}
    page = render_page("run", ["p", "q", "r"], given, outcome(**given), ["gold"])
    assert re.findall(r'data-winner="(\w*)"', page) == ["aligned", "base", ""]


def test_verdict_says_how_sure() -> None:
    many, few = [1.0] * 40, [0.0] * 40
    texts = ["x"] * 40
    said = verdict(outcome(base=answers(texts, few), aligned=answers(texts, many)), ["gold"])
    assert said == "By gold, aligned beats base on 100% of 40 prompts (95 %: 91% to 100%)."
    said = verdict(outcome(base=answers(texts, many), aligned=answers(texts, few)), ["gold"])
    assert "aligned loses to base, winning 0% of 40 prompts" in said
    said = verdict(outcome(base=answers(texts, many), aligned=answers(texts, many)), ["gold"])
    assert "aligned cannot be told from base, winning 50%" in said


def test_tables() -> None:
    found = outcome(base=answers(["a b a b", "a b"], [0.25, 0.75]), aligned=answers(["c d", ""], [1.0, 1.0]))
    # 4 of 6... words: a b a b a b -> 2 distinct of 6; bigrams ab ba ab ab -> 2 of 4
    assert candidate_rows(found, ["gold"])[0] == ["base", "0.500", "3.0", "100%", "0.333", "0.500"]
    assert len(evaluation_table(found, ["gold"])) == 2
