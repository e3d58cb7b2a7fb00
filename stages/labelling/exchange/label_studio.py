"""Tasks of Label Studio: two completions in a Pairwise tag, more in a List with a Ranker."""

from __future__ import annotations

import json
from collections.abc import Mapping

from stages.corpora.prompts import plain_text
from stages.errors import DataError
from stages.json_types import JsonObject
from stages.labelling.exchange.rankings import RANKING, Incoming, answers_of, best_first, list_in, objects_in, ranks_of_order, without_ties
from stages.labelling.store import Labels

TIED_LABEL_STUDIO = "rankings with ties, which Label Studio cannot represent"
LABEL_STUDIO_CONFIG = {
    "ranker": '<View><Text name="prompt" value="$prompt"/><List name="completions" value="$items" title="Best first"/>'
    '<Ranker name="ranking" toName="completions"/></View>',
    "pairwise": '<View><Text name="prompt" value="$prompt"/><Pairwise name="ranking" toName="completion_1,completion_2"/>'
    '<Text name="completion_1" value="$completion_1"/><Text name="completion_2" value="$completion_2"/></View>',
}


def label_studio_tasks(labels: Labels) -> tuple[object, dict[str, int]]:
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
        for answer, ranks in without_ties(answers_of(labels, task), lost, TIED_LABEL_STUDIO):
            if is_pair:
                side = "left" if ranks[0] < ranks[1] else "right"
                # Label Studio's editor writes the name of the Pairwise tag as to_name.
                result = {"from_name": RANKING, "to_name": RANKING, "type": "pairwise", "value": {"selected": side}}
            else:
                order = [f"completion_{index + 1}" for index in best_first(ranks)]
                result = {"from_name": RANKING, "to_name": "completions", "type": "ranker", "value": {"ranker": {RANKING: order}}}
            annotations.append(
                {"result": [{"id": answer.id[:10], **result}], "completed_by": {"email": answer.annotator}, "lead_time": answer.seconds}
            )
        tasks.append({"data": data, "annotations": annotations})
    return tasks, lost


def read_label_studio(content: object, labels: Labels, incoming: Incoming) -> None:
    for number, item in enumerate(objects_in(content), 1):
        data = item.get("data")
        if not isinstance(data, dict):
            data = item
        task = labels.tasks.get(str(data.get("task_id")))
        if task is None:
            incoming.skip("tasks that match no task")
            continue
        for annotation in list_in(item.get("annotations"), f"task {number}: annotations"):
            if not isinstance(annotation, dict) or annotation.get("was_cancelled"):
                incoming.skip("cancelled annotations")
                continue
            results = list_in(annotation.get("result"), f"task {number}: result")
            result = next((one for one in results if isinstance(one, dict) and one.get("type") in ("ranker", "pairwise")), None)
            if result is None:
                incoming.skip("annotations without a ranking")
                continue
            ranks = _ranks(result, len(task.completions))
            if ranks is None:
                raise DataError(
                    f"task {number}: the result {json.dumps(result.get('value'))[:80]} does not rank {len(task.completions)} completions"
                )
            by = annotation.get("completed_by")
            incoming.take(task.id, (by.get("email") or by.get("id")) if isinstance(by, dict) else by or "label-studio", ranks)


def _ranks(result: Mapping[str, object], number: int) -> list[int] | None:
    value = result.get("value")
    if not isinstance(value, dict):
        return None
    if result["type"] == "pairwise":
        return {"left": [0, 1], "right": [1, 0]}.get(str(value.get("selected"))) if number == 2 else None
    ranker = value.get("ranker")
    order = next(iter(ranker.values()), None) if isinstance(ranker, dict) else ranker
    names = [f"completion_{index + 1}" for index in range(number)]
    return (
        ranks_of_order([names.index(name) for name in order])
        if isinstance(order, list) and sorted(map(str, order)) == sorted(names)
        else None
    )
