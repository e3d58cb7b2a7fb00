"""Parse a judge's verdict from its reply: A, B or a tie, in the forms that language models use.

The forms are tried from the most to the least explicit: JSON, ``[[A]]`` and ``\\boxed{A}``, "final verdict: A", "answer: A", the full
reply or its last line, a verdict followed by a reason, and sentences such as "Response B is better because ...". The first form that
occurs is used. A reply that gives two different verdicts in that form has no verdict.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable, Iterator

A, B, TIE = 1.0, 0.0, 0.5
LABELS = "answer|verdict|winner|preference|choice|decision|judge?ment|result|conclusion"
JSON_KEYS = re.compile(rf"(?i)(?:final[\s_-]*)?(?:{LABELS}|preferred|better|best|label)(?:[\s_-]*(?:response|answer|option|one))?")

NOUN = r"(?i:response|answer|option|assistant|candidate|completion|output|reply|model|choice)"
ARTICLE = r"(?i:(?:the|a)\s+)?"
# In sentences the letter must be a capital, because a lower-case "a" is an article.
LETTER = rf"(?:{NOUN}\s*)?\b(?P<letter>[AB])\b"
ALONE = r"(?!\s*(?:,|/|&|\b(?i:or|and)\b)\s*(?:(?i:response|answer|option)\s*)?[AB]\b)"  # "A or B" is not a verdict
TIE_WORD = (
    r"(?i:tied?|draw|equal(?:ly\s+\w+)?|same|the\s+same|both|neither|no\s+(?:preference|difference)|"
    r"(?:both|they|(?:A|B)\s+and\s+(?:A|B))(?:\s+(?:responses|answers|options))?\s+(?:are|is)\s+(?:a\s+tie|tied|equal|(?:the\s+)?same|"
    r"equally\s+\w+|good|bad)|neither(?:\s+(?:response|answer|option))?\s+is\s+better)"
)
COMPARED = r"(?P<left>[AB])\s*(?P<sign>>+|<+|=+)\s*(?P<right>[AB])"
PHRASE = rf"(?:{COMPARED}|{LETTER}{ALONE}|{ARTICLE}(?P<tie>{TIE_WORD}))"

ENTIRE_REPLY = re.compile(
    rf"\W*(?:(?i:it(?:\s+is|'s)|(?:i\s+)?(?:prefer|choose|pick|think)|my\s+\w+\s+is|(?:the\s+)?(?:final\s+)?(?:{LABELS})\W*(?:is\b)?)\W+)?"
    rf"{PHRASE}(?:\s+(?i:is\s+better|wins))?\W*"
)
BRACKETED = re.compile(rf"\[\[\s*{PHRASE}\s*\]\]|\\boxed\s*\{{\s*(?:\\text\s*\{{)?\s*(?P<boxed>[AB]|(?i:tie))\s*\}}")
FINAL = re.compile(rf"\b(?i:final|overall)\s+(?i:{LABELS})\s*(?:(?i:is)\b)?\s*[:=]?\s*{PHRASE}")
LABELLED = re.compile(rf"\b(?i:{LABELS})\s*(?:(?i:is)\b)?\s*[:=]\s*{PHRASE}")
LEADING = re.compile(rf"\W*{LETTER}{ALONE}\s*(?:\W*(?P<reason>(?i:because|since|as)\b)|[.:,;()\n-])")

WORDS = r"(?:(?!(?i:not|never|no|than|less|only|neither|hardly|and|or)\b)[\w']+\s+){0,4}?"
MORE = r"more\s+(?:helpful|truthful|harmless|accurate|correct|honest|useful|relevant|complete)"
GOOD = rf"(?i:better|best|superior|preferable|preferred|stronger|winner|{MORE})"
PRAISED = re.compile(rf"{LETTER}{ALONE}\s+(?i:is|was|seems|appears|looks)\s+{WORDS}{GOOD}\b")
BLAMED = re.compile(rf"{LETTER}{ALONE}\s+(?i:is|was|seems|appears|looks)\s+{WORDS}(?i:worse|worst|inferior|weaker)\b")
ACTS = re.compile(rf"{LETTER}{ALONE}\s+(?i:wins\b|(?:answers|responds|addresses|performs|does|follows|explains)\b[^.;,!?]*?\bbetter\b)")
CHOSEN = re.compile(
    rf"\b(?i:prefer|choose|pick|select|favou?r(?:\s+of)?|go\s+with|vote\s+for|(?:better|best|preferred|stronger|superior)\s+(?:one|{NOUN})\s+is|"
    rf"(?:winner|verdict|answer|choice|preference)\s+is)\s+{LETTER}{ALONE}"
)
TIED = re.compile(
    r"(?i)\b(?:it(?:\s+is|'s)\s+a\s+(?:tie|draw)|equally\s+(?:good|bad|helpful|well|strong)|(?:is|are)\s+(?:tied|equal)|"
    r"neither\s+(?:\w+\s+)?is\s+better)\b"
)
OPEN = re.compile(r"(?i)\b(?:if|whether|unless|would\s+be|could|might|may|cannot|unclear|unsure)\b")  # no claim follows
NEGATED = re.compile(r"(?i)\b(?:not|never|hardly|nor)\b|n't\b")


def read_verdict(reply: str) -> float | None:
    """1 for A, 0 for B, 1/2 for a tie; None if the reply has no verdict or several different ones."""
    text = _without_thoughts(unicodedata.normalize("NFKC", reply)).strip()
    if not text:
        return None
    for read in (
        _of_json,
        _of_brackets,
        _of_label(FINAL),
        _of_entire_reply,
        _of_label(LABELLED),
        _of_last_line,
        _of_beginning,
        _of_sentences,
    ):
        verdicts = set(read(text))
        if verdicts:
            return verdicts.pop() if len(verdicts) == 1 else None
    return None


def _without_thoughts(text: str) -> str:
    """Remove the reasoning of a reasoning model. A reply that was truncated inside its reasoning becomes empty."""
    return re.sub(r"(?is)<think(?:ing)?>.*?(?:</think(?:ing)?>|\Z)", "", re.sub(r"(?is)\A.*</think(?:ing)?>", "", text))


def _plain(text: str) -> str:
    """Remove Markdown and quotation marks, and unify apostrophes."""
    text = text.replace("\u2019", "'")
    text = re.sub(r"[*`\"\u201c\u201d#]+|(?<!\w)'|'(?!\w)", "", text)
    return re.sub(r"_+", " ", text)


def _value(match: re.Match[str]) -> float:
    """The verdict of a match of PHRASE or LETTER."""
    groups = match.groupdict()
    if groups.get("left"):
        if groups["left"] == groups["right"]:
            return TIE
        return TIE if groups["sign"].startswith("=") else A if (groups["left"] == "A") == groups["sign"].startswith(">") else B
    letter = groups.get("letter") or groups.get("boxed")
    return {"A": A, "B": B}.get(letter or "", TIE)


# The forms. Each function yields all verdicts of its form.


def _of_json(text: str) -> Iterator[float]:
    for content in _json_values(text):
        yield from _of_content(content)


def _json_values(text: str) -> Iterator[object]:
    decoder, start = json.JSONDecoder(), 0
    while (bracket := re.compile(r"[{\[]").search(text, start)) is not None:
        try:
            content, start = decoder.raw_decode(text, bracket.start())
            yield content
        except (ValueError, RecursionError):
            start = bracket.end()


def _of_content(content: object) -> Iterator[float]:
    if isinstance(content, list) and len(content) == 1 and isinstance(content[0], str):
        yield from _of_entire_reply(content[0])
    if isinstance(content, dict):
        for key, value in content.items():
            if isinstance(value, str) and JSON_KEYS.fullmatch(key.strip()):
                yield from _of_entire_reply(value.strip())
            elif isinstance(value, dict):
                yield from _of_content(value)


def _of_brackets(text: str) -> Iterator[float]:
    return map(_value, BRACKETED.finditer(text))


def _of_label(label: re.Pattern[str]) -> Callable[[str], Iterator[float]]:
    return lambda text: map(_value, label.finditer(_plain(text)))


def _of_entire_reply(text: str) -> Iterator[float]:
    plain = _plain(text).strip()
    if re.fullmatch(r"\W*[ab]\W*", plain):
        plain = plain.upper()
    elif (small := re.fullmatch(rf"(?i)(\W*{NOUN}\s*)([ab])(\W*)", plain)) is not None:
        plain = f"{small[1]}{small[2].upper()}{small[3]}"
    if (match := ENTIRE_REPLY.fullmatch(plain)) is not None and "?" not in plain:
        yield _value(match)


def _of_last_line(text: str) -> Iterator[float]:
    return _of_entire_reply(text.splitlines()[-1])


def _of_beginning(text: str) -> Iterator[float]:
    """A verdict followed by its reason, e.g. "B.

    It is clearer". The reason may mention the other response only after "because" or "than".
    """
    plain = _plain(text)
    if (match := LEADING.match(plain)) is None:
        return
    rest = plain[match.end() :]
    other = "B" if match["letter"] == "A" else "A"
    mentions = re.search(rf"\b{other}\b", re.sub(rf"(?i:than)\s+(?:{NOUN}\s*)?{other}\b", "", rest))
    claims = set(_of_sentences(rest))
    if claims <= {_value(match)} and (match["reason"] or mentions is None or claims):
        yield _value(match)
    elif claims:
        yield from {*claims, _value(match)}


def _of_sentences(text: str) -> Iterator[float]:
    for sentence in re.findall(r"[^.;!?\n]+[.;!?\n]?", _plain(text)):
        if sentence.endswith("?"):
            continue
        for pattern, read in ((PRAISED, _value), (ACTS, _value), (CHOSEN, _value), (BLAMED, lambda match: 1 - _value(match))):
            yield from (read(match) for match in pattern.finditer(sentence) if _is_claimed(sentence, match))
        if (tied := TIED.search(sentence)) is not None and _is_claimed(sentence, tied):
            yield TIE


def _is_claimed(sentence: str, match: re.Match[str]) -> bool:
    """Whether the sentence states the match as a fact: not negated, not conditional."""
    before = sentence[: match.end()]
    return OPEN.search(before) is None and NEGATED.search(before.rpartition(",")[2]) is None
