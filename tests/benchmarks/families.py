"""Runs every check for every model family. With ``--chain``, every decoder also runs SFT, reward model, PPO and evaluation.

    python tests/benchmarks/families.py [--chain] [--only NAME ...] [--out tests/benchmarks/results]

A cell of the table is one of these:

- the largest relative difference to plain transformers (eager attention, no cache, one row at a time, fp32),
- ``ok`` for a chain that finished,
- ``refused: ...`` for an error that the catalogue of families expects,
- ``FAILS: ...`` for anything else. Then the exit status is 1.

Time: half an hour on two cores with ``--chain``. Result: families.md and families.json in the folder of --out; docs/families.md.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests" / "families")]

from catalogue import CLASSIFIERS, DECODERS, TEXTS, Family, save  # noqa: E402
from checks import CLASSIFIER_CHECKS, DECODER_CHECKS, EXACT, TOLERANCE  # noqa: E402
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification  # noqa: E402

from stages.errors import StagesError  # noqa: E402

CHAINS = {"chain, full": {}, "chain, LoRA": {"lora": {"r": 2}}, "chain, LoRA on nf4": {"lora": {"r": 2}, "quantization": "nf4"}}


def check_family(family: Family, folder: Path, checks: dict[str, Any]) -> dict[str, str]:
    """Run the checks. Returns the cell of each (see the module's docstring)."""
    cells = {}
    for name, check in checks.items():
        with tempfile.TemporaryDirectory() as scratch:
            try:
                largest = check(family, folder, Path(scratch))
                cells[name] = f"{largest:.0e}" if largest < TOLERANCE.get(name, EXACT) else f"FAILS: differs by {largest:.1e}"
            except StagesError as error:
                expected = family.without.get(name)
                cells[name] = f"refused: {expected}" if expected is not None and expected in str(error) else f"FAILS: {error}"
            except Exception as error:  # one family must not stop the table of all families
                cells[name] = f"FAILS: {type(error).__name__}: {error}"
    return cells


def run_chain(family: Family, folder: Path, how: dict[str, Any]) -> str:
    """Run SFT, reward model, PPO and evaluation through the command line. Returns the cell."""
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        (work / "recipe.json").write_text(json.dumps(recipe(folder, work, how)), encoding="utf-8")
        command = [sys.executable, "-m", "stages", "run", str(work / "recipe.json"), "--home", str(work / "home")]
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return "ok"
    message = (done.stderr or done.stdout).strip().replace("\n", " ")[-300:]
    expected = family.without.get("LoRA on nf4") if "quantization" in how else None
    return f"refused: {expected}" if done.returncode == 2 and expected is not None and expected in message else f"FAILS: {message}"


def recipe(folder: Path, work: Path, how: dict[str, Any]) -> dict[str, Any]:
    """A chain whose steps make two optimizer steps each. The caller writes it as JSON, which is YAML."""
    halves = [(text[: len(text) // 2].rstrip(), text[len(text) // 2 :].strip()) for text in TEXTS]
    rows = {
        "sft": [{"prompt": prompt, "completion": completion} for prompt, completion in halves],
        "pairs": [
            {"prompt": prompt, "chosen": completion, "rejected": other}
            for (prompt, completion), (_, other) in zip(halves, [*halves[7:], *halves[:7]], strict=True)
        ],
        "prompts": [{"prompt": prompt} for prompt, _ in halves[:16]],
    }
    for name, lines in rows.items():
        (work / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    lora = {"lora": how["lora"]} if "lora" in how else {}

    def model(ref: str) -> dict[str, Any]:
        return {"ref": ref, **({"quantization": how["quantization"]} if "quantization" in how else {})}

    training = {"max_steps": 2, "batch_size": 8, "microbatch_size": 8}
    generation, prompts = {"max_new_tokens": 6}, str(work / "prompts.jsonl")
    sizes = {"total_episodes": 16, "rollout_batch_size": 8, "minibatch_size": 8, "microbatch_size": 8}
    sft = {"stage": "sft", "name": "sft", "model": model(str(folder)), "data": {"train": str(work / "sft.jsonl")}, "training": training}
    reward = {"stage": "reward_model", "name": "reward", "model": model("sft"), "data": {"train": str(work / "pairs.jsonl")}}
    ppo = {"stage": "ppo", "name": "ppo", "policy": model("sft"), "reward": [{"model": model("reward")}], "data": prompts, **sizes}
    evaluation = {
        "stage": "evaluation",
        "name": "evaluation",
        "data": prompts,
        "generation": generation,
        "candidates": {"sft": {"model": model("sft")}, "ppo": {"model": model("ppo")}},
        "judges": [{"model": model("reward")}],
    }
    steps = [{**sft, **lora}, {**reward, "training": training, **lora}, {**ppo, "generation": generation, **lora}, evaluation]
    return {"name": "families", "seed": 1, "steps": steps}


def table(results: dict[str, dict[str, str]]) -> str:
    columns = list(dict.fromkeys(column for cells in results.values() for column in cells))
    lines = [f"| family | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for name, cells in results.items():
        lines.append(f"| {name} | {' | '.join(cells.get(column, '').replace('|', '/') for column in columns)} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[], help="Names of families (default: all).")
    parser.add_argument("--chain", action="store_true", help="Also run all stages with each decoder: full, LoRA, LoRA on nf4.")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    groups = ((DECODERS, DECODER_CHECKS, AutoModelForCausalLM), (CLASSIFIERS, CLASSIFIER_CHECKS, AutoModelForSequenceClassification))
    tables: list[dict[str, dict[str, str]]] = []
    for families, checks, auto in groups:
        results: dict[str, dict[str, str]] = {}
        for name, family in families.items():
            if arguments.only and name not in arguments.only:
                continue
            began = time.monotonic()
            with tempfile.TemporaryDirectory() as folder:
                save(family, Path(folder), auto)
                results[name] = check_family(family, Path(folder), checks)
                if arguments.chain and families is DECODERS:
                    results[name] |= {column: run_chain(family, Path(folder), how) for column, how in CHAINS.items()}
            sys.stdout.write(f"{name} ({time.monotonic() - began:.0f} s): {results[name]}\n")
            sys.stdout.flush()
        tables.append(results)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "families.json").write_text(json.dumps({"decoders": tables[0], "classifiers": tables[1]}, indent=1), encoding="utf-8")
    (arguments.out / "families.md").write_text("\n".join(table(results) for results in tables if results), encoding="utf-8")
    return int(any(cell.startswith("FAILS") for results in tables for cells in results.values() for cell in cells.values()))


if __name__ == "__main__":
    raise SystemExit(main())
