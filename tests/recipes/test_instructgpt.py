"""recipes/instructgpt.yaml whole, on a tiny model and on a few rows in the very formats that the hub's data sets have."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from stages.chain import run as chain
from stages.process.runtime import Runtime
from stages.recipe.schema import load_recipe
from stages.registry.ledger import Registry

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "instructgpt.yaml"
POSTS = ["the acting was warm", "the plot was dull", "the ending was weak", "a fine film", "an honest story", "the music was a joy"]


def prompt(post: str) -> str:
    return f"SUBREDDIT: r/film\n\nTITLE: a film\n\nPOST: {post}\n\nTL;DR:"


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def overrides(tmp_path: Path, tiny_llama_folder: Path) -> list[str]:
    tldr = write(tmp_path / "tldr.jsonl", [{"prompt": prompt(post), "completion": f" {post}"} for post in POSTS])
    published = write(
        tmp_path / "published.jsonl",
        [{"id": str(place), "subreddit": "film", "title": "a film", "post": post, "summary": post} for place, post in enumerate(POSTS)],
    )
    pairs = write(
        tmp_path / "pairs.jsonl", [{"prompt": prompt(post), "chosen": f" {post}", "rejected": " the film was a film"} for post in POSTS]
    )
    comparisons = write(
        tmp_path / "comparisons.jsonl",
        [
            {
                "info": {"id": "x", "subreddit": "film", "title": "a film", "post": post, "site": None, "article": None},
                "summaries": [{"text": f" {post}", "policy": "ref", "note": None}, {"text": " the", "policy": "sup1", "note": None}],
                "choice": place % 2, "worker": "w", "batch": "batch3", "split": "train", "extra": {"confidence": None},
            }
            for place, post in enumerate(POSTS)
        ],
    )  # fmt: skip
    texts = write(tmp_path / "texts.jsonl", [{"text": " ".join(POSTS) * 3} for _ in range(4)])
    hellaswag = write(
        tmp_path / "hellaswag.jsonl",
        [{"ctx": "the film was", "endings": ["warm", "dull", "a joy", "weak"], "label": "2"} for _ in range(2)],
    )
    sst = write(tmp_path / "sst.jsonl", [{"idx": 0, "sentence": "a fine film ", "label": 1}, {"idx": 1, "sentence": "dull ", "label": 0}])
    rte = write(tmp_path / "rte.jsonl", [{"sentence1": "the plot was dull", "sentence2": "the plot was weak", "label": 0, "idx": 0}])
    short = {"max_new_tokens": 6, "temperature": 0.7}
    chosen: dict[str, Any] = {
        "sft.model": str(tiny_llama_folder), "sft.data": {"train": published, "validation": tldr}, "sft.max_length": 120,
        "preference.data": {"train": pairs, "validation": comparisons}, "preference.max_length": 120, "preference.demonstrations": tldr,
        "judge.data": {"train": comparisons, "validation": pairs}, "judge.max_length": 120, "judge.demonstrations": tldr,
        "verdict.candidates.base": str(tiny_llama_folder), "verdict.candidates.prompted.model": str(tiny_llama_folder),
        "verdict.candidates.prompted.few_shot.data": tldr, "verdict.candidates.prompted.few_shot.num_examples": 1,
        "verdict.data": published, "verdict.generation": short, "verdict.perplexity": texts, "verdict.perplexity_block_size": 64,
        "verdict.tasks.hellaswag.data[0].path": hellaswag, "verdict.tasks.sst.data[0].path": sst, "verdict.tasks.rte.data[0].path": rte,
        "aligned-ptx.pretraining_mix.data": texts, "aligned-ptx.pretraining_mix.block_size": 64,
    }  # fmt: skip
    for step in ("aligned", "aligned-ptx"):
        settings = {"data": tldr, "max_prompt_tokens": 110, "generation": short, "total_episodes": 8, "rollout_batch_size": 4}
        chosen |= {f"{step}.{field}": value for field, value in settings.items()}
    return [f"{field}={json.dumps(value)}" for field, value in chosen.items()]


def test_the_whole_recipe_on_stand_ins(overrides: list[str], tmp_path: Path) -> None:
    home = tmp_path / "home"
    recipe = load_recipe(RECIPE, overrides, Registry(home / "registry"))
    assert {plan.action for plan in chain.plan(recipe, home)} == {"run"}  # looks at all data
    summary = chain.run(recipe, home, Runtime(quiet=True))
    taken = {step.name: step.config for step in recipe.steps}
    assert (taken["sft"].training.learning_rate, taken["preference"].training.batch_size) == (3e-6, 64)  # as published
    assert (taken["aligned"].kl_coef, taken["aligned"].ppo_epochs, taken["aligned"].minibatch_size) == (0.05, 4, 4)
    assert [step["name"] for step in summary["steps"]] == ["sft", "preference", "judge", "aligned", "aligned-ptx", "verdict"]
    assert list(summary["candidates"]) == ["base", "prompted", "sft", "aligned", "aligned-ptx"]
    for candidate in summary["candidates"].values():
        assert set(candidate["scores"]) == {"held-out", "preference"}
        assert {name: task["n"] for name, task in candidate["tasks"].items()} == {"hellaswag": 2, "sst": 2, "rte": 1}
    # both ways of publishing TL;DR are one text to the model
    lines = (home / "runs" / "instructgpt" / "latest" / "verdict" / "completions.jsonl").read_text().splitlines()
    assert json.loads(lines[0])["prompt"] == prompt(POSTS[0])
