"""Compares choices on which the papers and common practice differ with the defaults, on the quickstart's PPO, by the gold judge.

    python tests/benchmarks/paper_choices.py [--home outputs] [--seeds 5] [--only NAME ...]
    python tests/benchmarks/paper_choices.py --plot                                     draws the saved numbers again

Run the quickstart with the same --home first. Each variant changes one choice. All variants use the same seeds, and so the same prompts and
random streams. The table shows the difference to the default over the last quarter of each run: the mean over seeds, with a 95 %
t-interval.

Two choices are not compared, because the scores of rollouts do not show their effect: averaging the weights, which changes the published
model only, and the sampling temperature, which changes the completions that are scored.

Time: one PPO step of the quickstart (85 seconds on one core) for each of the twelve variants and each seed. After an interruption, the same
command continues. Result: results/paper_choices.json, .md and .png (without --only); docs/results.md, section "The quickstart".
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
from learning_curves import RESULTS, quickstart_ppo, run_steps  # noqa: E402

T975 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}  # of Student's t
MEASURES = {"monitors/gold": 3, "rewards/score_mean": 3, "policy/kl": 2, "responses/length_mean": 1}
"""Metric -> its decimals in the table."""


def variants() -> dict[str, tuple[str, dict[str, Any]]]:
    """Name -> (description, the fields that differ from the quickstart's). recipe/presets.py explains the letters Z, S, I and H."""
    settings = quickstart_ppo()
    training = settings["training"]
    return {
        "default": ("the quickstart's settings", {}),
        "tf-adam": ("TensorFlow's Adam (Z)", {"training": {**training, "adam_style": "tensorflow"}}),
        "no-clipping": ("gradients not clipped (Z, S, I, H)", {"training": {**training, "max_grad_norm": None}}),
        "warmup": (
            "constant after ten iterations of warmup (I)",
            {"training": {**training, "schedule": "constant", "warmup_iterations": 10}},
        ),
        "value-warmup": ("the first five iterations train the value network only", {"value_warmup_iterations": 5}),
        "one-epoch": ("one epoch of eight minibatches (I) instead of four of two", {"ppo_epochs": 1, "minibatch_size": 8}),
        "whiten-rewards": ("rewards whitened (Z style)", {"whiten": {"rewards": True}}),
        "by-minibatch": ("whitening and GAE in each minibatch (Z)", {"whiten": {"scope": "minibatch"}}),
        "score-behind": ("score credited to the state after the last token (H)", {"score_placement": "after"}),
        "value-policy": ("value network starts from the policy, with a zero head", {"value": "policy"}),
        "value-shared": ("value head on the policy (Z)", {"value": "shared"}),
        "adaptive-kl": ("adaptive KL, target 6 nats (Z)", {"kl": {**settings["kl"], "target": 6.0}}),
    }


def last_quarter(metrics: list[dict[str, float]], name: str) -> float:
    return statistics.fmean(line[name] for line in metrics[-max(1, len(metrics) // 4) :])


def table(chosen: dict[str, tuple[str, dict[str, Any]]], results: dict[str, list[dict[str, float]]]) -> list[dict[str, Any]]:
    """One row per variant: its means, its differences to the default, and half the width of their 95 % intervals."""
    rows = []
    for name, (what, _) in chosen.items():
        row: dict[str, Any] = {"variant": name, "what": what, "seeds": len(results[name])}
        for measure in MEASURES:
            differences = [run[measure] - base[measure] for run, base in zip(results[name], results["default"], strict=True)]
            error = statistics.stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else math.nan
            row[measure] = {
                "mean": round(statistics.fmean(run[measure] for run in results[name]), 4),
                "difference": round(statistics.fmean(differences), 4),
                "half": round(T975.get(len(differences) - 1, 1.96) * error, 4),
            }
        rows.append(row)
    return rows


def as_markdown(rows: list[dict[str, Any]]) -> str:
    """The table of docs/results.md: the default's means, then the differences of each variant with half the width of their intervals."""
    head = ["choice", "gold score", "proxy score", "KL (nats)", "tokens"]
    lines = [head, ["-" * 3] * len(head)]
    for row in rows:
        if row["variant"] == "default":
            cells = [f"{row[measure]['mean']:.{digits}f}" for measure, digits in MEASURES.items()]
        else:
            cells = [
                f"{row[measure]['difference']:+.{digits}f} ± {row[measure]['half']:.{digits}f}" for measure, digits in MEASURES.items()
            ]
        lines.append([row["what"], *cells])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Differences to the default with their 95 % intervals: gold score, proxy score and KL."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = [row for row in rows if row["variant"] != "default"][::-1]
    titles = {"monitors/gold": "gold score", "rewards/score_mean": "proxy score", "policy/kl": "KL, nats"}
    figure, axes = pyplot.subplots(1, len(titles), figsize=(11, 0.32 * len(shown) + 1.2), sharey=True, constrained_layout=True)
    for axis, (measure, title) in zip(axes, titles.items(), strict=True):
        differences = [row[measure]["difference"] for row in shown]
        axis.errorbar(differences, range(len(shown)), xerr=[row[measure]["half"] for row in shown], fmt="o", markersize=4, linewidth=1)
        axis.axvline(0, color="black", linewidth=0.6)
        axis.set_title(f"{title}: difference to the default", fontsize=8)
        axis.tick_params(labelsize=7)
        axis.grid(alpha=0.25, linewidth=0.5)
    axes[0].set_yticks(range(len(shown)), [row["variant"] for row in shown])
    seeds = rows[0]["seeds"]
    figure.suptitle(f"Last quarter of the quickstart's PPO, mean over {seeds} seeds with 95 % t-intervals", fontsize=8)
    figure.savefig(path, dpi=90, metadata={"Software": None})


def show(rows: list[dict[str, Any]]) -> None:
    print(f"\nafter {rows[0]['seeds']} seed(s)")
    for row in rows:
        gold, proxy = row["monitors/gold"], row["rewards/score_mean"]
        print(
            f"{row['variant']:16s} gold {gold['mean']:.3f} ({gold['difference']:+.3f} +- {gold['half']:.3f})  proxy {proxy['mean']:6.3f} "
            f"({proxy['difference']:+.3f} +- {proxy['half']:.3f})  KL {row['policy/kl']['mean']:5.2f}  length "
            f"{row['responses/length_mean']['mean']:5.1f}  {row['what']}",
            flush=True,
        )


def write(rows: list[dict[str, Any]]) -> None:
    (RESULTS / "paper_choices.md").write_text(as_markdown(rows), encoding="utf-8")
    plot(rows, RESULTS / "paper_choices.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--home", type=Path, default=Path("outputs"))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--only", nargs="*", help="Variants to run. The default always runs.")
    parser.add_argument("--episodes", type=int, help="Episodes per run (default: the quickstart's).")
    parser.add_argument("--plot", action="store_true", help="Draw the saved numbers again; run nothing.")
    options = parser.parse_args()
    saved = RESULTS / "paper_choices.json"
    if options.plot:
        write(json.loads(saved.read_text())["rows"])
        return
    chosen = {name: kind for name, kind in variants().items() if not options.only or name in (*options.only, "default")}
    extra = {"total_episodes": options.episodes} if options.episodes else {}
    results: dict[str, list[dict[str, float]]] = {name: [] for name in chosen}
    for seed in range(1, options.seeds + 1):
        for name, (_, fields) in chosen.items():
            step = f"{name}-{seed}"
            metrics = run_steps("paper-choices", {step: {**fields, **extra, "seed": seed}}, options.home.absolute())[step]
            results[name].append({measure: last_quarter(metrics, measure) for measure in MEASURES})
        rows = table(chosen, results)
        show(rows)
        if not options.only:
            RESULTS.mkdir(exist_ok=True)
            saved.write_text(json.dumps({"episodes": options.episodes, "rows": rows}, indent=1) + "\n")
            write(rows)


if __name__ == "__main__":
    main()
