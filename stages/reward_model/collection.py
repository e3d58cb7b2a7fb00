"""New comparisons of what policies say now: several completions of each prompt, ranked by a judge, are added to the training data.

Steps 2 and 3 of Ouyang et al. 2022, figure 2, can be repeated: a reward model is trained on what the last policy says, and that policy
was trained by the reward model before. The policies are inputs of the step, so the lineage tells the whole story. The judge may be a
function that stands in for people (the embedded world's annotators); labels by people are ordinary comparisons in a file.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from random import Random
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BeforeValidator, Field, model_validator

from stages.config import DataField, GenerationSettings, ModelField, ModelInput, Strict
from stages.rewards.config import RewardInput, reward_model_inputs

if TYPE_CHECKING:
    from stages.corpora.comparisons import Comparison
    from stages.corpora.messages import Prompt
    from stages.process.runtime import StepContext


class CollectedPolicy(Strict):
    """A policy whose completions are compared; a bare string is its reference."""

    model: ModelField
    weight: float = Field(1.0, gt=0, description="Its share of the completions, against the others' weights.")


def _policies(value: Any) -> Any:
    items = value if isinstance(value, list) else [value]
    return [{"model": item} if isinstance(item, str) or (isinstance(item, dict) and "ref" in item) else item for item in items]


class Collection(Strict):
    """Comparisons made by this step. Each prompt's completions come from all policies, by their weights."""

    policies: Annotated[list[CollectedPolicy], BeforeValidator(_policies)] = Field(
        min_length=1, description="Whose completions; the paper's are mostly the SFT model's, some are PPO's."
    )
    data: DataField = Field(description="Prompts.")
    num_prompts: int = Field(256, ge=1, description="Prompts to collect comparisons for, drawn by the seed.")
    completions_per_prompt: int = Field(4, ge=2, description="K: different completions that are ranked together.")
    judge: RewardInput = Field(description="Who ranks: a function or a model that scores (prompt, completion); higher is better.")
    tie_width: float = Field(0.0, ge=0, description="Neighbours whose scores differ by no more than this share a rank.")
    only_ended: bool = Field(
        False, description="Only completions that end by themselves are shown to the judge (Ziegler et al. 2019); others are drawn again."
    )
    attempts: int = Field(4, ge=1, description="Draws per completion until one ends, and differs from those there are.")
    generation: GenerationSettings = GenerationSettings()

    @model_validator(mode="after")
    def _scores_texts(self) -> Collection:
        if self.judge.ensemble is not None or self.judge.level == "token":
            raise ValueError("collect.judge is one model or function that scores whole completions")
        return self

    def model_inputs(self) -> dict[str, ModelInput]:
        """The models of policies and judge, by field path within the step."""
        inputs = {f"collect.policies[{index}].model": policy.model for index, policy in enumerate(self.policies)}
        judge = reward_model_inputs([self.judge], "collect.judge")
        return inputs | {place.replace("[0]", ""): model for place, model in judge.items()}


def collect_comparisons(collection: Collection, context: StepContext, *, precision: str) -> list[Comparison]:
    """The collected comparisons; kept beside the checkpoints, so that a cut-off run does not sample again, and in the run folder."""
    from stages.corpora.comparisons import Comparison

    path = context.checkpoint_folder / "collected.jsonl"
    if not context.runtime.decide(path.exists):
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
    rows = [json.loads(line) for line in text.splitlines()]
    return [Comparison(row["prompt"], row["completions"], row["ranks"]) for row in rows]


def _collect(collection: Collection, context: StepContext, precision: str) -> list[dict[str, Any]]:
    from stages.corpora.prompts import load_prompts
    from stages.rewards.source import build_source, checked

    runtime = context.runtime
    prompts = load_prompts(collection.data)
    Random(f"collection {context.seed}").shuffle(prompts)
    prompts = prompts[: collection.num_prompts]
    drawn = [_sample(collection, context, precision, index, prompts) for index in range(len(collection.policies))]
    rows: list[dict[str, Any]] = []
    for place, prompt in enumerate(prompts):
        offered = [(text, index) for index, texts in enumerate(drawn) for text in texts[place]]
        taken: dict[str, int] = {}
        random = Random(f"collection {context.seed} {place}")
        while offered and len(taken) < collection.completions_per_prompt:
            weights = [collection.policies[index].weight for _, index in offered]
            text, index = offered.pop(random.choices(range(len(offered)), weights)[0])
            taken.setdefault(text, index)
        if len(taken) >= 2:
            policies = [collection.policies[index].model.ref for index in taken.values()]
            rows.append({"prompt": prompt, "completions": list(taken), "policies": policies})
    device, dtype = runtime.device, runtime.dtype(precision)
    judge = build_source(collection.judge, context.models.get("collect.judge.model"), device=device, dtype=dtype)
    pairs = [(row["prompt"], text) for row in rows for text in row["completions"]]
    texts = [text for _, text in pairs]
    scores = iter(checked(judge.score([prompt for prompt, _ in pairs], texts), judge.name, texts).tolist())
    for row in rows:
        row["ranks"] = ranked([next(scores) for _ in row["completions"]], collection.tie_width)
    number = sum(len(row["completions"]) for row in rows)
    runtime.console.print(f"{context.name}: collected {len(rows)} comparisons of {number} completions")
    return rows


def _sample(collection: Collection, context: StepContext, precision: str, index: int, prompts: Sequence[Prompt]) -> list[list[str]]:
    """Different completions of every prompt by one policy, as many as a comparison could take from it."""
    import torch

    from stages.corpora.templates import encode_prompt
    from stages.models.loading import load_language_model, load_tokenizer
    from stages.sampling.generation import decode_completions, ending_tokens, episode_seed, generate

    source = context.models[f"collect.policies[{index}].model"]
    tokenizer = load_tokenizer(source)
    runtime = context.runtime
    model = load_language_model(source, dtype=runtime.dtype(precision), trainable=False, tokenizer=tokenizer).to(runtime.device)
    ids = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    stop, late = ending_tokens(model, tokenizer, collection.generation)
    found: list[dict[str, None]] = [{} for _ in prompts]
    for attempt in range(collection.completions_per_prompt * collection.attempts):
        wanted = [place for place, texts in enumerate(found) if len(texts) < collection.completions_per_prompt]
        if not wanted:
            break
        generated = generate(
            model,
            [ids[place] for place in wanted],
            collection.generation,
            seeds=[episode_seed(context.seed, index, place, attempt) for place in wanted],
            stop_ids=stop,
            late_stop_ids=late,
            pad_token_id=tokenizer.pad_token_id,
        )
        for place, text, ended in zip(wanted, decode_completions(tokenizer, generated), generated.stopped.tolist(), strict=True):
            if text and (ended or not collection.only_ended):
                found[place].setdefault(text)
    del model
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return [list(texts) for texts in found]


def ranked(scores: Sequence[float], tie_width: float) -> list[int]:
    """Ranks (0 best) of scores; neighbours in the order that differ by no more than ``tie_width`` share one."""
    order = sorted(range(len(scores)), key=lambda index: -scores[index])
    ranks, rank = [0] * len(scores), 0
    for place, index in enumerate(order):
        if place and scores[order[place - 1]] - scores[index] > tie_width:
            rank = place
        ranks[index] = rank
    return ranks
