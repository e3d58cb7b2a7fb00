"""Learning curves of the quickstart's PPO over several seeds: gold score, proxy score, KL, entropy and length in each iteration.

    python tests/benchmarks/learning_curves.py [--home outputs] [--seeds 5]      runs the seeds that have not run yet, then plots
    python tests/benchmarks/learning_curves.py --plot                            plots the saved numbers again

Run the quickstart with the same --home first: the SFT model and the reward model come from there. The only monitor is the gold judge; no
step trains on it.

Time: one PPO step of the quickstart for each seed. Result: results/learning_curves.json and .png; docs/results.md, section "The
quickstart".
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stages.recipe.schema import Recipe

REPOSITORY = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).resolve().parent / "results"
GOLD = {"function": "stages.corpora.world.gold:score_batch", "name": "gold"}
PANELS = {
    "monitors/gold": "gold score",
    "rewards/score_mean": "proxy score (reward model)",
    "policy/kl": "KL to the reference, nats",
    "policy/entropy": "entropy, nats per token",
    "responses/length_mean": "length, tokens",
}


def quickstart_ppo() -> dict[str, Any]:
    """The settings of the quickstart's PPO step, with models from the registry. Its only monitor is the gold judge."""
    from stages.recipe.source import read

    content = read(REPOSITORY / "recipes" / "quickstart.yaml").content
    step = next(step for step in content["steps"] if step["stage"] == "ppo")
    names = {other["name"]: f"quickstart/{other['name']}" for other in content["steps"]}
    step["policy"] = names[step["policy"]]
    for source in step["reward"]:
        source["model"] = names[source["model"]]
    step["monitors"] = [GOLD]
    return step


def load_steps(recipe: str, steps: Mapping[str, Mapping[str, Any]], home: Path) -> Recipe:
    """A recipe with one PPO step for each entry of ``steps``: step name -> fields that replace the quickstart's."""
    from stages.recipe.schema import load_recipe
    from stages.registry.ledger import Registry

    content = {"name": recipe, "steps": [{**quickstart_ppo(), "name": name, **fields} for name, fields in steps.items()]}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{recipe}.yaml"
        path.write_text(json.dumps(content))  # JSON is YAML
        return load_recipe(path, (), Registry(home / "registry"))


def run_steps(recipe: str, steps: Mapping[str, Mapping[str, Any]], home: Path) -> dict[str, list[dict[str, float]]]:
    """Run the PPO steps of ``load_steps``.

    Returns step name -> metrics of each iteration. A step that has run before is reused; its metrics come from the run that made it.
    """
    from stages.chain import run as chain
    from stages.process.runtime import Runtime

    chain.run(load_steps(recipe, steps, home), home, Runtime())
    return {name: metrics_of(home / "runs" / recipe, name) for name in steps}


def metrics_of(runs: Path, step: str) -> list[dict[str, float]]:
    """The metrics of each iteration, from the newest run in ``runs`` that trained the step."""
    files = sorted(runs.glob(f"*/{step}/metrics.jsonl"))
    if not files:
        raise SystemExit(f"no run in {runs} has the metrics of {step}; remove its model (stages models remove) and run again")
    return [json.loads(line) for line in files[-1].read_text().splitlines()]


def averaged(runs: Sequence[Sequence[Mapping[str, float]]], name: str) -> tuple[list[float], list[float]]:
    """(mean over runs, standard deviation over runs) of a metric, by iteration."""
    columns = list(zip(*([line[name] for line in run] for run in runs), strict=True))
    return [statistics.fmean(column) for column in columns], [statistics.stdev(column) if len(column) > 1 else 0.0 for column in columns]


def plot(curves: Mapping[str, Mapping[str, list[float]]], path: Path, seeds: int) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(curves), figsize=(2.6 * len(curves), 2.3), constrained_layout=True)
    for axis, (name, curve) in zip(axes, curves.items(), strict=True):
        iterations = range(len(curve["mean"]))
        low, high = ([m + sign * s for m, s in zip(curve["mean"], curve["std"], strict=True)] for sign in (-1, 1))
        axis.fill_between(iterations, low, high, alpha=0.25, linewidth=0)
        axis.plot(iterations, curve["mean"], linewidth=1.2)
        axis.set_title(PANELS[name], fontsize=8)
        axis.set_xlabel("iteration", fontsize=7)
        axis.tick_params(labelsize=6)
        axis.grid(alpha=0.25, linewidth=0.5)
    figure.suptitle(f"PPO of the quickstart: mean and standard deviation over {seeds} seeds", fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90, metadata={"Software": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--home", type=Path, default=Path("outputs"))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--plot", action="store_true", help="Plot the saved numbers again; run nothing.")
    options = parser.parse_args()
    numbers = RESULTS / "learning_curves.json"
    if not options.plot:
        steps = {f"seed-{seed}": {"seed": seed} for seed in range(1, options.seeds + 1)}
        runs = list(run_steps("learning-curves", steps, options.home.absolute()).values())
        curves = {}
        for name in PANELS:
            mean, deviation = averaged(runs, name)
            curves[name] = {"mean": [round(value, 4) for value in mean], "std": [round(value, 4) for value in deviation]}
        alarms = [sum(line.get("health/alarms", 0.0) for line in run) for run in runs]
        RESULTS.mkdir(exist_ok=True)
        numbers.write_text(json.dumps({"seeds": options.seeds, "alarms": alarms, "curves": curves}) + "\n")
    kept = json.loads(numbers.read_text())
    plot(kept["curves"], RESULTS / "learning_curves.png", kept["seeds"])
    for name, curve in kept["curves"].items():
        tenth = max(1, len(curve["mean"]) // 10)
        first, last = (statistics.fmean(part) for part in (curve["mean"][:tenth], curve["mean"][-tenth:]))
        spread = statistics.fmean(curve["std"][-tenth:])
        print(f"{PANELS[name]:28s} {first:7.3f} -> {last:7.3f} (standard deviation over seeds {spread:.3f})")
    print(f"alarms by seed: {kept['alarms']}; picture: {(RESULTS / 'learning_curves.png').relative_to(REPOSITORY)}")


if __name__ == "__main__":
    main()
