"""Evaluates published judgements by people and by GPT-4, and compares a small reward model with them.

    python tests/benchmarks/real_judgements.py [--home DIR] [--override step.field=value ...]

The data are in ../shared/data: pandalm_human (pairs of answers of five models, three human votes for each), alpaca_eval_ranking (answers of
eight models, scored by GPT-4-turbo), and instructions. The script

1. writes their completions and judgements in the formats that an evaluation step reads;
2. trains a small language model on the instructions, and a reward model on GPT-4's rankings of other prompts;
3. evaluates: how often people agree with each other, which models people prefer, and how often the reward model and the rule "the longer
   answer is better" agree with people and with GPT-4.

Time: minutes on two CPU cores. Result: printed, and a report in the run folder; docs/results.md, section "Real judgements".
"""

from __future__ import annotations

import argparse
import gzip
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
SHARED = REPOSITORY.parent / "shared" / "data"
Row = dict[str, Any]

RECIPE = """
name: real-judgements
description: A small reward model compared with people and with GPT-4.
seed: 1
steps:
  - stage: pretraining
    name: base
    architecture:
      {type: llama, hidden_size: 192, intermediate_size: 512, num_hidden_layers: 3, num_attention_heads: 6, tie_word_embeddings: true}
    tokenizer: {vocab_size: 4096}
    block_size: 256
    data: {train: texts.jsonl}
    training: {learning_rate: 3.0e-3, epochs: 2, batch_size: 16, microbatch_size: 16, warmup_fraction: 0.03}

  - stage: reward_model
    name: preference
    model: base
    max_length: 384
    data: {train: SHARED/alpaca_eval_ranking/train.jsonl.gz, validation: SHARED/alpaca_eval_ranking/validation.jsonl.gz}
    training: {learning_rate: 3.0e-4, epochs: 1, batch_size: 8, microbatch_size: 4}

  - stage: evaluation
    name: people
    candidates: PANDALM
    data: pandalm-prompts.jsonl
    num_prompts: null
    samples_per_prompt: 4
    judges:
      - {judgements: pandalm-votes.jsonl, name: people}
      - {model: preference, name: preference}
      - {function: "lengths:longer", name: longer}

  - stage: evaluation
    name: gpt4
    candidates: ALPACA
    data: alpaca-prompts.jsonl
    num_prompts: null
    judges:
      - {judgements: alpaca-scores.jsonl, name: gpt4}
      - {model: preference, name: preference}
      - {function: "lengths:longer", name: longer}
"""


def read(name: str) -> list[Row]:
    with gzip.open(SHARED / name, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def write(path: Path, rows: list[Row]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def prompt_of(row: Row) -> str:
    return f"{row['instruction']}\n\n{row['input']}" if row["input"].strip() else row["instruction"]


def write_pandalm(folder: Path) -> list[str]:
    """Write prompts, completions and votes of pandalm_human. If a model answered a prompt twice, it has two samples.

    Returns the names of the models.
    """
    completions: dict[str, dict[tuple[str, int], str]] = {}
    votes = []
    for row in read("pandalm_human/validation.jsonl.gz"):
        prompt = prompt_of(row)
        given = {row["model_1"]: row["response_1"], row["model_2"]: row["response_2"]}
        sample = 0
        while any(completions.get(model, {}).get((prompt, sample), text) != text for model, text in given.items()):
            sample += 1
        for model, text in given.items():
            completions.setdefault(model, {})[prompt, sample] = text
        for annotator, vote in enumerate(row["annotators"]):
            about = {"prompt": prompt, "sample": sample, "a": row["model_1"], "b": row["model_2"]}
            votes.append({**about, "vote": ("tie", "a", "b")[vote], "annotator": f"annotator {annotator + 1}"})
    for model, texts in completions.items():
        write(folder / f"pandalm-{model}.jsonl", [{"prompt": p, "sample": s, "completion": text} for (p, s), text in sorted(texts.items())])
    write(folder / "pandalm-prompts.jsonl", [{"prompt": prompt} for prompt in dict.fromkeys(vote["prompt"] for vote in votes)])
    write(folder / "pandalm-votes.jsonl", votes)
    return sorted(completions)


def write_alpaca(folder: Path) -> list[str]:
    """Write prompts, completions and GPT-4's scores of the held-out rows of alpaca_eval_ranking.

    Returns the names of the models, the model with the lowest mean score first.
    """
    rows = read("alpaca_eval_ranking/validation.jsonl.gz")
    completions: dict[str, list[Row]] = {}
    scores = []
    for row in rows:
        for model, text, score in zip(row["models"], row["responses"], row["scores"], strict=True):
            completions.setdefault(model, []).append({"prompt": row["prompt"], "completion": text})
            scores.append({"prompt": row["prompt"], "candidate": model, "score": score})
    for model, texts in completions.items():
        write(folder / f"alpaca-{model}.jsonl", texts)
    write(folder / "alpaca-prompts.jsonl", [{"prompt": row["prompt"]} for row in rows])
    write(folder / "alpaca-scores.jsonl", scores)
    means = {model: sum(row["score"] for row in scores if row["candidate"] == model) for model in completions}
    return sorted(completions, key=lambda model: means[model] / len(completions[model]))


def write_texts(folder: Path) -> None:
    """Write the instructions of Alpaca and Dolly, each with its answer, as documents for the small language model."""
    rows = read("instructions/train.jsonl.gz") + read("dolly/train.jsonl.gz")
    write(folder / "texts.jsonl", [{"text": f"{prompt_of(row)}\n\n{row['output']}"} for row in rows])


def write_recipe(folder: Path) -> Path:
    """Write the recipe and all files that it reads. Returns the path of the recipe."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "lengths.py").write_text("def longer(prompts, completions): return [float(len(text)) for text in completions]\n")
    write_texts(folder)
    text = RECIPE.replace("SHARED", str(SHARED))
    for word, prefix, names in (("PANDALM", "pandalm", write_pandalm(folder)), ("ALPACA", "alpaca", write_alpaca(folder))):
        text = text.replace(word, "{" + ", ".join(f"{name}: {{completions: {prefix}-{name}.jsonl}}" for name in names) + "}")
    path = folder / "real-judgements.yaml"
    path.write_text(text)
    return path


def show(run: Path) -> None:
    """Print the numbers of docs/results.md."""
    for step in ("people", "gpt4"):
        evaluation = json.loads((run / step / "evaluation.json").read_text())
        judge = evaluation["judges"][0]["name"]
        print(f"\n{step}: {evaluation['prompts']} prompts")
        for name, agreement in evaluation["agreement"]["annotators"].items():
            print(
                f"  {name}: {agreement['units']} comparisons, {agreement['votes']} votes, "
                + ", ".join(f"{key} {agreement[key]:.3f}" for key in ("agreement", "unanimous", "alpha", "fleiss_kappa"))
            )
        for pair in evaluation["agreement"]["pairs"]:
            print(
                f"  {pair['a']} and {pair['b']}: {pair['agreement_decided']:.3f} ({pair['ci_low']:.3f} to {pair['ci_high']:.3f}) of "
                f"{pair['decided']} without ties, kappa {pair['kappa']:.3f}"
            )
        names = list(evaluation["candidates"])
        rates = {(row["a"], row["b"]): row for row in evaluation["win_rates"] if row["judge"] == judge}
        for a in names:
            others = [f"{rates[a, b]['win_rate']:.3f}" if (a, b) in rates else "  -  " for b in names]
            print(f"  {a:24s}", " ".join(others))
    summary = json.loads((run / "summary.json").read_text())
    for step in summary["steps"]:
        if step["name"] == "preference":
            metrics = step["metrics"]
            print(
                f"\nreward model: held-out accuracy {metrics['heldout_accuracy']:.3f} ({metrics['heldout_ci_low']:.3f} to "
                f"{metrics['heldout_ci_high']:.3f}) of {metrics['heldout_pairs']} pairs"
            )
    print(f"wall {summary['wall_seconds']:.0f} s; {run / 'report.html'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--home", type=Path, default=Path("outputs"))
    parser.add_argument("--override", nargs="*", default=[])
    chosen = parser.parse_args()
    home = chosen.home.absolute()
    recipe = write_recipe(home / "real-judgements")
    command = [sys.executable, "-m", "stages", "run", recipe.name, *chosen.override, "--home", str(home)]
    subprocess.run(command, cwd=recipe.parent, check=True)
    show(home / "runs" / "real-judgements" / "latest")


if __name__ == "__main__":
    main()
