"""Export and import tasks and answers in the formats of other tools.

    argilla         records of Argilla 2 (fields prompt, completion_1, ...; one RankingQuestion); a JSON list
    label-studio    tasks of Label Studio: two completions in a Pairwise tag, more in a List with a Ranker; a JSON list
    alpaca-eval     annotations of AlpacaEval: one row per pair, preference 1, 2, or 1.5 for a tie; a JSON list
    pandalm         test set of PandaLM: one row per pair with response1, response2, annotator1, ... (1, 2, 0 for a tie); a JSON list
    csv             one row per task, annotator and completion, with its rank
    comparisons     prompt + completions + ranks + annotator, JSON lines (export only): the format that training steps read

Some formats cannot represent everything: Label Studio, for example, has no ties. Such answers, and rows that match no task, are counted and
reported.
"""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Callable
from pathlib import Path

from stages.corpora.labels import labelled_rows
from stages.errors import DataError, StorageError
from stages.labelling.exchange.argilla import argilla_records, read_argilla
from stages.labelling.exchange.label_studio import LABEL_STUDIO_CONFIG, label_studio_tasks, read_label_studio
from stages.labelling.exchange.pairs import alpaca_eval_rows, pandalm_rows, read_alpaca_eval, read_pandalm
from stages.labelling.exchange.rankings import Incoming, given_answers
from stages.labelling.exchange.tables import csv_text, read_csv
from stages.labelling.store import Labels, Store, read_labels

WRITERS: dict[str, Callable[[Labels], tuple[object, dict[str, int]]]] = {
    "argilla": argilla_records,
    "label-studio": label_studio_tasks,
    "alpaca-eval": alpaca_eval_rows,
    "pandalm": pandalm_rows,
}
READERS: dict[str, Callable[[object, Labels, Incoming], None]] = {
    "argilla": read_argilla,
    "label-studio": read_label_studio,
    "alpaca-eval": read_alpaca_eval,
    "pandalm": read_pandalm,
}


def export_labels(folder: Path, kind: str, path: Path) -> str:
    """Write tasks and answers in another tool's format. Returns a message for the user. Raises DataError for an unknown format."""
    labels = read_labels(folder)
    lost: dict[str, int] = {}
    if kind == "csv":
        text = csv_text(labels)
    elif kind == "comparisons":
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for _, row in labelled_rows(folder))
    elif kind in WRITERS:
        content, lost = WRITERS[kind](labels)
        text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    else:
        raise DataError(f"{kind!r} is not a known format; expected one of {', '.join([*WRITERS, 'csv', 'comparisons'])}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8", newline="")
    except OSError as error:
        raise StorageError(f"{path} cannot be written: {error.strerror}. Name another file, or fix this and repeat the command") from error
    said = f"wrote {len(labels.tasks)} tasks with {sum(1 for _ in given_answers(labels))} rankings to {path}"
    if kind == "label-studio":
        sizes = sorted({"pairwise" if len(task.completions) == 2 else "ranker" for task in labels.tasks.values()})
        said += "".join(f"\nlabelling config ({name}): {LABEL_STUDIO_CONFIG[name]}" for name in sizes)
    return said + "".join(f"\nleft out: {number} {reason}" for reason, number in lost.items())


def import_answers(folder: Path, kind: str, path: Path) -> str:
    """Import rankings from another tool's file. Returns a message for the user. Skips answers that are already in the folder.

    Raises DataError for an unknown format or an invalid row. In that case nothing is imported.
    """
    if kind not in READERS and kind != "csv":
        raise DataError(f"{kind!r} is not a known format; expected one of {', '.join([*READERS, 'csv'])}")
    labels = read_labels(folder)
    incoming = Incoming(labels)
    try:
        text = path.read_text(encoding="utf-8-sig")
        if kind == "csv":
            read_csv(text, labels, incoming)
        else:
            READERS[kind](json.loads(text), labels, incoming)
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file") from error
    except (ValueError, csv.Error) as error:
        raise DataError(f"{path}: cannot be read as {kind} ({error})") from error
    except DataError as error:
        raise DataError(f"{path}: {error}") from error
    taken, known = _keep(folder, kind, incoming)
    said = f"imported {taken} rankings from {path}" + (f"; {known} already existed" if known else "")
    return said + "".join(f"\nleft out: {number} {reason}" for reason, number in incoming.left_out.items())


def _keep(folder: Path, kind: str, incoming: Incoming) -> tuple[int, int]:
    """Store the rankings.

    Returns (number of new rankings, number of rankings already stored). The id of an answer is a hash of its content.
    """
    store = Store(folder)
    taken = known = 0
    try:
        for item in incoming.rankings:
            annotator = _annotator_name(item.annotator)
            content = json.dumps([item.task, annotator, item.ranks])
            number = hashlib.sha256(content.encode()).hexdigest()[:32]
            if store.knows(number) or not store.store_imported(number, annotator, item.task, item.ranks, f"imported from {kind}"):
                known += 1
            else:
                taken += 1
    finally:
        store.close()
    return taken, known


def _annotator_name(name: str) -> str:
    """``name`` as a valid annotator name: at most 64 characters, with hyphens instead of characters that are not allowed."""
    return "".join(char if char.isalnum() or char in "._@+-" else "-" for char in name)[:64] or "imported"
