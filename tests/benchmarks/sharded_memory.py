"""Peak memory of PPO on one process, and on two processes with FSDP2 with all models or only the policy gathered for a rollout.

    python tests/benchmarks/sharded_memory.py

Policy, reference, value network and reward model are four separate Llama models with random weights (fp32, full fine-tuning). The row "all
gathered" is how Tristage worked at first: every process had all models unsharded during a rollout. In the next row the reward model is not
sharded. Memory is the peak of the first process minus that of a process that has only imported the program. MALLOC_MMAP_THRESHOLD_ makes
glibc return freed tensors to the system. Without it, the peak is mostly freed memory.

Time: about 3 minutes on 2 idle cores. Result: printed as a table; docs/processes.md.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from scale import idle_memory, make_model
from transformers import AutoTokenizer

from stages.models.heads import RewardModel

REPOSITORY = Path(__file__).resolve().parents[2]
SHARDED = ["-m", "stages.process.launching", "--config_file", str(REPOSITORY / "recipes" / "accelerate" / "fsdp2.yaml"), "--cpu"]
REWARD_NOT_SHARDED = """\
import runpy

import stages.ppo.loop as loop

loop.PPORun._shard = lambda run, judges: None
runpy.run_module("stages", run_name="__main__")
"""
ALL_GATHERED = (
    """\
import stages.ppo.loop as loop
from stages.models.sharding import unsharded

collect = loop.collect


def gathered(roles, *arguments, **options):
    with unsharded(*roles.models()):
        return collect(roles, *arguments, **options)


loop.collect = gathered
"""
    + REWARD_NOT_SHARDED
)
ROWS = {
    "one process": ["-m", "stages"],
    "two processes, all gathered": [*SHARDED, "--num_processes", "2", "-m", "all_gathered"],
    "two processes, policy gathered, reward model not sharded": [*SHARDED, "--num_processes", "2", "-m", "reward_not_sharded"],
    "two processes, policy gathered": [*SHARDED, "--num_processes", "2", "-m", "stages"],
}


def write_recipe(folder: Path, width: int, layers: int) -> int:
    """Write models, data and recipe into ``folder``. Returns the number of parameters of one model."""
    parameters = make_model(folder / "model", width=width, layers=layers)
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"{number:03d} prompt"}) + "\n" for number in range(64)))
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    RewardModel.from_language_model(str(folder / "model"), dtype=torch.float32).save(folder / "judge", tokenizer)
    (folder / "reward_not_sharded.py").write_text(REWARD_NOT_SHARDED)
    (folder / "all_gathered.py").write_text(ALL_GATHERED)
    step = {
        "stage": "ppo",
        "name": "aligned",
        "precision": "fp32",
        "policy": "model",
        "value": "policy",
        "data": "prompts.jsonl",
        "reward": [{"model": "judge"}],
        "generation": {"max_new_tokens": 8, "ignore_eos": True},
        "total_episodes": 16,
        "rollout_batch_size": 8,
        "minibatch_size": 8,
        "microbatch_size": 4,
        "ppo_epochs": 1,
        "publish_value": False,
    }
    (folder / "memory.yaml").write_text(f"name: memory\nsteps:\n  - {json.dumps(step)}\n")
    return parameters


def peak_of(folder: Path, home: str, launcher: list[str]) -> int:
    """Peak resident bytes of the first process of one run."""
    environment = {**os.environ, "PYTHONPATH": f"{REPOSITORY}:{folder}", "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "200000"}
    command = [sys.executable, *launcher, "run", "memory.yaml", "--home", home]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(done.stdout[-1000:] + done.stderr[-3000:])
    return json.loads((folder / home / "runs" / "memory" / "latest" / "summary.json").read_text())["peak_memory_bytes"]


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--width", type=int, default=512)
    options.add_argument("--layers", type=int, default=8)
    given = options.parse_args()
    idle = idle_memory()
    with tempfile.TemporaryDirectory(prefix="sharded-") as name:
        folder = Path(name)
        parameters = write_recipe(folder, given.width, given.layers)
        print(f"four models of {parameters / 1e6:.0f} M parameters ({parameters * 4 / 2**20:.0f} MiB each)\n")
        print("| run | peak memory of a process, MiB |\n|---|---:|", flush=True)
        for number, (row, launcher) in enumerate(ROWS.items()):
            print(f"| {row} | {(peak_of(folder, f'home{number}', launcher) - idle) / 2**20:.0f} |", flush=True)


if __name__ == "__main__":
    main()
