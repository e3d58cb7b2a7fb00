"""PPO with LoRA on the quickstart, sampled locally, by vLLM, and by vLLM with ``overlap: 1``: score curves and held-out win rates.

Every run starts from the same SFT model and reward model of the quickstart, with the recipe's settings except LoRA and its learning rate.
No run trains on the gold judge. An evaluation with the local sampler compares each aligned model with the SFT model.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stages.chain import run as chain
from stages.process.runtime import Runtime
from stages.recipe.schema import Recipe, load_recipe
from stages.registry.ledger import Registry
from stages.stats.replicates import mean_interval
from tests.benchmarks.engines.kept import Kept, Row
from tests.benchmarks.engines.server import RunningServer, served

REPOSITORY = Path(__file__).resolve().parents[3]
ARMS: Mapping[str, tuple[str, ...]] = {"local": (), "vllm": (), "vllm, overlap: 1": ("aligned.overlap=1",)}
RANK = 8
LORA = (f"aligned.lora={{r: {RANK}}}", "aligned.publish_value=false")
VERDICT = ('verdict.candidates={"sft": "sft", "aligned": "aligned"}', "verdict.token_details=null", "verdict.perplexity=null")
PANELS = {"gold": "gold score", "proxy": "proxy score (reward model)", "kl": "KL to the reference, nats"}


def recipe_of(key: Mapping[str, Any], engine: object, home: Path) -> Recipe:
    """The quickstart for one run (``key``: the key of its row), without the DPO step. ``engine``: generation.engine of the PPO step."""
    fields = {
        "generation.engine": json.dumps(engine),
        "seed": key["seed"],
        "total_episodes": key["episodes"],
        "training": f"{{learning_rate: {key['learning_rate']}, value_learning_rate: 1.0e-3}}",
    }
    overrides = [*LORA, *ARMS[key["arm"]], *(f"aligned.{name}={value}" for name, value in fields.items()), *VERDICT]
    recipe = load_recipe(REPOSITORY / "recipes" / "quickstart.yaml", overrides, Registry(home / "registry"))
    recipe.steps[:] = [step for step in recipe.steps if step.name != "dpo"]
    return recipe


def measure(options: argparse.Namespace, kept: Kept, folder: Path) -> None:
    """Run all arms that are not finished; the seeds are the outer loop, so that an interrupted benchmark has all arms of some seeds."""
    home, rest = options.home.absolute(), {"episodes": options.episodes, "learning_rate": options.learning_rate}
    keys = [{"arm": arm, "seed": seed, **rest} for seed in range(1, options.seeds + 1) for arm in options.arms]
    if all(kept.has(key) for key in keys):
        return
    start = recipe_of(keys[0], "local", home)
    start.steps[:] = [step for step in start.steps if step.name not in ("aligned", "verdict")]
    chain.run(start, home, Runtime(quiet=True))
    base = Registry(home / "registry").get("quickstart/sft")
    with served(str(base.path), folder / "vllm.log", lora_rank=RANK) as server:
        for key in keys:
            kept.once(key, lambda key=key: run_arm(key, server, home))  # type: ignore[misc]


def run_arm(key: Mapping[str, Any], server: RunningServer, home: Path) -> Row:
    """Run one arm with one seed; the values of its row."""
    engine = "local" if key["arm"] == "local" else server.engine
    began = server.processor_seconds()
    summary = chain.run(recipe_of(key, engine, home), home, Runtime(quiet=True))
    aligned = next(step for step in summary["steps"] if step["name"] == "aligned")
    metrics = newest_metrics(home)
    rate = next(row for row in summary["win_rates"] if {row["a"], row["b"]} == {"aligned", "sft"} and row["judge"] == "gold")
    low, high = rate["ci_low"], rate["ci_high"]
    ahead = rate["a"] == "aligned"
    candidate = summary["candidates"]["aligned"]
    return {
        "win_rate": rate["win_rate"] if ahead else 1 - rate["win_rate"],
        "win_rate_interval": [low, high] if ahead else [1 - high, 1 - low],
        "gold": candidate["scores"]["gold"],
        "gold_of_sft": summary["candidates"]["sft"]["scores"]["gold"],
        "kl": candidate["kl"],
        "gap": max(line.get("policy/sampling_gap", 0.0) for line in metrics),
        "capped_share": statistics.fmean(line.get("policy/importance_capped_share", 0.0) for line in metrics),
        "alarms": sum(line.get("health/alarms", 0.0) for line in metrics),
        "wall_seconds": aligned["wall_seconds"],
        "processor_seconds": round(server.processor_seconds() - began, 1),
        "curves": {
            "gold": [round(line["monitors/gold"], 4) for line in metrics],
            "proxy": [round(line["rewards/score_mean"], 4) for line in metrics],
            "kl": [round(line["policy/kl"], 4) for line in metrics],
        },
    }


def newest_metrics(home: Path) -> list[dict[str, float]]:
    """The metrics by iteration of the newest PPO step."""
    newest = max((home / "runs" / "quickstart").glob("*/aligned/metrics.jsonl"), key=lambda path: path.parent.parent.name)
    return [json.loads(line) for line in newest.read_text(encoding="utf-8").splitlines()]


def spread(values: Sequence[float]) -> str:
    """Mean over seeds, with Student's 95 % interval if there are at least two; empty without values."""
    if not values:
        return ""
    mean, low, high = mean_interval(values)
    return f"{mean:.3f}" if len(values) < 2 else f"{mean:.3f} ({low:.3f} to {high:.3f})"


def groups(kept: Kept) -> dict[float, dict[str, list[Row]]]:
    """The rows of the runs with the most episodes, by learning rate (largest first) and arm."""
    episodes = max(row["episodes"] for row in kept.rows)
    rows = [row for row in kept.rows if row["episodes"] == episodes]
    rates = sorted({row["learning_rate"] for row in rows}, reverse=True)
    of = {(rate, arm): [row for row in rows if (row["learning_rate"], row["arm"]) == (rate, arm)] for rate in rates for arm in ARMS}
    return {rate: {arm: of[rate, arm] for arm in ARMS if of[rate, arm]} for rate in rates}


def table(kept: Kept) -> str:
    """The table in Markdown."""
    lines = [
        "| sampler, learning rate | win rate over SFT | difference to local | held-out gold score "
        "| gold score in training: difference to local | KL | processor seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    for rate, by_arm in groups(kept).items():
        local = {row["seed"]: row for row in by_arm.get("local", [])}
        for arm, rows in by_arm.items():
            pairs = [(row, local[row["seed"]]) for row in rows if row["seed"] in local] if arm != "local" else []
            lines.append("| " + " | ".join([f"{arm}, {rate:g}", *cells_of(rows, pairs)]) + " |")
    return "\n".join(lines) + "\n"


def cells_of(rows: Sequence[Row], pairs: Sequence[tuple[Row, Row]]) -> list[str]:
    """The cells of an arm. ``pairs``: each row with the local sampler's row of the same seed."""
    return [
        spread([row["win_rate"] for row in rows]),
        spread([row["win_rate"] - other["win_rate"] for row, other in pairs]),
        spread([row["gold"] for row in rows]),
        spread([statistics.fmean(row["curves"]["gold"]) - statistics.fmean(other["curves"]["gold"]) for row, other in pairs]),
        f"{statistics.fmean(row['kl'] for row in rows):.1f}",
        f"{statistics.fmean(row['processor_seconds'] for row in rows):.0f}",
    ]


def draw(kept: Kept, path: Path) -> None:
    """Draw the mean over seeds of each curve, with the range of the seeds, in one row of panels per learning rate.

    Each value is a mean over five iterations.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    by_rate = groups(kept)
    size = (3.4 * len(PANELS), 2.5 * len(by_rate))
    figure, axes = pyplot.subplots(len(by_rate), len(PANELS), figsize=size, constrained_layout=True, squeeze=False)
    for line, (rate, by_arm) in zip(axes, by_rate.items(), strict=True):
        for axis, (name, title) in zip(line, PANELS.items(), strict=True):
            for arm, rows in by_arm.items():
                columns = list(zip(*(smoothed(row["curves"][name]) for row in rows), strict=True))
                low, high = [min(column) for column in columns], [max(column) for column in columns]
                color = f"C{list(ARMS).index(arm)}"
                axis.fill_between(range(len(columns)), low, high, alpha=0.18, linewidth=0, color=color)
                axis.plot([statistics.fmean(column) for column in columns], linewidth=1.2, label=arm, color=color)
            axis.set_title(f"{title}, learning rate {rate:g}", fontsize=8)
            axis.set_xlabel("iteration", fontsize=7)
            axis.tick_params(labelsize=6)
            axis.grid(alpha=0.25, linewidth=0.5)
    axes[0][0].legend(fontsize=7)
    figure.savefig(path, dpi=90, metadata={"Software": None})
    pyplot.close(figure)


def smoothed(curve: Sequence[float], width: int = 5) -> list[float]:
    """The mean of each value and its neighbours, ``width`` values in the middle of the curve."""
    half = width // 2
    return [statistics.fmean(curve[max(0, index - half) : index + half + 1]) for index in range(len(curve))]
