"""Compares five advantage estimators of PPO on the quickstart: GAE with a value network, RLOO, GRPO, Dr. GRPO and REINFORCE.

    python tests/benchmarks/critic_free.py                                  # three seeds, 5,120 episodes each
    python tests/benchmarks/critic_free.py --episodes 640 --seeds 1         # a quick look

All runs start from the same SFT model and reward model, sample the same number of episodes, and differ in the advantages only. GAE samples
one completion for each prompt. The other estimators sample four completions for each of a quarter of the prompts.

The table has means over seeds: the win rate over SFT and the score by the gold judge, which no step trains on; the score by the reward
model, which PPO trains on; the KL; and the processor time of PPO and its evaluation. The last column is the gold score of the rollouts
after the processor time of the fastest estimator.

Time: about 25 minutes of one core (15 PPO runs with an evaluation each, and the steps before PPO once). Result: rows.jsonl in the folder of
--home (a copy: results/critic_free.json); docs/results.md, section "The quickstart". After an interruption, the same command continues.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
from learning_curves import metrics_of  # noqa: E402

from stages.chain import run as chain
from stages.process.runtime import Runtime
from stages.recipe.schema import load_recipe
from stages.registry.ledger import Registry

REPOSITORY = Path(__file__).resolve().parents[2]
LAST = 8  # iterations: the gold score at equal time is the mean over these, because one iteration has only 64 episodes
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


def prepare(home: Path) -> None:
    """Run the steps of the recipe before PPO."""
    recipe = load_recipe(REPOSITORY / "recipes" / "quickstart.yaml", [], Registry(home / "registry"))
    recipe.steps[:] = [step for step in recipe.steps if step.name not in {"dpo", "aligned", "verdict"}]
    chain.run(recipe, home, Runtime(quiet=True))


def measure(method: str, seed: int, episodes: int, home: Path) -> dict[str, Any]:
    """Run the recipe with these settings. Returns one row of the table."""
    recipe = load_recipe(REPOSITORY / "recipes" / "quickstart.yaml", overrides_of(method, seed, episodes), Registry(home / "registry"))
    recipe.steps[:] = [step for step in recipe.steps if step.name != "dpo"]
    began = time.process_time()
    summary = chain.run(recipe, home, Runtime(quiet=True))
    seconds = time.process_time() - began
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
        "processor_seconds": None if aligned["reused"] else seconds,
        "reused": aligned["reused"],
        "gold_by_iteration": [line["monitors/gold"] for line in metrics_of(home / "runs" / "quickstart", "aligned")],
    }


def finished(home: Path) -> dict[tuple[str, int, int], dict[str, Any]]:
    """The rows that an earlier start of this command has written, by (method, seed, episodes)."""
    path = home / "rows.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    return {(row["method"], row["seed"], row["episodes"]): row for row in rows}


def gold_at(row: dict[str, Any], share: float) -> float:
    """The gold score of the last rollouts of a run that is cut after ``share`` of its iterations."""
    gold = row["gold_by_iteration"]
    return fmean(gold[: max(1, round(share * len(gold)))][-LAST:])


def mean_and_deviation(values: list[float]) -> str:
    return f"{fmean(values):.3g}" + (f" ± {stdev(values):.2g}" if len(values) > 1 else "")


def table(rows: list[dict[str, Any]], methods: list[str]) -> str:
    """Markdown: means and standard deviations over the seeds, for equal episodes and for equal processor time."""
    by_method = {method: [row for row in rows if row["method"] == method] for method in methods}
    timed = {method: [row["processor_seconds"] for row in of if row["processor_seconds"] is not None] for method, of in by_method.items()}
    seconds = {method: fmean(values) for method, values in timed.items() if values}
    least = min(seconds.values(), default=0.0)
    names = ("win_rate", "gold", "reward", "kl")
    lines = [
        "| advantages | win rate over SFT, by seed | " + " | ".join(names) + " | processor seconds | gold at equal processor time |",
        "|" + "---|" * (len(names) + 4),
    ]
    for method, of in by_method.items():
        rates = ", ".join(f"{row['win_rate']:.2f}" for row in of)
        columns = [mean_and_deviation([row[name] for row in of]) for name in names]
        if method not in seconds:  # all runs were reused
            columns += ["-", "-"]
        else:
            columns += [f"{seconds[method]:.0f}", mean_and_deviation([gold_at(row, least / seconds[method]) for row in of])]
        lines.append(f"| {method} | {rates} | " + " | ".join(columns) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--episodes", type=int, default=5120)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--home", type=Path, default=Path("outputs/critic-free"))
    chosen = parser.parse_args()
    chosen.home.mkdir(parents=True, exist_ok=True)
    known = finished(chosen.home)
    keys = [(method, seed, chosen.episodes) for seed in range(chosen.seeds) for method in chosen.methods]
    missing = [key for key in keys if key not in known]
    if missing:
        prepare(chosen.home)  # so that the processor time of a row is that of its PPO step and its evaluation
    for key in missing:
        known[key] = measure(*key, chosen.home)
        with (chosen.home / "rows.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(known[key]) + "\n")
        print(json.dumps({name: value for name, value in known[key].items() if name != "gold_by_iteration"}), flush=True)  # noqa: T201
    print(table([known[key] for key in keys], chosen.methods))  # noqa: T201


if __name__ == "__main__":
    main()
