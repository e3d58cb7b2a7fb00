"""CSV: one row per task, annotator and completion, with its rank."""

from __future__ import annotations

import csv
import io

from stages.corpora.labels import LabelAnswer
from stages.corpora.prompts import plain_text
from stages.errors import DataError
from stages.labelling.exchange.rankings import Incoming, answers_of
from stages.labelling.store import Labels

COLUMNS = ["task", "annotator", "completion", "rank", "author", "prompt", "text", "seconds", "time"]


def csv_text(labels: Labels) -> str:
    made = io.StringIO()
    writer = csv.DictWriter(made, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for task in labels.tasks.values():
        answers: list[LabelAnswer | None] = [*answers_of(labels, task)] or [None]
        for answer in answers:
            for index, text in enumerate(task.texts):
                writer.writerow(
                    {
                        "task": task.id,
                        "annotator": answer.annotator if answer else "",
                        "completion": index + 1,
                        "rank": answer.ranks[index] + 1 if answer and answer.ranks else "",
                        "author": "+".join(task.authors[index]),
                        "prompt": plain_text(task.asked),
                        "text": text,
                        "seconds": answer.seconds if answer else "",
                        "time": answer.time if answer else "",
                    }
                )
    return made.getvalue()


def read_csv(text: str, labels: Labels, incoming: Incoming) -> None:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    if reader.fieldnames is None or not {"task", "annotator", "completion", "rank"} <= set(reader.fieldnames):
        columns = ", ".join(map(repr, reader.fieldnames or ()))
        raise DataError(f"the CSV has the columns {columns or 'none':.200}; expected task, annotator, completion and rank")
    given: dict[tuple[str, str], dict[int, int]] = {}
    for row in reader:
        if row["rank"] == "":
            continue
        try:
            given.setdefault((row["task"], row["annotator"] or "csv"), {})[int(row["completion"]) - 1] = int(row["rank"])
        except ValueError as error:
            raise DataError(
                f"line {reader.line_num}: completion {row['completion']!r}, rank {row['rank']!r}; expected whole numbers"
            ) from error
    for (name, annotator), ranks in given.items():
        task = labels.tasks.get(name)
        if task is None:
            incoming.skip("rankings that match no task")
        elif set(ranks) != set(range(len(task.completions))):
            incoming.skip("rankings without one of the completions")
        else:
            incoming.take(name, annotator, [ranks[index] for index in range(len(task.completions))])
