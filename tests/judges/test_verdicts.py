"""Reading a judge's verdict: forms of replies of language models, and replies without a verdict."""

import re

import pytest

from stages.judges.verdicts import read_verdict

A, B, TIE = 1.0, 0.0, 0.5

FIRST = [
    "A",
    "a",
    " A. ",
    "**A**",
    "`A`",
    "'A'",
    "[[A]]",
    "[A]",
    "(A)",
    "\\boxed{A}",
    "Ａ",
    "Ⓐ",
    "［［Ａ］］",
    "Response A",
    "response a",
    "Response_A",
    "Answer: A",
    "**Answer:** A",
    "Final verdict: A",
    "The answer is A.",
    "Verdict: **A**",
    "My choice is A",
    "A is better",
    "A > B",
    "B < A",
    "[[A>>B]]",
    '{"winner": "A"}',
    '{"verdict": "A"}',
    '{"preference": "A", "reason": "B is long"}',
    '{"better_response": "A"}',
    '{"Winner": "response A"}',
    '```json\n{"winner": "A"}\n```',
    'Here is my judgement:\n```\n{"final_verdict": "A"}\n```',
    '{"result": {"winner": "A"}}',
    '["A"]',
    '{"winner": "A", "confidence": 0.9}',
    "{'x'} Answer: A",
    '{"reason": "it says {so}", "winner": "A"}',
    "Response A is better because it is not wrong about the date.",
    "Response A is clearly better than response B.",
    "A is the better response.",
    "I prefer A.",
    "I would choose response A",
    "A wins.",
    "Response A answers the prompt better.",
    "The better response is A.",
    "A, because B is wrong",
    "B is worse than A.",
    "Response B is clearly inferior.",
    "A. The first one is clearer.",
    "A: it is clearer than B.",
    "A\n\nIt is shorter.",
    "Both responses are polite, but response A is more helpful.",
    "While B is not wrong, A is better.",
    "The first is clearer.\nA",
    "A is better in style. Final verdict: A",
    "<think>B is better? No.</think>A",
    "no opening tag, B is better.</think>\n\nA",
    "Winner: Response A",
    "My final answer is: A",
    "It is A.",
]
OTHER = dict(zip("ABabＡＢⒶⒷ", "BAbaＢＡⒷⒶ", strict=True))
TIES = [
    "tie",
    "Tie.",
    "a tie",
    "A tie",
    "**Tie**",
    "It's a tie.",
    "It is a draw",
    "draw",
    "equal",
    "Equal.",
    "both",
    "Both",
    "equally good",
    "tied",
    "Both are equal",
    "Both responses are equally good.",
    "A and B are equal.",
    "Verdict: tie",
    "Answer: both",
    '{"winner": "tie"}',
    "[[tie]]",
    "A = B",
    '{"verdict": "equal"}',
    "Neither is better.",
    "neither",
    "The responses are equally helpful.",
    "Ｔｉｅ",
    "The same",
    "no preference",
    "\\boxed{tie}",
]
NONE = [
    "",
    "  \n",
    "I cannot say.",
    "As an AI, a",
    "Banana",
    "A or B",
    "A, B, or tie",
    "A and B",
    "A/B",
    "Answer: A or B",
    "A B",
    "Is A better?",
    "A is better than B?",
    "I do not think A is better.",
    "A isn't better.",
    "I cannot say whether A is better.",
    "If you value brevity, A is better.",
    "A is better in style. B is better in substance.",
    "A is better in style, but B is better overall.",
    "A: good. B: better.",
    "[[A]] or [[B]]",
    '{"winner": "A", "verdict": "B"}',
    '{"winner": null}',
    '{"winner": "A or B"}',
    '{"A": 7, "B": 9}',
    '{"winner": "',
    "{}",
    "1",
    "①",
    "C",
    "As a language model I cannot judge this.",
    "A could be better.",
    "<think>A is better because",
    "Answer: A. Answer: B.",
    "A. No, B.",
    "B is wrong.",
    "Which is better: A, B, or tie?",
    "A good question.",
]


@pytest.mark.parametrize("reply", FIRST)
def test_the_first_response_is_read(reply: str) -> None:
    assert read_verdict(reply) == A


def swapped(reply: str) -> str:
    """The same reply in favour of the other response."""
    return re.sub(r"(?<![A-Za-z])[ABab\uff21\uff22\u24b6\u24b7](?![A-Za-z])", lambda match: OTHER[match[0]], reply)


@pytest.mark.parametrize("reply", [swapped(reply) for reply in FIRST])
def test_the_second_response_is_read(reply: str) -> None:
    assert read_verdict(reply) == B


@pytest.mark.parametrize("reply", TIES)
def test_a_tie_is_read(reply: str) -> None:
    assert read_verdict(reply) == TIE


@pytest.mark.parametrize("reply", NONE)
def test_reply_without_exactly_one_verdict_gives_none(reply: str) -> None:
    assert read_verdict(reply) is None
