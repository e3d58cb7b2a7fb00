"""Files that an evaluation writes to its run folder, for the report and other tools.

evaluation.json             candidates, win rates, judges, agreement, curves, exclusions
completions.jsonl           one line per question: the prompt, every completion, every score and preference
tokens.jsonl                the tokens of the first prompts with their KL and value (token_details)
alpaca_eval/<name>.json     a candidate's completions in AlpacaEval's format
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from stages.corpora.conversations.messages import columns_beside
from stages.corpora.prompts import plain_text
from stages.evaluation.answers import Answers, Question
from stages.evaluation.judging import Judged
from stages.json_types import JsonObject, finite


def write_evaluation(folder: Path, content: Mapping[str, object]) -> None:
    """Write evaluation.json. Non-finite numbers become null, because JSON has no NaN."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(finite(content), indent=2, ensure_ascii=False, allow_nan=False)
    (folder / "evaluation.json").write_text(text + "\n", encoding="utf-8")


def write_completions(folder: Path, questions: Sequence[Question], answers: Mapping[str, Answers], judged: Sequence[Judged]) -> None:
    """Write completions.jsonl. A line omits candidates without a completion for its question."""
    lines = []
    for row, question in enumerate(questions):
        present = {name: answer for name, answer in answers.items() if answer.samples[row] is not None}
        line: JsonObject = {
            "prompt": question.prompt,
            **columns_beside(question.prompt),
            "prompt_number": question.prompt_number,
            "sample": question.sample,
            "completions": {name: answer.texts[row] for name, answer in present.items()},
            "scores": {
                judge.name: {name: judge.scores[name][row] for name in present if judge.scores[name][row] is not None}
                for judge in judged
                if judge.scores is not None
            },
            "preferences": {
                judge.name: [
                    {"a": a, "b": b, "preference": values[row]} for (a, b), values in judge.preferences.items() if values[row] is not None
                ]
                for judge in judged
                if judge.scores is None
            },
        }
        samples = {name: sample for name, answer in present.items() if (sample := answer.samples[row]) is not None}
        line["tokens"] = {name: len(sample.response_ids) for name, sample in samples.items() if sample.response_ids}
        line["stopped"] = {name: sample.stopped for name, sample in samples.items()}
        kl = {name: round(answer.kl[row], 4) for name, answer in present.items() if answer.kl is not None}
        lines.append({**line, "kl": kl} if kl else line)
    write_lines(folder / "completions.jsonl", lines)


def write_lines(path: Path, lines: Iterable[Mapping[str, object]]) -> None:
    """Write JSON Lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for line in lines:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def write_alpaca_eval(folder: Path, questions: Sequence[Question], answers: Mapping[str, Answers]) -> None:
    """Write one file per candidate in the format of ``alpaca_eval --model_outputs``: instruction, output, generator. First samples only."""
    for name, answer in answers.items():
        rows = [
            {"dataset": "tristage", "instruction": plain_text(question.prompt), "output": text, "generator": name}
            for question, text in zip(questions, answer.texts, strict=True)
            if text is not None and question.sample == 0
        ]
        path = folder / "alpaca_eval" / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
