"""New comparisons of what policies say now: several completions of each prompt, ranked by a judge, are added to the training data.

Steps 2 and 3 of Ouyang et al. 2022, figure 2, can be repeated: a reward model is trained on what the last policy says, and that policy
was trained by the reward model before. The policies are inputs of the step, so the lineage tells the whole story. The judge is a model, a
function, or people: their tasks are published, and the step goes on once they have ranked enough of them (stages/labelling).
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator

from stages.config import DataField, DataSource, GenerationSettings, ModelField, ModelInput, Strict
from stages.corpora.labels import MOST_COMPLETIONS, TASKS
from stages.errors import DataError
from stages.labelling.config import AskPeople, People
from stages.labelling.simulated import ranked
from stages.labelling.waiting import QUALITY
from stages.rewards.config import RewardInput, check_rubrics, reward_model_inputs, rubric_inputs

if TYPE_CHECKING:
    from stages.corpora.comparisons import Comparison
    from stages.corpora.messages import Prompt
    from stages.rewards.details import Details
    from stages.step import StepContext


class CollectedPolicy(Strict):
    """A policy whose completions are compared; a bare string is its reference."""

    model: ModelField
    weight: float = Field(1.0, gt=0, description="Its share of the completions, against the others' weights.")


def _policies(value: Any) -> Any:
    items = value if isinstance(value, list) else [value]
    return [{"model": item} if isinstance(item, str) or (isinstance(item, dict) and "ref" in item) else item for item in items]


def _judge_kind(value: Any) -> str:
    return "people" if "people" in (value if isinstance(value, dict) else vars(value)) else "reward"


JudgeOrPeople = Annotated[Annotated[RewardInput, Tag("reward")] | Annotated[AskPeople, Tag("people")], Discriminator(_judge_kind)]
SHORT_NAMES = {"prompts": "data", "per_prompt": "completions_per_prompt"}


class Collection(Strict):
    """Comparisons made by this step. Each prompt's completions come from all policies, by their weights.

    ``prompts`` and ``per_prompt`` are short for ``data`` and ``completions_per_prompt``.
    """

    policies: Annotated[list[CollectedPolicy], BeforeValidator(_policies)] = Field(
        min_length=1, description="Whose completions; the paper's are mostly the SFT model's, some are PPO's."
    )
    data: DataField = Field(description="Prompts.")
    num_prompts: int = Field(256, ge=1, description="Prompts to collect comparisons for, drawn by the seed.")
    completions_per_prompt: int = Field(4, ge=2, description="K: different completions that are ranked together.")
    judge: JudgeOrPeople = Field(
        description="Who ranks: a function or a model that scores (prompt, completion), higher is better; or people: {people: {...}}."
    )
    tie_width: float = Field(0.0, ge=0, description="Neighbours whose scores differ by no more than this share a rank.")
    only_ended: bool = Field(
        False, description="Only completions that end by themselves are shown to the judge (Ziegler et al. 2019); others are drawn again."
    )
    attempts: int = Field(4, ge=1, description="Draws per completion until one ends, and differs from those there are.")
    generation: GenerationSettings = GenerationSettings()

    @model_validator(mode="before")
    @classmethod
    def _short_names(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        for short, name in SHORT_NAMES.items():
            if short in value and name in value:
                raise ValueError(f"collect.{short} and collect.{name} are the same setting; leave one of them out")
        return {SHORT_NAMES.get(name, name): item for name, item in value.items()}

    @model_validator(mode="after")
    def _scores_texts(self) -> Collection:
        if isinstance(self.judge, AskPeople):
            if self.completions_per_prompt > MOST_COMPLETIONS:
                raise ValueError(f"completions_per_prompt={self.completions_per_prompt}: people rank at most {MOST_COMPLETIONS} at a time")
            if self.tie_width:
                raise ValueError("tie_width belongs to a judge that scores; people say themselves what ties")
            target = self.judge.people.target
            if target is not None and target > self.num_prompts:
                raise ValueError(f"judge.people.target={target} is more than num_prompts={self.num_prompts}, a task each")
        elif self.judge.ensemble is not None or self.judge.level == "token":
            raise ValueError("collect.judge is one model or function that scores whole completions")
        return self

    @property
    def people(self) -> People | None:
        """The people who rank, where they do."""
        return self.judge.people if isinstance(self.judge, AskPeople) else None

    def model_inputs(self) -> dict[str, ModelInput]:
        """The models of policies and judge, by field path within the step."""
        inputs = {f"collect.policies[{index}].model": policy.model for index, policy in enumerate(self.policies)}
        if isinstance(self.judge, AskPeople):
            model = self.judge.people.reward_model
            return inputs if model is None else {**inputs, "collect.judge.people.reward_model": model}
        judge = reward_model_inputs([self.judge], "collect.judge")
        return inputs | {place.replace("[0]", ""): model for place, model in judge.items()}

    def data_inputs(self) -> dict[str, list[DataSource]]:
        """Prompts, and what people are shown, by field path within the step."""
        if isinstance(self.judge, AskPeople):
            return {"collect.data": self.data, **self.judge.people.data_inputs("collect.judge.people")}
        rubrics = rubric_inputs([self.judge], "collect.judge").items()
        return {"collect.data": self.data, **{path.replace("[0]", "", 1): rubric for path, rubric in rubrics}}

    def check_data(self) -> None:
        """Raise DataError for files that this collection cannot use; no model is loaded."""
        from stages.corpora.prompts import load_prompt_rows
        from stages.rewards.signature import columns_asked_for

        judges = [self.judge] if isinstance(self.judge, RewardInput) else []
        check_rubrics(judges)
        prompts = load_prompt_rows(self.data, columns=columns_asked_for(judges, run=False))
        if self.people is None:
            return
        self.people.check()
        number = min(len(prompts), self.num_prompts)
        if self.people.target is not None and self.people.target > number:
            raise DataError(f"collect.judge.people.target is {self.people.target}, and the data hold {number} prompts, a task each")


def collect_comparisons(collection: Collection, context: StepContext, *, precision: str) -> list[Comparison]:
    """The collected comparisons; kept beside the checkpoints, so that a cut-off run does not sample again, and in the run folder."""
    from stages.corpora.comparisons import Comparison

    path = context.checkpoint_folder / "collected.jsonl"
    if not context.runtime.decide(path.exists):
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
    rows = [json.loads(line) for line in text.split("\n") if line]
    return [Comparison(row["prompt"], row["completions"], row["ranks"], row.get("annotator")) for row in rows]


def _ask_people(collection: Collection, people: People, context: StepContext, precision: str) -> list[dict[str, Any]]:
    """The rankings of people. Their tasks are published once; whatever of the step changes later, the same tasks are found again."""
    from stages.corpora.labels import labelled_rows
    from stages.labelling.waiting import ask_people, keep_quality

    folder = _labelling_folder(collection, context)
    context.runtime.decide(lambda: _publish(collection, people, context, precision, folder))
    ask_people(folder, people, context)
    rows = context.runtime.decide(lambda: [row for _, row in labelled_rows(folder)])
    if not rows:
        raise DataError(f"{context.name}: people ranked no task that counts")
    found = context.runtime.decide(lambda: keep_quality(folder, context.checkpoint_folder / QUALITY))
    annotators = {row["annotator"] for row in rows}
    share = found["agreement"]["pairwise"]["share"]
    agreement = "" if share is None else f", who agree on {100 * share:.1f} % of the pairs they share"
    context.runtime.console.print(
        f"{context.name}: {len(rows)} rankings of {found['ranked_tasks']} tasks by {len(annotators)} people{agreement}"
    )
    return rows


def _labelling_folder(collection: Collection, context: StepContext) -> Path:
    from stages.corpora.files import fingerprint
    from stages.labelling.publishing import step_folder
    from stages.labelling.waiting import home_of

    settings = collection.model_dump(mode="json", exclude={"judge", "data", "policies", "tie_width"})
    policies = [[context.models[f"collect.policies[{i}].model"].digest, policy.weight] for i, policy in enumerate(collection.policies)]
    key = {**settings, "policies": policies, "data": fingerprint(collection.data), "seed": context.seed}
    return step_folder(home_of(context), context.name, key)


def _publish(collection: Collection, people: People, context: StepContext, precision: str, folder: Path) -> None:
    """Sample and publish the tasks where they are not there yet; have the last round's reward model score them."""
    from stages.corpora.labels import read_tasks
    from stages.labelling.publishing import SCORES, publish_scores, publish_tasks, scored_by, task_of
    from stages.rewards.source import build_source, checked

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
    found = {name: [next(scores) for _ in task.completions] for name, task in published.items()}
    publish_scores(folder, people.reward_model.ref, source.digest, found)


def _collect(collection: Collection, context: StepContext, precision: str) -> list[dict[str, Any]]:
    from stages.rewards.source import build_source, judge

    assert isinstance(collection.judge, RewardInput)
    runtime = context.runtime
    rows, details = _sampled(collection, context, precision, collection.judge)
    device, dtype = runtime.device, runtime.dtype(precision)
    model = context.models.get("collect.judge.model")
    source = build_source(collection.judge, model, device=device, dtype=dtype, cache_folder=context.cache_folder)
    pairs = [(row["prompt"], text) for row in rows for text in row["completions"]]
    found = judge(source, [prompt for prompt, _ in pairs], [text for _, text in pairs], details)
    scores = iter(found.scores.tolist())
    rows, left_out = _ranked_rows(rows, [[next(scores) for _ in row["completions"]] for row in rows], collection.tie_width)
    if left_out:
        runtime.console.print(f"{context.name}: {source.name} does not apply to {left_out} of {len(pairs)} completions; they are left out")
    if found.cut is not None and found.cut.any():
        cut = f"{source.name} could not read {int(found.cut.sum())} of {len(pairs)} texts whole; they lost their beginning"
        runtime.console.print(f"{context.name}: {cut}")
    number = sum(len(row["completions"]) for row in rows)
    runtime.console.print(f"{context.name}: collected {len(rows)} comparisons of {number} completions")
    return rows


def _sampled(
    collection: Collection, context: StepContext, precision: str, judge: RewardInput | None = None
) -> tuple[list[dict[str, Any]], Details]:
    """(prompts with different completions of the policies, drawn by their weights; what ``judge`` asks for beside the texts).

    Each row has ``prompt``, ``completions`` and ``policies``.
    """
    from stages.corpora.prompts import load_prompt_rows
    from stages.rewards.details import Details, columns_of
    from stages.rewards.signature import columns_asked_for

    asked = load_prompt_rows(collection.data, columns=columns_asked_for([judge] if judge is not None else []))
    Random(f"collection {context.seed}").shuffle(asked)
    asked = asked[: collection.num_prompts]
    drawn = [_sample(collection, context, precision, index, [row.prompt for row in asked]) for index in range(len(collection.policies))]
    rows: list[dict[str, Any]] = []
    columns: list[dict[str, Any]] = []
    completion_ids: list[list[int]] = []
    for place, row in enumerate(asked):
        offered = [(text, index) for index, texts in enumerate(drawn) for text in texts[place]]
        taken: dict[str, int] = {}
        random = Random(f"collection {context.seed} {place}")
        while offered and len(taken) < collection.completions_per_prompt:
            weights = [collection.policies[index].weight for _, index in offered]
            text, index = offered.pop(random.choices(range(len(offered)), weights)[0])
            taken.setdefault(text, index)
        if len(taken) >= 2:
            policies = [collection.policies[index].model.ref for index in taken.values()]
            rows.append({"prompt": row.prompt, "completions": list(taken), "policies": policies})
            columns += [row.columns for _ in taken]
            completion_ids += [drawn[index][place][text] for text, index in taken.items()]
    return rows, Details(columns_of(columns), completion_ids)


def _ranked_rows(rows: list[dict[str, Any]], scores: list[list[float]], tie_width: float) -> tuple[list[dict[str, Any]], int]:
    """(rows with ranks, how many completions were left out). A completion without a score (NaN) is, and a row with fewer than two."""
    made, left_out = [], 0
    for row, values in zip(rows, scores, strict=True):
        kept = [place for place, score in enumerate(values) if not math.isnan(score)]
        left_out += len(values) - len(kept)
        if len(kept) >= 2:
            lists = {name: [row[name][place] for place in kept] for name in ("completions", "policies")}
            made.append({**row, **lists, "ranks": ranked([values[place] for place in kept], tie_width)})
    return made, left_out


def _sample(
    collection: Collection, context: StepContext, precision: str, index: int, prompts: Sequence[Prompt]
) -> list[dict[str, list[int]]]:
    """Different completions of every prompt by one policy with their token ids, as many as a comparison could take from it."""
    import torch

    from stages.corpora.templates import encode_prompt
    from stages.models.loading import load_language_model, load_tokenizer
    from stages.sampling.generation import decode_completions, episode_seed
    from stages.sampling.sampler import LocalSampler

    source = context.models[f"collect.policies[{index}].model"]
    tokenizer = load_tokenizer(source)
    runtime = context.runtime
    model = load_language_model(source, dtype=runtime.dtype(precision), trainable=False, tokenizer=tokenizer).to(runtime.device)
    ids = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    sampler = LocalSampler(model, tokenizer)
    found: list[dict[str, list[int]]] = [{} for _ in prompts]
    for attempt in range(collection.completions_per_prompt * collection.attempts):
        wanted = [place for place, texts in enumerate(found) if len(texts) < collection.completions_per_prompt]
        if not wanted:
            break
        seeds = [episode_seed(context.seed, index, place, attempt) for place in wanted]
        generated = sampler.sample([ids[place] for place in wanted], collection.generation, seeds)
        texts = decode_completions(tokenizer, generated)
        ids_made = [ids[mask].tolist() for ids, mask in zip(generated.response_ids.cpu(), generated.response_mask.cpu(), strict=True)]
        for place, text, made, ended in zip(wanted, texts, ids_made, generated.stopped.tolist(), strict=True):
            if text and (ended or not collection.only_ended):
                found[place].setdefault(text, made)
    del model, sampler
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return found
