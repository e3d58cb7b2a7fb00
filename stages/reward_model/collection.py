"""Collect new comparisons: several completions of each prompt from policies, ranked by a judge, are added to the training data.

Steps 2 and 3 of Ouyang et al. 2022, figure 2, can be repeated. A new reward model is trained on completions of the last policy, and that
policy was trained with the previous reward model. The policies are inputs of the step, so the lineage is complete. The judge is a model, a
function, or people. For people the tasks are published, and the step continues when enough of them are ranked (stages/labelling).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from random import Random
from typing import NotRequired, TypedDict

import torch

from stages.corpora.comparisons import Comparison
from stages.corpora.conversations.messages import Completion, Prompt
from stages.corpora.files import fingerprint
from stages.corpora.labels import TASKS, labelled_rows, read_tasks
from stages.corpora.prompts import load_prompt_rows
from stages.corpora.templates import encode_prompt
from stages.engines.opening import step_sampler
from stages.errors import DataError
from stages.json_types import JsonObject
from stages.labelling.config import People
from stages.labelling.publishing import SCORES, publish_scores, publish_tasks, scored_by, step_folder
from stages.labelling.simulated import ranked
from stages.labelling.tasks import task_of
from stages.labelling.waiting import QUALITY, ask_people, command, home_of, keep_quality
from stages.models.loaded import LoadedModel
from stages.reward_model.collection_config import Collection
from stages.rewards.building import build_source
from stages.rewards.config import RewardInput
from stages.rewards.details import Details, checked, columns_of
from stages.rewards.signature import columns_asked_for
from stages.rewards.source import judge
from stages.sampling.generation import decode_completions, episode_seed
from stages.step import StepContext


class SampledRow(TypedDict):
    """Distinct completions of one prompt, and the policy that sampled each."""

    prompt: Prompt
    completions: list[str]
    policies: list[str]


class CollectedRow(TypedDict):
    """A collected comparison. Only rankings by people name an ``annotator``."""

    prompt: Prompt
    completions: Sequence[Completion]
    ranks: list[int]
    policies: NotRequired[list[str]]
    annotator: NotRequired[str | None]


def collect_comparisons(collection: Collection, context: StepContext, *, precision: str) -> list[Comparison]:
    """The collected comparisons. They are stored next to the checkpoints, so a resumed run does not sample again, and in the run folder."""
    path = context.checkpoint_folder / "collected.jsonl"
    if not context.runtime.decide(path.exists):
        rows: Sequence[Mapping[str, object]]
        if collection.people is not None:
            rows = _ask_people(collection, collection.people, context, precision)
        else:
            rows = context.runtime.decide(lambda: _collect(collection, context, precision))
        if context.runtime.is_main:
            partial = path.with_suffix(".partial")
            partial.parent.mkdir(parents=True, exist_ok=True)
            partial.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
            partial.replace(path)
        context.runtime.wait_for_everyone()
    text = path.read_text(encoding="utf-8")
    if context.runtime.is_main:
        context.folder.mkdir(parents=True, exist_ok=True)
        (context.folder / "collected.jsonl").write_text(text, encoding="utf-8")
        if (quality := context.checkpoint_folder / QUALITY).exists():
            (context.folder / QUALITY).write_text(quality.read_text(encoding="utf-8"), encoding="utf-8")
    collected: list[CollectedRow] = [json.loads(line) for line in text.split("\n") if line]
    return [Comparison(row["prompt"], row["completions"], row["ranks"], row.get("annotator")) for row in collected]


def _ask_people(collection: Collection, people: People, context: StepContext, precision: str) -> Sequence[Mapping[str, object]]:
    """The annotators' rankings. Tasks are published once; later changes of unrelated settings find the same tasks."""
    folder = _labelling_folder(collection, context)
    context.runtime.decide(lambda: _publish(collection, people, context, precision, folder))
    ask_people(folder, people, context)
    rows = context.runtime.decide(lambda: [row for _, row in labelled_rows(folder)])
    if not rows:
        used = "skipped, flagged, or of annotators below pass_mark"
        raise DataError(f"{context.name}: no ranking can be used: {used}. Rank more with: {command(context)}")
    quality = context.runtime.decide(lambda: keep_quality(folder, context.checkpoint_folder / QUALITY))
    annotators = {row["annotator"] for row in rows}
    share = quality["agreement"]["pairwise"]["share"]
    agreement = "" if share is None else f", who agree on {100 * share:.1f} % of their common pairs"
    context.runtime.console.print(
        f"{context.name}: {len(rows)} rankings of {quality['ranked_tasks']} tasks by {len(annotators)} people{agreement}"
    )
    return rows


def _labelling_folder(collection: Collection, context: StepContext) -> Path:
    settings = collection.model_dump(mode="json", exclude={"judge", "data", "policies", "tie_width"})
    policies = [[context.models[f"collect.policies[{i}].model"].digest, policy.weight] for i, policy in enumerate(collection.policies)]
    key = {**settings, "policies": policies, "data": fingerprint(collection.data), "seed": context.seed}
    return step_folder(home_of(context), context.name, key)


def _publish(collection: Collection, people: People, context: StepContext, precision: str, folder: Path) -> None:
    """Sample and publish the tasks unless they exist. Score them with the previous round's reward model."""
    if not (folder / TASKS).exists():
        digests = {policy.model.ref: context.models[f"collect.policies[{i}].model"].digest for i, policy in enumerate(collection.policies)}
        tasks = []
        for row in _sampled(collection, context, precision)[0]:
            authors, marks = [[ref] for ref in row["policies"]], [[digests[ref]] for ref in row["policies"]]
            tasks.append(task_of(row["prompt"], row["completions"], authors, marks))
        publish_tasks(folder, tasks)
    if people.reward_model is None:
        (folder / SCORES).unlink(missing_ok=True)
        return
    source = context.models["collect.judge.people.reward_model"]
    if scored_by(folder) == source.digest:
        return
    published = read_tasks(folder / TASKS)
    judge = build_source(
        RewardInput(model=people.reward_model), source, device=context.runtime.device, dtype=context.runtime.dtype(precision)
    )
    pairs = [(task.asked, text) for task in published.values() for text in task.texts]
    texts = [text for _, text in pairs]
    scores = iter(checked(judge.score([prompt for prompt, _ in pairs], texts), judge.name, texts).tolist())
    scores_by_task = {name: [next(scores) for _ in task.completions] for name, task in published.items()}
    publish_scores(folder, people.reward_model.ref, source.digest, scores_by_task)


def _collect(collection: Collection, context: StepContext, precision: str) -> list[CollectedRow]:
    assert isinstance(collection.judge, RewardInput)
    runtime = context.runtime
    sampled, details = _sampled(collection, context, precision, collection.judge)
    device, dtype = runtime.device, runtime.dtype(precision)
    model = context.models.get("collect.judge.model")
    source = build_source(collection.judge, model, device=device, dtype=dtype, cache_folder=context.cache_folder)
    pairs = [(row["prompt"], text) for row in sampled for text in row["completions"]]
    judgement = judge(source, [prompt for prompt, _ in pairs], [text for _, text in pairs], details)
    scores = iter(judgement.scores.tolist())
    rows, left_out = _ranked_rows(sampled, [[next(scores) for _ in row["completions"]] for row in sampled], collection.tie_width)
    if left_out:
        runtime.console.print(f"{context.name}: {source.name} does not apply to {left_out} of {len(pairs)} completions, which are left out")
    if judgement.cut is not None and judgement.cut.any():
        cut = f"{source.name} truncated the beginning of {int(judgement.cut.sum())} of {len(pairs)} texts that were too long"
        runtime.console.print(f"{context.name}: {cut}")
    num_completions = sum(len(row["completions"]) for row in rows)
    runtime.console.print(f"{context.name}: collected {len(rows)} comparisons of {num_completions} completions")
    return rows


def _sampled(
    collection: Collection, context: StepContext, precision: str, judge: RewardInput | None = None
) -> tuple[list[SampledRow], Details]:
    """Return (prompts with distinct completions, sampled from the policies by weight; the details that ``judge`` requests)."""
    asked = load_prompt_rows(collection.data, columns=columns_asked_for([judge] if judge is not None else []))
    Random(f"collection {context.seed}").shuffle(asked)
    asked = asked[: collection.num_prompts]
    drawn = [_sample(collection, context, precision, index, [row.prompt for row in asked]) for index in range(len(collection.policies))]
    rows: list[SampledRow] = []
    columns: list[JsonObject] = []
    completion_ids: list[list[int]] = []
    for row_index, row in enumerate(asked):
        offered = [(text, index) for index, texts in enumerate(drawn) for text in texts[row_index]]
        taken: dict[str, int] = {}
        random = Random(f"collection {context.seed} {row_index}")
        while offered and len(taken) < collection.completions_per_prompt:
            weights = [collection.policies[index].weight for _, index in offered]
            text, index = offered.pop(random.choices(range(len(offered)), weights)[0])
            taken.setdefault(text, index)
        if len(taken) >= 2:
            policies = [collection.policies[index].model.ref for index in taken.values()]
            rows.append({"prompt": row.prompt, "completions": list(taken), "policies": policies})
            columns += [row.columns for _ in taken]
            completion_ids += [drawn[index][row_index][text] for text, index in taken.items()]
    return rows, Details(columns_of(columns), completion_ids)


def _ranked_rows(rows: list[SampledRow], scores: list[list[float]], tie_width: float) -> tuple[list[CollectedRow], int]:
    """Return (rows with ranks, number of dropped completions).

    Completions without a score (NaN) and rows with fewer than two are dropped.
    """
    made: list[CollectedRow] = []
    left_out = 0
    for row, values in zip(rows, scores, strict=True):
        kept = [index for index, score in enumerate(values) if not math.isnan(score)]
        left_out += len(values) - len(kept)
        if len(kept) >= 2:
            made.append(
                {
                    "prompt": row["prompt"],
                    "completions": [row["completions"][index] for index in kept],
                    "policies": [row["policies"][index] for index in kept],
                    "ranks": ranked([values[index] for index in kept], tie_width),
                }
            )
    return made, left_out


def _sample(
    collection: Collection, context: StepContext, precision: str, index: int, prompts: Sequence[Prompt]
) -> list[dict[str, list[int]]]:
    """Distinct completions of every prompt by one policy with their token ids, as many as a comparison could use."""
    source = context.models[f"collect.policies[{index}].model"]
    loaded = LoadedModel.frozen(source, context.runtime.dtype(precision), context.runtime.device)
    tokenizer = loaded.tokenizer
    ids = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    completions: list[dict[str, list[int]]] = [{} for _ in prompts]
    with step_sampler(collection.generation, loaded, context) as sampler:
        for attempt in range(collection.completions_per_prompt * collection.attempts):
            wanted = [prompt_index for prompt_index, texts in enumerate(completions) if len(texts) < collection.completions_per_prompt]
            if not wanted:
                break
            seeds = [episode_seed(context.seed, index, prompt_index, attempt) for prompt_index in wanted]
            generated = sampler.sample([ids[prompt_index] for prompt_index in wanted], collection.generation, seeds)
            texts = decode_completions(tokenizer, generated)
            ids_made = [ids[mask].tolist() for ids, mask in zip(generated.response_ids.cpu(), generated.response_mask.cpu(), strict=True)]
            for prompt_index, text, made, ended in zip(wanted, texts, ids_made, generated.stopped.tolist(), strict=True):
                if text and (ended or not collection.only_ended):
                    completions[prompt_index].setdefault(text, made)
    del loaded, sampler
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return completions
