"""Draws figure 1 of InstructGPT from a run of the miniature: win rate against the largest SFT model, by size and kind of model.

    ./launch.sh recipes/instructgpt-miniature.yaml
    python tests/benchmarks/figure1.py outputs/runs/instructgpt-miniature/latest/summary.json figure1.png

The script prints the table of win rates. It also prints one line for each order of the paper (for example, PPO is better than SFT):
whether the run shows this order, and the intervals.

Time: 57 minutes on one core for the recipe, then seconds. Result: the picture; docs/results.md, section "InstructGPT in miniature".
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

KINDS = {"base": "base", "prompted": "base, prompted", "sft": "SFT", "ppo": "PPO", "ptx": "PPO-ptx"}
BASELINE = "sft-l"


def non_embedding_parameters(registry: Path, ref: str) -> int:
    """Number of weights of a registered language model without its embedding. The output layer is tied to it and not counted either."""
    from safetensors import safe_open

    name, _, version = ref.partition("@")
    total = 0
    for file in (registry / "models" / name / version / "model").glob("*.safetensors"):
        with safe_open(file, "pt") as weights:
            for key in weights.keys():  # noqa: SIM118  (safe_open is no mapping)
                if "embed_tokens" not in key and "lm_head" not in key:
                    size = 1
                    for length in weights.get_slice(key).get_shape():
                        size *= length
                    total += size
    return total


def rates(summary: dict[str, Any], judge: str) -> dict[str, dict[str, float]]:
    """Win rate and interval of each candidate against the baseline. The baseline's win rate against itself is one half by definition."""
    by_policy = {row["a"]: row for row in summary["win_rates"] if row["b"] == BASELINE and row["judge"] == judge}
    return {**by_policy, BASELINE: {"win_rate": 0.5, "ci_low": 0.5, "ci_high": 0.5}}


def with_interval(rate: dict[str, float]) -> str:
    """A win rate with its interval, as text."""
    return f"{rate['win_rate']:.2f} ({rate['ci_low']:.2f}-{rate['ci_high']:.2f})"


def sizes_of(summary: dict[str, Any]) -> list[str]:
    """Suffixes of the candidates, in the recipe's order: s, m, l."""
    return list(dict.fromkeys(name.rpartition("-")[2] for name in summary["candidates"]))


def claims(summary: dict[str, Any], judge: str) -> list[tuple[str, bool, str]]:
    """(claim, whether the run shows it, the numbers): the order at every size, and the smallest PPO against the largest base model."""
    pairs = {(row["a"], row["b"]): row for row in summary["win_rates"] if row["judge"] == judge}
    sizes = sizes_of(summary)
    rows = []
    for size in sizes:
        for better, worse in (("prompted", "base"), ("sft", "prompted"), ("ppo", "sft"), ("ptx", "sft")):
            row = pairs[f"{better}-{size}", f"{worse}-{size}"]
            rows.append((f"{better}-{size} > {worse}-{size}", row["ci_low"] > 0.5, with_interval(row)))
    against = rates(summary, judge)
    small, large = against[f"ppo-{sizes[0]}"], against[f"base-{sizes[-1]}"]
    rows.append(
        (
            f"ppo-{sizes[0]} above base-{sizes[-1]}, intervals disjoint",
            small["ci_low"] > large["ci_high"],
            f"{small['ci_low']:.3f} against {large['ci_high']:.3f}",
        )
    )
    return rows


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("summary", type=Path)
    arguments.add_argument("picture", type=Path)
    arguments.add_argument("--judges", nargs="+", default=["gold", "held-out"])
    chosen = arguments.parse_args()
    summary = json.loads(chosen.summary.read_text())
    registry = chosen.summary.resolve().parents[3] / "registry"
    sizes = sizes_of(summary)
    parameters = {size: non_embedding_parameters(registry, summary["candidates"][f"base-{size}"]["model"]) for size in sizes}

    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(chosen.judges), figsize=(4.6 * len(chosen.judges), 3.6), sharey=True, layout="constrained")
    for judge, panel in zip(chosen.judges, panels, strict=True):
        against = rates(summary, judge)
        for kind, label in KINDS.items():
            rows = [against[f"{kind}-{size}"] for size in sizes]
            means = [row["win_rate"] for row in rows]
            bars = [[row["win_rate"] - row["ci_low"] for row in rows], [row["ci_high"] - row["win_rate"] for row in rows]]
            panel.errorbar([parameters[size] for size in sizes], means, yerr=bars, marker="o", capsize=3, label=label)
        panel.set(xscale="log", xlabel="parameters without the embedding", title=f"judge: {judge}", ylim=(0, 1))
        panel.axhline(0.5, color="grey", linewidth=0.8, linestyle=":")
        panel.grid(alpha=0.3)
        print(f"\n{judge}: win rate against {BASELINE} (95 % interval)\n")
        print(f"| | {' | '.join(f'{parameters[size] / 1e6:.2g} M' for size in sizes)} |")
        print("|---" * (1 + len(sizes)) + "|")
        for kind, label in KINDS.items():
            print(f"| {label} | {' | '.join(with_interval(against[f'{kind}-{size}']) for size in sizes)} |")
        print()
        for claim, is_shown, numbers in claims(summary, judge):
            print(f"{'yes' if is_shown else 'NO '}  {claim}: {numbers}")
    panels[0].set_ylabel(f"win rate against {BASELINE}")
    panels[0].legend(fontsize="small")
    figure.savefig(chosen.picture, dpi=130)


if __name__ == "__main__":
    main()
