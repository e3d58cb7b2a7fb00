"""Kills a small chain of all stages at random moments and starts it again until it finishes ("a storm").

    python tests/benchmarks/killstorm.py                         at least 50 kills (SIGKILL of all processes of the run)
    python tests/benchmarks/killstorm.py --kills 12 --processes 2

Each storm must end with the same models as an undisturbed run, bit for bit. After every kill the registry must be valid. New storms start
until there were as many kills as --kills says. The exit status is 0 if all models were equal.

Time: about 10 minutes. Result: printed; docs/reliability.md, paragraph "Random kills".
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from stages.registry.ledger import Registry

REPOSITORY = Path(__file__).resolve().parents[2]

RECIPE = """
name: storm
seed: 3
steps:
  - stage: pretraining
    name: base
    architecture: {type: llama, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 1, num_attention_heads: 2}
    tokenizer: {vocab_size: 400}
    block_size: 64
    precision: fp32
    checkpoint_seconds: 0.2
    data: {train: {path: "world:raw", limit: 400}, validation: {path: "world:raw/validation", limit: 20}}
    training: {batch_size: 8, microbatch_size: 8}
  - stage: sft
    name: sft
    model: base
    precision: fp32
    packing: true
    max_length: 192
    checkpoint_seconds: 0.2
    template: "Request: {prompt}\\nReview:"
    data: {train: {path: "world:demonstrations", limit: 200}, validation: {path: "world:demonstrations/validation", limit: 16}}
    training: {epochs: 2, batch_size: 4, microbatch_size: 4}
  - stage: sentiment
    name: taste
    precision: fp32
    checkpoint_seconds: 0.2
    architecture: {type: distilbert, dim: 32, hidden_dim: 64, n_layers: 1, n_heads: 2}
    tokenizer: {vocab_size: 300}
    max_length: 64
    masked: {training: {epochs: 1, batch_size: 8, microbatch_size: 8}}
    data: {train: {path: "world:reviews", limit: 128}, validation: {path: "world:reviews/validation", limit: 32}}
    training: {learning_rate: 1.0e-3, epochs: 1, batch_size: 8, microbatch_size: 8}
  - stage: reward_model
    name: preference
    model: sft
    lora: {r: 4, dropout: 0.1}
    precision: fp32
    checkpoint_seconds: 0.2
    data: {train: {path: "world:comparisons", limit: 64}, validation: {path: "world:comparisons/validation", limit: 8}}
    training: {learning_rate: 1.0e-3, batch_size: 4, microbatch_size: 4}
  - stage: ppo
    name: aligned
    policy: sft
    precision: fp32
    reward: [{model: preference}, {model: taste, label: positive, weight: 0.1}]
    data: "world:prompts"
    generation: {max_new_tokens: 12}
    total_episodes: 320
    rollout_batch_size: 32
    minibatch_size: 8
    microbatch_size: 8
    ppo_epochs: 2
    ema_decay: 0.9
    kl_target: 1.0
    checkpoint_seconds: 0.2
  - stage: dpo
    name: direct
    model: sft
    lora: {r: 4, dropout: 0.1}
    precision: fp32
    checkpoint_seconds: 0.2
    data: {train: {path: "world:comparisons", limit: 48}, validation: {path: "world:comparisons/validation", limit: 8}}
    pairs_per_prompt: 2
    training: {learning_rate: 1.0e-3, batch_size: 4, microbatch_size: 4}
  - stage: evaluation
    name: verdict
    precision: fp32
    candidates: {base: base, sft: sft, direct: direct, aligned: aligned}
    data: "world:prompts/heldout"
    num_prompts: 8
    generation: {max_new_tokens: 12}
    judges: [{function: "stages.corpora.world.gold:score_batch", name: gold}, {model: preference}]
"""


def command(recipe: Path, home: Path, processes: int) -> list[str]:
    launcher = [] if processes == 1 else ["-m", "stages.process.launching", "--cpu", "--num_processes", str(processes)]
    return [sys.executable, *launcher, "-m", "stages", "run", str(recipe), "--home", str(home)]


def run_or_kill(recipe: Path, home: Path, processes: int, seconds: float | None) -> tuple[bool, str]:
    """Run the chain and kill it after ``seconds``. Returns whether it finished before, and the step that was running when it was killed."""
    log = home.with_suffix(".log")
    with log.open("w") as output:
        process = subprocess.Popen(
            command(recipe, home, processes), cwd=recipe.parent, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return False, _last_step(log)
    if process.returncode != 0:
        raise SystemExit(f"the chain ended with status {process.returncode}:\n{log.read_text()[-3000:]}")
    return True, ""


def _last_step(log: Path) -> str:
    """The step that was running: its heading is the last one in the log."""
    steps = [line.split(" ")[0] for line in log.read_text().splitlines() if "): run," in line or "): resume," in line]
    return steps[-1] if steps else "starting"


def digests(home: Path) -> dict[str, str]:
    summary = json.loads((home / "runs" / "storm" / "latest" / "summary.json").read_text())
    return {step["name"]: step["model"]["digest"] for step in summary["steps"] if step["model"]}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--kills", type=int, default=50)
    options.add_argument("--processes", type=int, default=1)
    options.add_argument("--seed", type=int, default=0)
    given = options.parse_args()
    draw = random.Random(given.seed)
    with tempfile.TemporaryDirectory(prefix="killstorm-") as folder:
        # The runs use a copy of the code: if the code changed during the benchmark, all steps would run again.
        for name in ("stages", "data"):
            shutil.copytree(REPOSITORY / name, Path(folder, name))
        os.environ["PYTHONPATH"] = folder
        recipe = Path(folder, "storm.yaml")
        recipe.write_text(RECIPE)
        began = time.monotonic()
        run_or_kill(recipe, Path(folder, "undisturbed"), given.processes, None)
        undisturbed_seconds = time.monotonic() - began
        expected = digests(Path(folder, "undisturbed"))
        print(f"undisturbed run: {undisturbed_seconds:.0f} s, {len(expected)} models", flush=True)
        killed_in: collections.Counter[str] = collections.Counter()
        kills, storms, differing = 0, 0, 0
        while kills < given.kills:
            storms += 1
            home = Path(folder, f"storm-{storms}")
            while True:
                done, step_name = run_or_kill(recipe, home, given.processes, draw.uniform(1.0, 0.6 * undisturbed_seconds))
                if not done:
                    kills += 1
                    killed_in[step_name] += 1
                registry = Registry(home / "registry")
                invalid = {record.ref: problems for record in registry.records() if (problems := registry.verify(record.ref))}
                if invalid:
                    raise SystemExit(f"after {kills} kills the registry is not valid: {invalid}")
                if done:
                    break
            same = digests(home) == expected
            differing += not same
            print(f"storm {storms}: {kills} kills so far; models {'equal' if same else 'DIFFER: ' + str(digests(home))}", flush=True)
        print(f"{kills} kills in {storms} storms; killed steps: {dict(killed_in.most_common())}; storms with other models: {differing}")
        sys.exit(differing > 0)


if __name__ == "__main__":
    main()
