"""Records of Argilla 2: fields prompt, completion_1, ...; one RankingQuestion."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from uuid import NAMESPACE_URL, uuid5

from stages.corpora.labels import LabelAnswer
from stages.corpora.prompts import plain_text
from stages.errors import DataError
from stages.labelling.exchange.rankings import RANKING, Incoming, answers_of, best_first, list_in, objects_in
from stages.labelling.store import Labels


def argilla_records(labels: Labels) -> tuple[object, dict[str, int]]:
    records = []
    for task in labels.tasks.values():
        names = [f"completion_{index + 1}" for index in range(len(task.completions))]
        responses = [
            {"value": _value(names, answer), "user_id": _user_id(answer.annotator), "status": "submitted"}
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


def _value(names: list[str], answer: LabelAnswer) -> Sequence[object]:
    """A ranking in Argilla's format: the names, best first. With ties, a list of {value, rank} whose ranks start at 1."""
    assert answer.ranks is not None
    order = best_first(answer.ranks)
    if len(set(answer.ranks)) == len(answer.ranks):
        return [names[index] for index in order]
    return [{"value": names[index], "rank": answer.ranks[index] + 1} for index in order]


def _user_id(annotator: str) -> str:
    """A UUID derived from the annotator's name, because Argilla identifies users by UUID."""
    return str(uuid5(NAMESPACE_URL, f"annotator:{annotator}"))


def read_argilla(content: object, labels: Labels, incoming: Incoming) -> None:
    names = {_user_id(annotator): annotator for annotator in labels.answers}
    for number, record in enumerate(objects_in(content), 1):
        task = labels.tasks.get(str(record.get("id") or record.get("external_id")))
        if task is None:
            incoming.skip("records that match no task")
            continue
        for response in _responses(record):
            fields = response if isinstance(response, dict) else {}
            if fields.get("status") in ("draft", "discarded"):
                incoming.skip(f"{fields['status']} responses")
                continue
            value = fields.get("value")
            ranks = _ranks(value, len(task.completions))
            if ranks is None:
                raise DataError(
                    f"record {number}: ranking is {value!r:.80}; expected completion_1 to completion_{len(task.completions)}, best first, "
                    "or {value, rank} for each"
                )
            user = str(fields.get("user_id") or "argilla")
            incoming.take(task.id, names.get(user, user), ranks)


def _responses(record: Mapping[str, object]) -> list[object]:
    """The responses to the ranking question.

    They are nested (Record.to_dict), or flattened into three parallel lists (to_list(flatten=True)). Raises DataError if the lists differ
    in length.
    """
    responses = record.get("responses")
    if isinstance(responses, dict):
        return list_in(responses.get(RANKING), f"responses.{RANKING}")
    if record.get(f"{RANKING}.responses") is None:
        return list_in(record.get(RANKING), RANKING)
    values = list_in(record[f"{RANKING}.responses"], f"{RANKING}.responses")
    names = (f"{RANKING}.responses.users", f"{RANKING}.responses.status")
    users, states = (list_in(record.get(name), name) or [None] * len(values) for name in names)
    if not len(values) == len(users) == len(states):
        raise DataError(f"record {record.get('id')}: {RANKING}.responses, its users and its status have different lengths")
    return [{"value": value, "user_id": user, "status": state} for value, user, state in zip(values, users, states, strict=True)]


def _ranks(value: object, number: int) -> list[int] | None:
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
