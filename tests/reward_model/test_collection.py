"""Collected comparisons: distinct completions of all policies, ranked by the judge, and stored for an interrupted run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from stages.reward_model.collection import collect_comparisons, ranked
from stages.reward_model.collection_config import Collection
from stages.reward_model.config import RewardModelConfig
from stages.reward_model.run import run
from stages.rewards.config import RewardInput


@pytest.fixture
def prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "labels.py").write_text("def shorter(prompts, completions): return [-len(text) for text in completions]\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"a line about film {number}"}) + "\n" for number in range(20)))
    return str(path)


def collection(prompts: str, **fields: Any) -> Collection:
    settings = {
        "policies": ["sft", {"model": "ppo", "weight": 0.25}],
        "data": prompts,
        "num_prompts": 8,
        "completions_per_prompt": 4,
        "judge": {"function": "labels:shorter"},
        "generation": {"max_new_tokens": 6, "stop": list("abcdefgh")},
    }
    return Collection.model_validate({**settings, **fields})


@pytest.fixture
def models(resolve_folder: Any, tiny_llama_folder: Path) -> dict[str, Any]:
    folder = resolve_folder(tiny_llama_folder)
    field_paths = ("model", "collect.policies[0].model", "collect.policies[1].model")
    return {field_path: replace(folder, digest=f"sha256:{field_path}") for field_path in field_paths}


def test_ranks_by_hand() -> None:
    assert ranked([0.1, 0.9, 0.5], 0.0) == [2, 0, 1]
    assert ranked([0.9, 0.5, 0.9], 0.0) == [0, 2, 0]
    # scores within 0.15 share a rank: 0.9 and 0.8, but not 0.5
    assert ranked([0.8, 0.9, 0.5], 0.15) == [0, 0, 2]


def test_collection_writes_ranked_completions(prompts, step_context, models) -> None:
    context = step_context(models=models)
    made = collect_comparisons(collection(prompts), context, precision="fp32")
    assert len(made) == 8 and len({item.prompt for item in made}) == 8
    for item in made:
        assert len(item.completions) == len(set(item.completions)) == 4
        by_length = [[-len(text) for text in item.completions].index(-len(text)) for text in item.completions]
        assert len(set(item.ranks)) == len(set(by_length))
        assert all(
            (len(a) < len(b)) == (one < two)
            for a, one in zip(item.completions, item.ranks, strict=True)
            for b, two in zip(item.completions, item.ranks, strict=True)
        )
    rows = [json.loads(line) for line in (context.folder / "collected.jsonl").read_text().splitlines()]
    drawn = [policy for row in rows for policy in row["policies"]]
    assert 0 < drawn.count("ppo") < drawn.count("sft")  # most completions are by the policy with the larger weight
    # a second attempt of the step samples nothing again
    (context.checkpoint_folder / "collected.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:3]))
    assert len(collect_comparisons(collection(prompts), context, precision="fp32")) == 3


@pytest.mark.detail("P26")
def test_only_finished_completions_are_ranked(prompts, step_context, models) -> None:
    settings = {"generation": {"max_new_tokens": 4, "stop": list("abcdefghijklmnop")}, "num_prompts": 3, "attempts": 40}
    made = collect_comparisons(collection(prompts, only_ended=True, **settings), step_context(models=models), precision="fp32")
    assert all(text[-1] in "abcdefghijklmnop" for item in made for text in item.completions)


def test_reward_model_trains_on_collected_completions(prompts, step_context, models, tmp_path) -> None:
    rows = [{"prompt": f"p {n}", "completions": ["a", "a long line of text"], "ranks": [0, 1]} for n in range(10)]
    path = tmp_path / "comparisons.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    step = RewardModelConfig.model_validate(
        {
            "name": "second",
            "model": "base",
            "precision": "fp32",
            "data": {"train": str(path), "validation_fraction": 0.2},
            "collect": collection(prompts).model_dump(exclude_unset=True),
            "training": {"learning_rate": 5e-3, "batch_size": 4, "microbatch_size": 2},
        }
    )
    assert list(step.model_inputs()) == ["model", "collect.policies[0].model", "collect.policies[1].model"]
    result = run(step, step_context(models=models))
    assert result.metrics["collected"] == 8 and result.metrics["comparisons"] == 16
    # the lineage names the policies whose completions were compared
    assert len(result.model.manifest["parents"]) == 3


def test_unusable_collection_settings_are_refused(prompts) -> None:
    with pytest.raises(ValidationError, match="a single model or function with one score per completion"):
        collection(prompts, judge=RewardInput.model_validate({"function": "a:b", "level": "token"}).model_dump(exclude_unset=True))


def test_the_annotators_of_the_embedded_world_label() -> None:
    from stages.corpora.world.annotators import label_batch
    from stages.corpora.world.gold import score_batch
    from stages.corpora.world.parts import world_rows

    rows = world_rows("world:comparisons", 40)
    pairs = [(row["prompt"], text) for row in rows for text in row["completions"]]
    prompts, texts = [prompt for prompt, _ in pairs], [text for _, text in pairs]
    labels, gold = label_batch(prompts, texts), score_batch(prompts, texts)
    assert labels == label_batch(prompts, texts)
    agree = [
        (labels[a] > labels[b]) == (gold[a] > gold[b])
        for a in range(len(pairs))
        for b in range(a)
        if prompts[a] == prompts[b] and abs(gold[a] - gold[b]) > 0.2
    ]
    assert sum(agree) / len(agree) > 0.85  # simulated people make errors, but do not rank at random
