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
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import combinations
from pathlib import Path
from uuid import NAMESPACE_URL, uuid5

from stages.corpora.labels import LabelAnswer, LabelTask, labelled_rows
from stages.corpora.prompts import plain_text
from stages.errors import DataError
from stages.json_types import JsonObject
from stages.labelling.store import Labels, Store, read_labels

RANKING = "ranking"
TIED_LABEL_STUDIO = "rankings with ties, which Label Studio cannot represent"
LABEL_STUDIO_CONFIG = {
    "ranker": '<View><Text name="prompt" value="$prompt"/><List name="completions" value="$items" title="Best first"/>'
    '<Ranker name="ranking" toName="completions"/></View>',
    "pairwise": '<View><Text name="prompt" value="$prompt"/><Pairwise name="ranking" toName="completion_1,completion_2"/>'
    '<Text name="completion_1" value="$completion_1"/><Text name="completion_2" value="$completion_2"/></View>',
}


@dataclass
class Taken:
    """One imported ranking: its task, its annotator, and the ranks in the order of the task's completions."""

    task: str
    annotator: str
    ranks: list[int]


@dataclass
class Incoming:
    """The rankings in an imported file, and the number of skipped rows by reason."""

    labels: Labels
    rankings: list[Taken] = field(default_factory=list)
    left_out: dict[str, int] = field(default_factory=dict)

    def skip(self, reason: str) -> None:
        """Count one skipped row under ``reason``."""
        self.left_out[reason] = self.left_out.get(reason, 0) + 1

    @cached_property
    def pairs(self) -> dict[tuple[str, frozenset[str]], LabelTask]:
        """Tasks with two completions, by (prompt, set of the two texts)."""
        tasks = (task for task in self.labels.tasks.values() if len(task.completions) == 2)
        return {(plain_text(task.asked), frozenset(task.texts)): task for task in tasks}

    def take(self, task: str, annotator: object, ranks: list[int]) -> None:
        """Add a ranking. The lowest rank is the best."""
        self.rankings.append(Taken(task, str(annotator), ranks))


def _objects(content: object) -> list[JsonObject]:
    if not isinstance(content, list) or not all(isinstance(item, dict) for item in content):
        raise DataError(f"expected a JSON list of objects, got {type(content).__name__}")
    return content


def given_answers(labels: Labels) -> Iterator[tuple[LabelTask, LabelAnswer]]:
    """All rankings that count, with their tasks, in the order of the tasks."""
    for name, task in labels.tasks.items():
        for annotator in sorted(labels.answers):
            answer = labels.answers[annotator].get(name)
            if answer is not None and answer.is_used:
                yield task, answer


def answers_of(labels: Labels, task: LabelTask) -> list[LabelAnswer]:
    """The rankings of one task that count, sorted by annotator."""
    return [
        answer for annotator in sorted(labels.answers) if (answer := labels.answers[annotator].get(task.id)) is not None and answer.is_used
    ]


def _best_first(ranks: list[int]) -> list[int]:
    return sorted(range(len(ranks)), key=lambda index: (ranks[index], index))


def _from_order(order: list[int]) -> list[int]:
    return [order.index(index) for index in range(len(order))]


def _without_ties(answers: Iterable[LabelAnswer], lost: dict[str, int], reason: str) -> Iterator[tuple[LabelAnswer, list[int]]]:
    """The answers without ties, with their ranks. The answers with ties are counted in ``lost`` under ``reason``."""
    for answer in answers:
        assert answer.ranks is not None
        if len(set(answer.ranks)) < len(answer.ranks):
            lost[reason] = lost.get(reason, 0) + 1
        else:
            yield answer, answer.ranks


# Argilla


def _argilla_out(labels: Labels) -> tuple[object, dict[str, int]]:
    records = []
    for task in labels.tasks.values():
        names = [f"completion_{index + 1}" for index in range(len(task.completions))]
        responses = [
            {"value": _argilla_value(names, answer), "user_id": _user_id(answer.annotator), "status": "submitted"}
            for answer in answers_of(labels, task)
        ]
        records.append(
            {
                "id": task.id,
                "fields": {"prompt": plain_text(task.asked), **dict(zip(names, task.texts, strict=True))},
                "metadata": {},
                "suggestions": {},
                "responses": {RANKING: responses} if responses else {},
                "vectors": {},
            }
        )
    return records, {}


def _argilla_value(names: list[str], answer: LabelAnswer) -> Sequence[object]:
    """A ranking in Argilla's format: the names, best first. With ties, a list of {value, rank} whose ranks start at 1."""
    assert answer.ranks is not None
    order = _best_first(answer.ranks)
    if len(set(answer.ranks)) == len(answer.ranks):
        return [names[index] for index in order]
    return [{"value": names[index], "rank": answer.ranks[index] + 1} for index in order]


def _user_id(annotator: str) -> str:
    """A UUID derived from the annotator's name, because Argilla identifies users by UUID."""
    return str(uuid5(NAMESPACE_URL, f"annotator:{annotator}"))


def _argilla_in(content: object, labels: Labels, incoming: Incoming) -> None:
    names = {_user_id(annotator): annotator for annotator in labels.answers}
    for number, record in enumerate(_objects(content), 1):
        task = labels.tasks.get(str(record.get("id") or record.get("external_id")))
        if task is None:
            incoming.skip("records that match no task")
            continue
        for response in _argilla_responses(record):
            fields = response if isinstance(response, dict) else {}
            if fields.get("status") in ("draft", "discarded"):
                incoming.skip(f"{fields['status']} responses")
                continue
            value = fields.get("value")
            ranks = _argilla_ranks(value, len(task.completions))
            if ranks is None:
                raise DataError(
                    f"record {number}: ranking is {value!r:.80}; expected completion_1 to completion_{len(task.completions)}, best first, "
                    "or {value, rank} for each"
                )
            user = str(fields.get("user_id") or "argilla")
            incoming.take(task.id, names.get(user, user), ranks)


def _argilla_responses(record: Mapping[str, object]) -> list[object]:
    """The responses to the ranking question.

    They are nested (Record.to_dict), or flattened into three parallel lists (to_list(flatten=True)). Raises DataError if the lists differ
    in length.
    """
    responses = record.get("responses")
    if isinstance(responses, dict):
        return _listed(responses.get(RANKING), f"responses.{RANKING}")
    if record.get(f"{RANKING}.responses") is None:
        return _listed(record.get(RANKING), RANKING)
    values = _listed(record[f"{RANKING}.responses"], f"{RANKING}.responses")
    names = (f"{RANKING}.responses.users", f"{RANKING}.responses.status")
    users, states = (_listed(record.get(name), name) or [None] * len(values) for name in names)
    if not len(values) == len(users) == len(states):
        raise DataError(f"record {record.get('id')}: {RANKING}.responses, its users and its status have different lengths")
    return [{"value": value, "user_id": user, "status": state} for value, user, state in zip(values, users, states, strict=True)]


def _listed(value: object, name: str) -> list[object]:
    """The list in the field ``name``; empty if the field is empty. Raises DataError for another value."""
    if not value:
        return []
    if not isinstance(value, list):
        raise DataError(f"{name} is {value!r:.60}; expected a list")
    return value


def _argilla_ranks(value: object, number: int) -> list[int] | None:
    """Ranks from Argilla's three formats. None if the value is not a complete ranking.

    The formats are: names, best first; a list of {value, rank}; {value: [names], rank: [numbers]}.
    """
    if isinstance(value, dict) and isinstance(value.get("value"), list) and isinstance(value.get("rank"), list):
        if len(value["value"]) != len(value["rank"]):
            return None
        value = [{"value": name, "rank": rank} for name, rank in zip(value["value"], value["rank"], strict=True)]
    if not isinstance(value, list):
        return None
    ranks = {}
    for position, item in enumerate(value):
        name, rank = (item.get("value"), item.get("rank", position)) if isinstance(item, dict) else (item, position)
        if not isinstance(name, str) or type(rank) is not int:
            return None
        ranks[name] = rank
    names = [f"completion_{index + 1}" for index in range(number)]
    return [ranks[name] for name in names] if set(ranks) == set(names) else None


# Label Studio


def _label_studio_out(labels: Labels) -> tuple[object, dict[str, int]]:
    lost: dict[str, int] = {}
    tasks = []
    for task in labels.tasks.values():
        is_pair = len(task.completions) == 2
        data: JsonObject = {"prompt": plain_text(task.asked), "task_id": task.id}
        if is_pair:
            data |= {"completion_1": task.texts[0], "completion_2": task.texts[1]}
        else:
            data["items"] = [{"id": f"completion_{index + 1}", "title": "", "body": text} for index, text in enumerate(task.texts)]
        annotations = []
        for answer, ranks in _without_ties(answers_of(labels, task), lost, TIED_LABEL_STUDIO):
            if is_pair:
                side = "left" if ranks[0] < ranks[1] else "right"
                # Label Studio's editor writes the name of the Pairwise tag as to_name.
                result = {"from_name": RANKING, "to_name": RANKING, "type": "pairwise", "value": {"selected": side}}
            else:
                order = [f"completion_{index + 1}" for index in _best_first(ranks)]
                result = {"from_name": RANKING, "to_name": "completions", "type": "ranker", "value": {"ranker": {RANKING: order}}}
            annotations.append(
                {"result": [{"id": answer.id[:10], **result}], "completed_by": {"email": answer.annotator}, "lead_time": answer.seconds}
            )
        tasks.append({"data": data, "annotations": annotations})
    return tasks, lost


def _label_studio_in(content: object, labels: Labels, incoming: Incoming) -> None:
    for number, item in enumerate(_objects(content), 1):
        data = item.get("data")
        if not isinstance(data, dict):
            data = item
        task = labels.tasks.get(str(data.get("task_id")))
        if task is None:
            incoming.skip("tasks that match no task")
            continue
        for annotation in _listed(item.get("annotations"), f"task {number}: annotations"):
            if not isinstance(annotation, dict) or annotation.get("was_cancelled"):
                incoming.skip("cancelled annotations")
                continue
            results = _listed(annotation.get("result"), f"task {number}: result")
            result = next((one for one in results if isinstance(one, dict) and one.get("type") in ("ranker", "pairwise")), None)
            if result is None:
                incoming.skip("annotations without a ranking")
                continue
            ranks = _label_studio_ranks(result, len(task.completions))
            if ranks is None:
                raise DataError(
                    f"task {number}: the result {json.dumps(result.get('value'))[:80]} does not rank {len(task.completions)} completions"
                )
            by = annotation.get("completed_by")
            incoming.take(task.id, (by.get("email") or by.get("id")) if isinstance(by, dict) else by or "label-studio", ranks)


def _label_studio_ranks(result: Mapping[str, object], number: int) -> list[int] | None:
    value = result.get("value")
    if not isinstance(value, dict):
        return None
    if result["type"] == "pairwise":
        return {"left": [0, 1], "right": [1, 0]}.get(str(value.get("selected"))) if number == 2 else None
    ranker = value.get("ranker")
    order = next(iter(ranker.values()), None) if isinstance(ranker, dict) else ranker
    names = [f"completion_{index + 1}" for index in range(number)]
    return (
        _from_order([names.index(name) for name in order]) if isinstance(order, list) and sorted(map(str, order)) == sorted(names) else None
    )


# Pairs: AlpacaEval and PandaLM


def _author(task: LabelTask, index: int) -> str:
    """Names of the models that wrote a completion, or ``completion_N`` if none is known."""
    return "+".join(task.authors[index]) or f"completion_{index + 1}"


def _alpaca_eval_out(labels: Labels) -> tuple[object, dict[str, int]]:
    rows = []
    for task, answer in given_answers(labels):
        assert answer.ranks is not None
        for i, j in combinations(range(len(task.completions)), 2):
            rows.append(
                {
                    "instruction": plain_text(task.asked),
                    "output_1": task.texts[i],
                    "output_2": task.texts[j],
                    "generator_1": _author(task, i),
                    "generator_2": _author(task, j),
                    "annotator": answer.annotator,
                    "preference": 1.5 - 0.5 * ((answer.ranks[i] < answer.ranks[j]) - (answer.ranks[i] > answer.ranks[j])),
                }
            )
    return rows, {}


def _alpaca_eval_in(content: object, labels: Labels, incoming: Incoming) -> None:
    for number, row in enumerate(_objects(content), 1):
        preference = row.get("preference")
        if preference is None:
            incoming.skip("rows without a preference")
            continue
        if isinstance(preference, bool) or not isinstance(preference, int | float) or not (1 <= preference <= 2 or preference == 0):
            raise DataError(f"row {number}: preference is {preference!r:.40}; expected 1, 2, 1.5 (a tie) or a number between")
        side = 0 if preference in (0, 1.5) else 1 if preference < 1.5 else -1
        _take_pair(incoming, row.get("instruction"), row.get("output_1"), row.get("output_2"), side, row.get("annotator") or "alpaca-eval")


def _pandalm_out(labels: Labels) -> tuple[object, dict[str, int]]:
    rows: list[JsonObject] = []
    for task in labels.tasks.values():
        answers = answers_of(labels, task)
        for i, j in combinations(range(len(task.completions)), 2):
            if answers:
                votes = {f"annotator{number}": _pandalm_vote(answer, i, j) for number, answer in enumerate(answers, 1)}
                rows.append(
                    {
                        "idx": len(rows),
                        "instruction": plain_text(task.asked),
                        "input": "",
                        "response1": task.texts[i],
                        "response2": task.texts[j],
                        **votes,
                        "cmp_key": f"{_author(task, i)}_{_author(task, j)}",
                    }
                )
    return rows, {}


def _pandalm_vote(answer: LabelAnswer, i: int, j: int) -> int:
    assert answer.ranks is not None
    return 0 if answer.ranks[i] == answer.ranks[j] else 1 if answer.ranks[i] < answer.ranks[j] else 2


def _pandalm_in(content: object, labels: Labels, incoming: Incoming) -> None:
    for number, row in enumerate(_objects(content), 1):
        prompt = "\n".join(str(part) for part in (row.get("instruction"), row.get("input")) if part)
        texts = [row.get(f"response{side_number}", row.get(f"response_{side_number}")) for side_number in (1, 2)]
        votes = {name: vote for name, vote in row.items() if name.startswith("annotator") and name != "annotators"}
        listed = _listed(row.get("annotators"), f"row {number}: annotators")
        votes |= {f"annotator{side_number}": vote for side_number, vote in enumerate(listed, 1)}
        for name, vote in votes.items():
            if not isinstance(vote, int | float) or vote not in (0, 1, 2) or isinstance(vote, bool):
                raise DataError(f"row {number}: {name} is {vote!r:.40}; expected 1, 2, or 0 for a tie")
            _take_pair(incoming, prompt, texts[0], texts[1], {0: 0, 1: 1, 2: -1}[int(vote)], name)


def _take_pair(incoming: Incoming, prompt: object, first: object, second: object, side: int, annotator: object) -> None:
    """Add a vote if a task has exactly these two completions.

    ``side``: 1 if the first is better, -1 if the second is better, 0 for a tie.
    """
    task = incoming.pairs.get((str(prompt), frozenset((str(first), str(second)))))
    if task is None:
        incoming.skip("pairs that match no task with these two completions")
        return
    incoming.take(task.id, annotator, [0, 0] if side == 0 else [0, 1] if (side == 1) == (task.texts[0] == first) else [1, 0])


# CSV

COLUMNS = ["task", "annotator", "completion", "rank", "author", "prompt", "text", "seconds", "time"]


def _csv_out(labels: Labels) -> str:
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


def _csv_in(text: str, labels: Labels, incoming: Incoming) -> None:
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


# Export and import

WRITERS: dict[str, Callable[[Labels], tuple[object, dict[str, int]]]] = {
    "argilla": _argilla_out,
    "label-studio": _label_studio_out,
    "alpaca-eval": _alpaca_eval_out,
    "pandalm": _pandalm_out,
}
READERS: dict[str, Callable[[object, Labels, Incoming], None]] = {
    "argilla": _argilla_in,
    "label-studio": _label_studio_in,
    "alpaca-eval": _alpaca_eval_in,
    "pandalm": _pandalm_in,
}


def export_labels(folder: Path, kind: str, path: Path) -> str:
    """Write tasks and answers in another tool's format. Returns a message for the user. Raises DataError for an unknown format."""
    labels = read_labels(folder)
    lost: dict[str, int] = {}
    if kind == "csv":
        text = _csv_out(labels)
    elif kind == "comparisons":
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for _, row in labelled_rows(folder))
    elif kind in WRITERS:
        content, lost = WRITERS[kind](labels)
        text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    else:
        raise DataError(f"{kind!r} is not a known format; expected one of {', '.join([*WRITERS, 'csv', 'comparisons'])}")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8", newline="")
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
            _csv_in(text, labels, incoming)
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
