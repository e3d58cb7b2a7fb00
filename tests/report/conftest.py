"""A hand-made run folder with everything that a report can show, and with texts that contain markup and scripts."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

EVIL = "<script>window.evil = 1</script><img src=x onerror='window.evil = 2'> & \"quotes\" </p> {{ 7 * 7 }} ]]> --> </script>"
NAMES = ("base", "sft", "aligned")


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def rate(a: str, b: str, judge: str, share: float, low: float, high: float) -> dict[str, Any]:
    return {
        "a": a,
        "b": b,
        "judge": judge,
        "win_rate": share,
        "ci_low": low,
        "ci_high": high,
        "wins": 5,
        "ties": 1,
        "n": 8,
        "samples": 8,
        "bootstrap_low": low,
        "bootstrap_high": high,
        "variance": 0.2,
        "prompts_needed": 90 if share != 0.5 else None,
        "length_controlled": {"win_rate": share, "ci_low": low, "ci_high": high, "length_effect": 0.1},
    }


def completions(number: int) -> list[dict[str, Any]]:
    """Row r: by gold, aligned is better than sft by (r - 2) / 10 (rows 0, 1: sft; row 2: a tie). The llm always prefers sft."""
    rows = []
    for row in range(number):
        scores = {"base": 0.1, "sft": 0.5, "aligned": round(0.5 + (row - 2) / 10, 3)}
        texts = {"base": f"base says {row}", "sft": f"sft says {row}", "aligned": EVIL if row == 0 else f"aligned says {row} zebra{row}"}
        if row == 1:
            del texts["base"], scores["base"]
        rows.append(
            {
                "prompt": EVIL if row == 0 else f"prompt {row}",
                "prompt_number": row,
                "sample": 0,
                "completions": texts,
                "scores": {"gold": scores},
                "preferences": {"llm": [{"a": "sft", "b": "aligned", "preference": 0.75}] if row < 6 else []},
                "tokens": dict.fromkeys(texts, 3),
                "stopped": dict.fromkeys(texts, row != 3),
                "kl": dict.fromkeys(texts, 0.5),
            }
        )
    return rows


def make_run(folder: Path, *, number: int = 8, seed: int = 7, kl_coef: float = 0.05) -> Path:
    """A finished run of a chain with every stage that the report knows."""
    candidates: dict[str, dict[str, Any]] = {
        name: {
            "model": f"toy/{name}@1",
            "digest": f"sha256:{name}",
            "scores": {"gold": 0.2 + 0.2 * index},
            "length_words": 5.0,
            "score_intervals": {"gold": [0.15 + 0.2 * index, 0.25 + 0.2 * index]},
            "distinct_2": 0.5,
            "stopped_share": 0.9,
            "perplexity": 3.0 + index,
            "bits_per_byte": 0.4 + index / 10,
            "kl": 0.7 * index,
            "kl_interval": [0.6 * index, 0.8 * index],
        }
        for index, name in enumerate(NAMES)
    }
    candidates["base"]["kl"] = 3.0
    candidates["sft"] |= {"kl": 0.0, "tasks": {"facts": {"accuracy": 0.7, "ci_low": 0.6, "ci_high": 0.8}}}
    candidates["aligned"]["tasks"] = {"facts": {"accuracy": 0.65, "ci_low": 0.55, "ci_high": 0.75}}
    best = {**candidates["sft"], "best_of": 4, "kl": 0.636, "scores": {"gold": 0.6}}
    curve = [
        {
            "n": n,
            "kl": math.log(n) - (n - 1) / n,
            "reward": {"mean": n, "ci_low": n, "ci_high": n},
            "scores": {"gold": {"mean": 0.4 + 0.1 * math.log(n), "ci_low": 0.35, "ci_high": 0.6}},
        }
        for n in (1, 2, 4)
    ]
    evaluation = {
        "verdict": "By gold, aligned beats sft.",
        "prompts": number,
        "samples_per_prompt": 1,
        "kl_reference": "sft",
        "candidates": {"base": candidates["base"], "sft": candidates["sft"], "best": best, "aligned": candidates["aligned"]},
        "win_rates": [
            rate("aligned", "sft", "gold", 0.7, 0.6, 0.8),
            rate("sft", "aligned", "gold", 0.3, 0.2, 0.4),
            rate("aligned", "base", "gold", 0.9, 0.8, 0.95),
            rate("base", "aligned", "gold", 0.1, 0.05, 0.2),
            rate("aligned", "best", "gold", 0.52, 0.4, 0.64),
            rate("best", "aligned", "gold", 0.48, 0.36, 0.6),
            rate("aligned", "sft", "llm", 0.25, 0.1, 0.45),
            rate("sft", "aligned", "llm", 0.75, 0.55, 0.9),
        ],
        "judges": [
            {"name": "gold", "kind": "reward"},
            {
                "name": "llm",
                "kind": "llm",
                "requests": 12,
                "from_cache": 3,
                "retries": 1,
                "refused": 1,
                "failed": 0,
                "cost": 0.02,
                "order_consistency": 0.8,
            },
        ],
        "agreement": {
            "units": 30,
            "alpha": 0.31,
            "annotators": {"people": {"units": 5, "votes": 15, "agreement": 0.8, "alpha": 0.6, "fleiss_kappa": 0.59, "unanimous": 0.7}},
            "pairs": [
                {
                    "a": "gold",
                    "b": "llm",
                    "n": 30,
                    "agreement": 0.5,
                    "kappa": 0.1,
                    "decided": 25,
                    "agreement_decided": 0.52,
                    "ci_low": 0.3,
                    "ci_high": 0.7,
                }
            ],
        },
        "best_of_n": {"best": curve},
        "few_shot": {"best": [{"text": EVIL, "score": 0.5}, {"text": "worse", "score": 0.1}]},
        "exclusions": [{"what": "prompts that base has no completion for", "count": 1, "of": number}],
        "cut_texts": [{"reader": "gold", "count": 3, "of": 40}],
    }
    steps: dict[str, tuple[str, dict[str, Any], dict[str, str]]] = {
        "base": ("pretraining", {"heldout_perplexity_before": 900.0, "heldout_perplexity_after": 3.1}, {}),
        "sft": ("sft", {"heldout_loss_before": 1.7, "heldout_loss_after": 1.2, "demonstrations": 100}, {"model": "toy/base@1"}),
        "taste": ("sentiment", {"heldout_accuracy": 0.9}, {}),
        "preference": (
            "reward_model",
            {
                "heldout_accuracy_before": 0.5,
                "heldout_accuracy": 0.7,
                "heldout_calibration_error": 0.02,
                "heldout_calibration": [
                    {"confidence": 0.6, "accuracy": 0.58, "count": 40},
                    {"confidence": 0.9, "accuracy": 0.8, "count": 50},
                ],
                "heldout_accuracy_by_margin": [
                    {"from": 0.0, "to": 0.5, "accuracy": 0.6, "pairs": 50},
                    {"from": 0.5, "to": None, "accuracy": 0.8, "pairs": 40},
                ],
                "heldout_accuracy_by_length": [{"better_is": "longer", "accuracy": 0.8, "pairs": 40}],
                "heldout_accuracy_by_group": {"annotator": [{"value": f"$ann_{{ {EVIL}", "accuracy": 0.7, "pairs": 30}]},
            },
            {"model": "toy/sft@1"},
        ),
        "aligned": (
            "ppo",
            {
                "score_mean_first": -0.5,
                "score_mean_last": 0.4,
                "kl_last": 2.0,
                "episodes": 640,
                "iterations": 12,
                "alarms": [
                    {
                        "name": "reward_hacking",
                        "first_iteration": 9,
                        "last_iteration": 11,
                        "iterations": 3,
                        "message": f"the monitor fell {EVIL}",
                    }
                ],
            },
            {"policy": "toy/sft@1", "reward[0].model": "toy/preference@1", "monitors[0].model": "toy/taste@1"},
        ),
        "verdict": ("evaluation", {"prompts": number}, {f"candidates.{name}": f"toy/{name}@1" for name in NAMES}),
    }
    entries = []
    for name, (stage, metrics, inputs) in steps.items():
        model = {"ref": f"toy/{name}", "digest": f"sha256:{name:0<64}"} if stage != "evaluation" else None
        config: dict[str, Any] = {"name": name, "stage": stage, "data": [{"path": "world:raw"}], "note": EVIL}
        if stage == "ppo":
            config["kl_coef"] = kl_coef
        compiled: dict[str, Any] = {"layers": 4, "graphs": 3, "seconds": 11.7, "compiled": True, "reason": ""}
        if stage != "ppo":
            compiled |= {"layers": 0, "graphs": 0, "compiled": False, "reason": "training.torch_compile is false"}
        entries.append(
            {
                "name": name,
                "stage": stage,
                "model": model,
                "version": 1 if model else None,
                "wall_seconds": 12.5,
                "reused": name == "base",
                "action": "run",
                "reason": "never completed before",
                "inputs": inputs,
                "data": {"data": "0123456789abcdef"},
                "peak_memory_bytes": 900 * 2**20,
                "seed": seed,
                "circumstances": {
                    "run": "20261123T000000Z" if name == "base" else folder.name,
                    "device": "Some CPU",
                    "processes": 1,
                    "precision": "bf16",
                    "wall_seconds": 75.0 if name == "base" else 12.5,
                    "peak_memory_bytes": 900 * 2**20,
                    "peak_gpu_memory_bytes": None,
                    **({} if stage == "evaluation" else {"compiled_layers": compiled}),
                },
                "settings": {},
                "config": config,
                "metrics": metrics,
            }
        )
        if stage in ("pretraining", "sft", "sentiment", "reward_model"):
            write_lines(folder / name / "metrics.jsonl", [{"step": at, "train/loss": 3.0 / (at + 1)} for at in range(30)])
    ppo = [
        {
            "step": at,
            "rewards/score_mean": at / 10,
            "rewards/score_std": 1.0,
            "rewards/preference": at / 10,
            "monitors/gold": 0.5 - at / 50,
            "policy/kl": at / 5,
            "policy/entropy": 1.0,
            "responses/length_mean": 20.0,
            "value/explained_variance": 0.1,
            "policy/clip_fraction": 0.1,
        }
        for at in range(12)
    ]
    write_lines(folder / "aligned" / "metrics.jsonl", ppo)
    (folder / "verdict").mkdir(parents=True, exist_ok=True)
    (folder / "verdict" / "evaluation.json").write_text(json.dumps(evaluation))
    write_lines(folder / "verdict" / "completions.jsonl", completions(number))
    tokens = {"tokens": [" aligned", " says", " 2 zebra2"], "kl": [0.5, -2.0, 4.0], "value": [0.1, 0.2, 0.3]}
    write_lines(folder / "verdict" / "tokens.jsonl", [{"row": 2, "candidate": "aligned", **tokens}])
    summary = {
        "recipe": "toy",
        "recipe_file": "recipes/toy.yaml",
        "description": EVIL,
        "seed": seed,
        "overrides": ["aligned.kl_coef=0.05"],
        "command": None,
        "started": "2026-11-24T20:38:18+00:00",
        "finished": True,
        "wall_seconds": 200.0,
        "peak_memory_bytes": 2**30,
        "environment": {
            "python": "3.11",
            "platform": "Linux",
            "cpu": "Some CPU",
            "cpu_count": 2,
            "num_processes": 1,
            "gpus": [],
            "packages": {"torch": "2.13"},
        },
        "steps": entries,
        "candidates": evaluation["candidates"],
        "win_rates": evaluation["win_rates"],
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


@pytest.fixture(scope="session")
def evil() -> str:
    """A text that would run, leave its element or be evaluated if it were not escaped."""
    return EVIL


@pytest.fixture(scope="session")
def new_run() -> Any:
    """new_run(folder, number=8, seed=7, kl_coef=0.05) -> the folder, filled."""
    return make_run


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    return make_run(tmp_path / "runs" / "toy" / "20261124T203818Z")
