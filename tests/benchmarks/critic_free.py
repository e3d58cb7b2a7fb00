"""Compares five advantage estimators of PPO on the quickstart: GAE with a value network, RLOO, GRPO, Dr. GRPO and REINFORCE.

    python tests/benchmarks/critic_free.py                                  # three seeds, 5,120 episodes each
    python tests/benchmarks/critic_free.py --episodes 640 --seeds 1         # a quick look

All runs start from the same SFT model and reward model, sample the same number of episodes, and differ in the advantages only. GAE samples
one completion for each prompt. The other estimators sample four completions for each of a quarter of the prompts.

The table has means over seeds: the win rate over SFT and the score by the gold judge, which no step trains on; the score by the reward
model, which PPO trains on; the KL; and PPO's seconds on this machine.

Time: not measured on an idle machine (15 PPO runs with an evaluation each). Result: rows.jsonl in the folder of --home; docs/results.md,
section "The quickstart". After an interruption, the same command continues.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import fmean
from typing import Any

from stages.chain import run as chain
from stages.process.runtime import Runtime
from stages.recipe.schema import load_recipe
from stages.registry.ledger import Registry

REPOSITORY = Path(__file__).resolve().parents[2]
WITHOUT_VALUE = ("publish_value=false", "training.value_learning_rate=null", "samples_per_prompt=4")
METHODS = {
    "gae": (),
    "rloo": ("advantages=rloo", *WITHOUT_VALUE),
    "grpo": ("advantages=grpo", *WITHOUT_VALUE),
    "dr-grpo": ("advantages=grpo", "divide_by_deviation=false", *WITHOUT_VALUE),
    "reinforce": ("advantages=reinforce", *WITHOUT_VALUE),
}
KEPT_CANDIDATES = 'verdict.candidates={"sft": "sft", "aligned": "aligned"}'


def overrides_of(method: str, seed: int, episodes: int) -> list[str]:
    """The overrides of the quickstart for one run."""
    own = [f"aligned.{text}" for text in METHODS[method]]
    return [*own, f"aligned.seed={seed}", f"aligned.total_episodes={episodes}", KEPT_CANDIDATES, "verdict.token_details=null"]


def measure(method: str, seed: int, episodes: int, home: Path) -> dict[str, Any]:
    """Run the recipe with these settings. Returns one row of the table."""
    recipe = load_recipe(REPOSITORY / "recipes" / "quickstart.yaml", overrides_of(method, seed, episodes), Registry(home / "registry"))
    recipe.steps[:] = [step for step in recipe.steps if step.name != "dpo"]
    summary = chain.run(recipe, home, Runtime(quiet=True))
    aligned = next(step for step in summary["steps"] if step["name"] == "aligned")
    rate = next(row for row in summary["win_rates"] if {row["a"], row["b"]} == {"aligned", "sft"} and row["judge"] == "gold")
    candidate = summary["candidates"]["aligned"]
    return {
        "method": method,
        "seed": seed,
        "episodes": episodes,
        "win_rate": rate["win_rate"] if rate["a"] == "aligned" else 1 - rate["win_rate"],
        "gold": candidate["scores"]["gold"],
        "reward": candidate["scores"]["preference"],
        "kl": candidate["kl"],
        "seconds": None if aligned["reused"] else aligned["wall_seconds"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--episodes", type=int, default=5120)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--home", type=Path, default=Path("outputs/critic-free"))
    chosen = parser.parse_args()
    chosen.home.mkdir(parents=True, exist_ok=True)
    rows = []
    for seed in range(chosen.seeds):
        for method in chosen.methods:
            rows.append(measure(method, seed, chosen.episodes, chosen.home))
            with (chosen.home / "rows.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(rows[-1]) + "\n")
            print(json.dumps(rows[-1]), flush=True)  # noqa: T201
    names = ("win_rate", "gold", "reward", "kl", "seconds")
    print("| advantages | " + " | ".join(names) + " |\n|" + "---|" * (len(names) + 1))  # noqa: T201
    for method in chosen.methods:
        columns = [[row[name] for row in rows if row["method"] == method and row[name] is not None] for name in names]
        print(f"| {method} | " + " | ".join(f"{fmean(values):.3g}" if values else "-" for values in columns) + " |")  # noqa: T201


if __name__ == "__main__":
    main()
