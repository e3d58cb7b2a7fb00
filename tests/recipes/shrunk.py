"""Overrides that make each shipped recipe small: fewer rows, steps and tokens, with the same models, data sets, splits and columns."""

from __future__ import annotations

from pathlib import Path

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
TRAINING = ("training.max_steps=2", "training.batch_size=4", "training.microbatch_size=4")
PPO = ("total_episodes=8", "rollout_batch_size=4", "minibatch_size=4", "microbatch_size=4")
WORLD_MODEL = "architecture={type: llama, hidden_size: 16, intermediate_size: 32, num_hidden_layers: 1, num_attention_heads: 2}"
ANSWERS = "data.train={path: world:answers, limit: 64}"


def each(steps: str, *fields: str) -> list[str]:
    """``field`` of every step in ``steps`` (names, separated by spaces)."""
    return [f"{step}.{field}" for step in steps.split() for field in fields]


def pretraining(steps: str) -> list[str]:
    return each(steps, WORLD_MODEL, "data.train[0].limit=60", "data.validation={path: world:library/validation, limit: 4}", *TRAINING)


def summaries(steps: str) -> list[str]:
    """Fields of the recipes that summarize posts."""
    trained = each("sft preference", *TRAINING) + ["sft.max_length=400", "preference.max_length=400"]
    limits = ["sft.data.validation.limit=6", "preference.data.validation.limit=6", "preference.demonstrations.limit=6"]
    policies = each(steps, *PPO, "data.limit=8", "max_prompt_tokens=380", "generation.max_new_tokens=4", "generation.batch_size=4")
    return [*trained, *limits, *policies, "verdict.num_prompts=3", "verdict.generation.max_new_tokens=4"]


def assistant(best_of: str, policies: str) -> list[str]:
    """Fields of the recipes that make an assistant. Demonstrations: rows 0 to 59 are for training and prompts, later rows are held out."""
    return [
        *each("sft preference judge dpo", *TRAINING),
        *each("sft", "data.train.limit=30", "data.validation.skip=60", "data.validation.limit=6"),
        *each("preference dpo judge", "data.train.limit=20", "data.validation.skip=40", "data.validation.limit=6"),
        "judge.data.train.skip=20",
        *each("preference judge", "demonstrations.limit=6"),
        *each(policies, *PPO, "data.skip=30", "data.limit=30", "generation.max_new_tokens=4", "generation.batch_size=4"),
        "aligned-ptx.pretraining_mix.data.limit=20",
        "aligned-ptx.pretraining_mix.block_size=32",
        "verdict.data.skip=70",
        "verdict.num_prompts=4",
        "verdict.generation.max_new_tokens=4",
        f"verdict.candidates.{best_of}.best_of.n=2",
        "verdict.perplexity.skip=112",
        "verdict.perplexity.limit=4",
        "verdict.perplexity_block_size=128",
    ]


SHRUNK: dict[str, list[str]] = {
    "assistant": assistant("best-of-8", "aligned aligned-rloo aligned-ptx"),
    "assistant-cpu": assistant("best-of-4", "aligned aligned-ptx"),
    # Reads what assistant has published.
    "small-against-large": ["verdict.data.skip=70", "verdict.num_prompts=4", "verdict.generation.max_new_tokens=4"],
    "imdb-sentiment": ["sentiment.max_length=64", *each("sentiment", *TRAINING)],
    "steer-sentiment": [
        *each("steered", *PPO, "data[0].limit=16", "generation.max_new_tokens=6"),
        "verdict.generation.max_new_tokens=6",
        "verdict.num_prompts=4",
        "verdict.samples_per_prompt=2",
        "verdict.token_details.num_prompts=2",
        "verdict.candidates.best-of-16.best_of.n=4",
    ],
    # The judge's pairs begin after those of the reward model: at 21,000 of 42,500 in the recipe, at 30 of 60 here.
    "hh-harmless": [
        *each("sft preference judge dpo", *TRAINING),
        *each("preference dpo", "data.train.limit=30"),
        "judge.data.train.skip=30",
        *each("preference judge dpo", "data.validation.limit=6"),
        *each("aligned", *PPO, "data[0].limit=16", "generation.max_new_tokens=6"),
        "verdict.num_prompts=4",
        "verdict.generation={max_new_tokens: 6}",
        "verdict.candidates.best-of-8.best_of.n=2",
    ],
    "instructgpt": [
        *summaries("aligned aligned-ptx"),
        *each("judge", *TRAINING, "max_length=400", "data.train.limit=30", "demonstrations.limit=6"),
        *each("preference judge", "data.validation.skip=30", "data.validation.limit=6"),
        "verdict.perplexity.skip=112",
        "verdict.perplexity_block_size=128",
        "aligned-ptx.pretraining_mix.data.limit=20",
        "aligned-ptx.pretraining_mix.block_size=64",
    ],
    "instructgpt-1b": summaries("aligned"),
    "instructgpt-7b-qlora": summaries("aligned"),
    "quickstart": [
        *pretraining("base"),
        *each("sft taste preference dpo", *TRAINING, "data.train={path: world:demonstrations, limit: 16}"),
        "taste.data.train.path=world:reviews",
        *each("preference dpo", "data.train.path=world:comparisons"),
        *each("aligned", *PPO, "data={path: world:prompts, limit: 16}", "generation.max_new_tokens=4"),
        "verdict.num_prompts=4",
        "verdict.generation.max_new_tokens=4",
        "verdict.candidates.best-of-16.best_of.n=2",
        "verdict.token_details.num_prompts=2",
        "verdict.perplexity={path: world:raw/heldout, limit: 4}",
    ],
    "two-rounds": [
        *pretraining("base"),
        *each("sft preference-1 preference-2", *TRAINING),
        "sft.data.train={path: world:demonstrations, limit: 16}",
        *each("preference-1 preference-2", "data.train.limit=16"),
        "preference-2.collect.num_prompts=4",
        "preference-2.collect.completions_per_prompt=2",
        "preference-2.collect.generation.max_new_tokens=4",
        *each("aligned-1 aligned-2", *PPO, "generation.max_new_tokens=4"),
        "verdict.num_prompts=4",
        "verdict.generation.max_new_tokens=4",
    ],
    "people": [
        *pretraining("base"),
        *each("sft preference-1 preference-2", *TRAINING),
        "sft.data.train={path: world:demonstrations, limit: 16}",
        *each(
            "preference-1 preference-2",
            "data.train.limit=16",
            "collect.num_prompts=4",
            "collect.per_prompt=2",
            "collect.generation.max_new_tokens=4",
            "collect.judge.people.target=4",
        ),
        *each("aligned-1 aligned-2", *PPO, "generation.max_new_tokens=4"),
        "verdict.num_prompts=4",
        "verdict.generation.max_new_tokens=4",
        "verdict.judges[0].num_prompts=4",
        "verdict.judges[0].people.target=2",
    ],
    "data-efficiency": [
        *pretraining("base random large"),
        *each("base-250 base-1000 base-4000 random-250 random-1000 random-4000", *TRAINING),
        "verdict.num_prompts=4",
        "verdict.generation.max_new_tokens=4",
    ],
    "instructgpt-miniature": [
        *pretraining("base-s base-m base-l"),
        *each("sft-s sft-m sft-l preference judge", *TRAINING),
        *each("sft-s sft-m sft-l", ANSWERS),
        *each("sft-s sft-m sft-l ptx-s ptx-m ptx-l", "pretraining_mix.data.limit=60"),
        *each("preference judge", "data.train.limit=16"),
        "judge.data.train.skip=20",
        *each("ppo-s ppo-m ppo-l ptx-s ptx-m ptx-l", *PPO, "generation.max_new_tokens=4"),
        "verdict.num_prompts=4",
        "verdict.generation.max_new_tokens=4",
        "verdict.perplexity={path: world:library/heldout, limit: 4}",
    ],
    "instructgpt-studies": [
        *pretraining("base blank"),
        *each("sft preference", *TRAINING),
        f"sft.{ANSWERS}",
        *each("sft ptx", "pretraining_mix.data.limit=60"),
        "preference.data.train.limit=16",
        *each("ppo ptx", *PPO, "generation.max_new_tokens=4"),
        "verdict.num_prompts=4",
        "verdict.generation.max_new_tokens=4",
        "verdict.perplexity={path: world:library/heldout, limit: 4}",
    ],
    "instructgpt-overoptimisation": [
        *pretraining("base"),
        *each("sft weak-1 weak-2 weak-3 weak-4 strong dpo-far dpo dpo-near", *TRAINING),
        f"sft.{ANSWERS}",
        "sft.pretraining_mix.data.limit=60",
        *each("weak-1 weak-2 weak-3 weak-4 dpo-far dpo dpo-near", "data.train.limit=16"),
        "strong.data.train.limit=16",
        "strong.data.train.skip=20",
        *each("one mean min uncertain", *PPO, "generation.max_new_tokens=4"),
        "verdict.num_prompts=4",
        "verdict.generation.max_new_tokens=4",
        "verdict.candidates.best-of-64.best_of.n=2",
    ],
}
"""Name of the recipe -> overrides. Every shipped recipe has an entry."""
