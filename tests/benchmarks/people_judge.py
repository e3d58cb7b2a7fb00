"""Compares the assistant's answers by a second kind of judge: a reward model of people's votes instead of GPT-4's rankings.

    python tests/benchmarks/people_judge.py --shared ../shared/data --home outputs      after tests/benchmarks/assistant.py with this --home

The votes are PandaLM's: pairs of answers of other models to instructions, with the votes of three people for each pair. The majority
decides; ties and pairs with an empty answer are left out and counted. Two thirds of the instructions train the reward model, the others
measure its accuracy. GPT-4's rankings prefer numbered lists, and PPO learned that (docs/assistant.md). The script counts how often these
people preferred a list.

No answer is written again: the candidates are the completions of the evaluation that assistant.py ran. The win rates are also computed
separately for the prompts whose aligned answer begins with "1.", and for the others.

Time: 14 minutes of one busy core. Result: results/people_judge.json; docs/assistant.md, "A judge of another kind".
"""

from __future__ import annotations

import argparse
import gzip
import json
import re
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"
CANDIDATES = ("base", "sft", "dpo", "best-of-4", "aligned-ptx", "aligned")  # the last one is compared with each other one
TRAINED = 2 / 3  # share of the instructions


def begins_with_list(text: str) -> bool:
    return re.match(r"\s*1\.", text) is not None


def prompt_of(row: dict[str, Any]) -> str:
    """The instruction and its input, as in the prompts of the assistant's demonstrations."""
    return "\n\n".join(part for part in (row["instruction"], row["input"]) if part)


def read_pairs(file: Path) -> tuple[list[dict[str, str]], dict[str, int]]:
    """(pairs with prompt, chosen and rejected in order of the file, how many rows are left out, by reason)."""
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    pairs = []
    left_out = {"ties": 0, "an_empty_answer": 0}
    for row in rows:
        answers = [row["response_1"], row["response_2"]]
        if not row["majority"]:
            left_out["ties"] += 1
        elif not all(answer.strip() for answer in answers):
            left_out["an_empty_answer"] += 1
        else:
            chosen = answers.pop(row["majority"] - 1)
            pairs.append({"prompt": prompt_of(row), "chosen": chosen, "rejected": answers[0]})
    return pairs, left_out


def lists_preferred(pairs: list[dict[str, str]]) -> dict[str, int]:
    """How often the list won, among the pairs of one list and one other answer."""
    mixed = [pair for pair in pairs if begins_with_list(pair["chosen"]) != begins_with_list(pair["rejected"])]
    return {"won": sum(begins_with_list(pair["chosen"]) for pair in mixed), "of": len(mixed)}


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def recipe(folder: Path, prompts: Path, kinds: dict[str, Path]) -> dict[str, Any]:
    """The reward model of the votes, and one evaluation for each file of ``kinds`` (name of the evaluation -> its prompts)."""
    votes = {
        "stage": "reward_model",
        "name": "people",
        "precision": "bf16",
        "model": "assistant-cpu/sft",
        "data": {"train": str(folder / "train.jsonl"), "validation": str(folder / "validation.jsonl")},
        "lora": {"r": 16, "alpha": 32.0},
        "max_length": 320,
        "training": {"learning_rate": 3.0e-4, "epochs": 2, "batch_size": 16, "microbatch_size": 8, "warmup_fraction": 0.1},
    }
    evaluations = [
        {
            "stage": "evaluation",
            "name": name,
            "precision": "bf16",
            "candidates": {candidate: {"completions": str(folder / f"{candidate}.jsonl")} for candidate in CANDIDATES},
            "data": str(file),
            "num_prompts": sum(1 for _ in file.open(encoding="utf-8")),
            "judges": [{"model": "people", "name": "people"}],
        }
        for name, file in {"all-prompts": prompts, **kinds}.items()
    ]
    return {"name": "people-judge", "seed": 1, "steps": [votes, *evaluations]}


def prepare(shared: Path, home: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Write the files of the recipe. Returns (recipe, facts about the votes and the prompts)."""
    folder = home / "people-judge"
    pairs, left_out = read_pairs(shared / "pandalm_human" / "validation.jsonl.gz")
    instructions = list(dict.fromkeys(pair["prompt"] for pair in pairs))
    trained = set(instructions[: round(TRAINED * len(instructions))])
    write(folder / "train.jsonl", [pair for pair in pairs if pair["prompt"] in trained])
    write(folder / "validation.jsonl", [pair for pair in pairs if pair["prompt"] not in trained])
    verdict = home / "runs" / "assistant-cpu" / "latest" / "verdict" / "completions.jsonl"
    answers = [json.loads(line) for line in verdict.read_text(encoding="utf-8").splitlines()]
    for candidate in CANDIDATES:
        write(folder / f"{candidate}.jsonl", [{"prompt": row["prompt"], "completion": row["completions"][candidate]} for row in answers])
    of_kind: dict[str, list[dict[str, str]]] = {"lists": [], "no-lists": []}
    for row in answers:
        of_kind["lists" if begins_with_list(row["completions"]["aligned"]) else "no-lists"].append({"prompt": row["prompt"]})
    kinds = {name: write(folder / f"{name}.jsonl", rows) for name, rows in of_kind.items()}
    prompts = write(folder / "prompts.jsonl", [{"prompt": row["prompt"]} for row in answers])
    facts = {
        "pairs": len(pairs),
        "left_out": left_out,
        "lists_preferred": lists_preferred(pairs),
        **{name: len(rows) for name, rows in of_kind.items()},
    }
    return recipe(folder, prompts, kinds), facts


def main() -> None:
    import stages

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, required=True, help="folder with pandalm_human")
    parser.add_argument("--home", type=Path, default=Path("outputs"))
    chosen = parser.parse_args()
    home = chosen.home.absolute()
    content, facts = prepare(chosen.shared.absolute(), home)
    path = home / "people-judge" / "people-judge.yaml"
    path.write_text(json.dumps(content, indent=1), encoding="utf-8")  # JSON is YAML
    run = stages.run(path, {}, home)
    rows = {}
    for name in ("all-prompts", "lists", "no-lists"):
        evaluation = json.loads((Path(run.folder) / name / "evaluation.json").read_text(encoding="utf-8"))
        rows[name] = [row for row in evaluation["win_rates"] if row["a"] == "aligned" or {row["a"], row["b"]} <= {"sft", "base", "dpo"}]
    metrics = run.metrics["people"]
    made = {**facts, "reward_model": metrics, "win_rates": rows}
    (RESULTS / "people_judge.json").write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(facts))
    print({key: value for key, value in metrics.items() if "accuracy" in key})
    for name, compared in rows.items():
        for row in compared:
            interval = f"{row['win_rate']:.2f} ({row['ci_low']:.2f} to {row['ci_high']:.2f})"
            print(f"{name:12s} {row['a']:12s} over {row['b']:12s} {interval} n={row['n']}")


if __name__ == "__main__":
    main()
