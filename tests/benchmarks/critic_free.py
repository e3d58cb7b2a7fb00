"""Compares five advantage estimators of PPO: GAE with a value network, RLOO, GRPO, Dr. GRPO and REINFORCE.

    python tests/benchmarks/critic_free.py                                  # the quickstart, three seeds, 5,120 episodes each
    python tests/benchmarks/critic_free.py --task miniature                 # the middle size of InstructGPT in miniature
    python tests/benchmarks/critic_free.py --task assistant --shared ../shared/data --home HOME --episodes 512 --methods gae rloo grpo
    python tests/benchmarks/critic_free.py --episodes 640 --seeds 1         # a quick look

The assistant needs the home folder of assistant.py, in which its SFT model and reward models are.

All runs of a task start from the same SFT model and reward model, sample the same number of episodes, and differ in the advantages only.
GAE samples one completion for each prompt. The other estimators sample four completions for each of a quarter of the prompts.

The table has means over seeds: the win rate over SFT and the score by a judge that no step trains on (the gold judge; for the assistant,
the held-out reward model); the score by the reward model, which PPO trains on; the KL; and the processor time of PPO and its evaluation.
The last column is the judge's score of the rollouts after the processor time of the fastest estimator.

Time: about 25 minutes of one core for the quickstart (15 PPO runs with an evaluation each, and the steps before PPO once); 17 to 23
minutes for a run of the assistant, and half an hour for the steps before PPO. Result: one row for each run in the
folder of --home (a copy: results/critic_free.json); docs/results.md. After an interruption, the same command continues.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
from assistant import overrides as local_data  # noqa: E402
from learning_curves import metrics_of  # noqa: E402

from stages.chain import run as chain
from stages.process.runtime import Runtime
from stages.recipe.schema import Recipe, load_recipe
from stages.registry.ledger import Registry

REPOSITORY = Path(__file__).resolve().parents[2]
GOLD = '{"function": "stages.corpora.world.gold:score_batch", "name": "gold"}'
LAST = 8  # iterations: the judge's score at equal time is the mean over these, because one iteration has only 64 episodes
CRITIC_FREE = (
    "value=null",
    "publish_value=false",
    "training.value_learning_rate=null",
    "value_warmup_iterations=0",
    "samples_per_prompt=4",
)
METHODS = {
    "gae": ("advantages=gae", "samples_per_prompt=1"),
    "rloo": ("advantages=rloo", *CRITIC_FREE),
    "grpo": ("advantages=grpo", *CRITIC_FREE),
    "dr-grpo": ("advantages=grpo", "divide_by_deviation=false", *CRITIC_FREE),
    "reinforce": ("advantages=reinforce", *CRITIC_FREE),
}


@dataclass(frozen=True)
class Task:
    """A recipe, and the names of its parts that the comparison needs."""

    recipe: str
    ppo: str  # the PPO step
    judge: str  # the monitor of PPO and judge of the evaluation that no step trains on
    left_out: tuple[str, ...]  # steps that the comparison does not need
    overrides: tuple[str, ...] = ()


TASKS = {
    "quickstart": Task("quickstart", "aligned", "gold", ("dpo",), ("verdict.token_details=null",)),
    "miniature": Task("instructgpt-studies", "ppo", "gold", ("blank", "ptx"), (f"ppo.monitors=[{GOLD}]",)),
    "assistant": Task("assistant-cpu", "aligned", "held-out", ("dpo", "aligned-ptx"), ("verdict.tasks={}", "verdict.perplexity=null")),
}


def load(task: Task, overrides: list[str], home: Path) -> Recipe:
    """The recipe of the task with these overrides, without the steps that the comparison does not need."""
    candidates = f'verdict.candidates={{"sft": "sft", "{task.ppo}": "{task.ppo}"}}'
    # Those of the task come last: the overrides for local data add entries to the dictionaries that the task empties.
    ordered = [*overrides, *task.overrides, candidates]
    recipe = load_recipe(REPOSITORY / "recipes" / f"{task.recipe}.yaml", ordered, Registry(home / "registry"))
    recipe.steps[:] = [step for step in recipe.steps if step.name not in task.left_out]
    return recipe


def overrides_of(task: Task, method: str, seed: int, episodes: int) -> list[str]:
    """The overrides of the recipe for one run."""
    own = [*METHODS[method], f"seed={seed}", f"total_episodes={episodes}"]
    return [f"{task.ppo}.{text}" for text in own]


def prepare(task: Task, overrides: list[str], home: Path) -> None:
    """Run the steps of the recipe before PPO."""
    recipe = load(task, overrides, home)
    recipe.steps[:] = [step for step in recipe.steps if step.name not in {task.ppo, "verdict"}]
    chain.run(recipe, home, Runtime(quiet=True))


def measure(task: Task, method: str, seed: int, episodes: int, overrides: list[str], home: Path) -> dict[str, Any]:
    """Run the recipe with these settings. Returns one row of the table."""
    recipe = load(task, [*overrides, *overrides_of(task, method, seed, episodes)], home)
    began = time.process_time()
    summary = chain.run(recipe, home, Runtime(quiet=True))
    seconds = time.process_time() - began
    trained = next(step for step in summary["steps"] if step["name"] == task.ppo)
    rate = next(row for row in summary["win_rates"] if {row["a"], row["b"]} == {task.ppo, "sft"} and row["judge"] == task.judge)
    candidate = summary["candidates"][task.ppo]
    return {
        "method": method,
        "seed": seed,
        "episodes": episodes,
        "win_rate": rate["win_rate"] if rate["a"] == task.ppo else 1 - rate["win_rate"],
        "judge": candidate["scores"][task.judge],
        "reward": candidate["scores"]["preference"],
        "kl": candidate["kl"],
        "processor_seconds": None if trained["reused"] else seconds,
        "reused": trained["reused"],
        "judge_by_iteration": [line[f"monitors/{task.judge}"] for line in metrics_of(home / "runs" / task.recipe, task.ppo)],
    }


def finished(path: Path) -> dict[tuple[str, int, int], dict[str, Any]]:
    """The rows that an earlier start of this command has written, by (method, seed, episodes)."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    return {(row["method"], row["seed"], row["episodes"]): row for row in rows}


def judged_at(row: dict[str, Any], share: float) -> float:
    """The judge's score of the last rollouts of a run that is cut after ``share`` of its iterations."""
    scores = row["judge_by_iteration"]
    return fmean(scores[: max(1, round(share * len(scores)))][-LAST:])


def mean_and_deviation(values: list[float]) -> str:
    return f"{fmean(values):.3g}" + (f" ± {stdev(values):.2g}" if len(values) > 1 else "")


def table(rows: list[dict[str, Any]], methods: list[str]) -> str:
    """Markdown: means and standard deviations over the seeds, for equal episodes and for equal processor time."""
    by_method = {method: [row for row in rows if row["method"] == method] for method in methods}
    timed = {method: [row["processor_seconds"] for row in of if row["processor_seconds"] is not None] for method, of in by_method.items()}
    seconds = {method: fmean(values) for method, values in timed.items() if values}
    least = min(seconds.values(), default=0.0)
    names = ("win_rate", "judge", "reward", "kl")
    lines = [
        "| advantages | win rate over SFT, by seed | " + " | ".join(names) + " | processor seconds | judge at equal processor time |",
        "|" + "---|" * (len(names) + 4),
    ]
    for method, of in by_method.items():
        rates = ", ".join(f"{row['win_rate']:.2f}" for row in of)
        columns = [mean_and_deviation([row[name] for row in of]) for name in names]
        if method not in seconds:  # all runs were reused
            columns += ["-", "-"]
        else:
            columns += [f"{seconds[method]:.0f}", mean_and_deviation([judged_at(row, least / seconds[method]) for row in of])]
        lines.append(f"| {method} | {rates} | " + " | ".join(columns) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=TASKS, default="quickstart")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--episodes", type=int, default=5120)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--home", type=Path, default=Path("outputs/critic-free"))
    parser.add_argument("--shared", type=Path, help="folder with the data of assistant.py; only for --task assistant")
    chosen = parser.parse_args()
    if (chosen.task == "assistant") != (chosen.shared is not None):
        parser.error("--shared belongs to --task assistant: give both or neither")
    task, home = TASKS[chosen.task], chosen.home.absolute()
    overrides = local_data(chosen.shared.absolute(), home / "assistant") if chosen.shared else []
    home.mkdir(parents=True, exist_ok=True)
    written = home / f"critic-free-{chosen.task}.jsonl"
    known = finished(written)
    keys = [(method, seed, chosen.episodes) for seed in range(chosen.seeds) for method in chosen.methods]
    missing = [key for key in keys if key not in known]
    if missing:
        prepare(task, overrides, home)  # so that the processor time of a row is that of its PPO step and its evaluation
    for key in missing:
        known[key] = measure(task, *key, overrides, home)
        with written.open("a", encoding="utf-8") as file:
            file.write(json.dumps(known[key]) + "\n")
        print(json.dumps({name: value for name, value in known[key].items() if name != "judge_by_iteration"}), flush=True)  # noqa: T201
    print(table([known[key] for key in keys], chosen.methods))  # noqa: T201


if __name__ == "__main__":
    main()
