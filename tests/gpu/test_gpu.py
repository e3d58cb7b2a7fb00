"""Tests on one GPU, and on several with each shipped accelerate config. Skipped without GPUs.

.venv/bin/python -m pytest -m gpu tests/gpu
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from stages.registry.ledger import Registry

REPOSITORY = Path(__file__).resolve().parents[2]
GPUS = torch.cuda.device_count()

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(GPUS == 0, reason="needs a CUDA device"), pytest.mark.timeout(900)]
several = pytest.mark.skipif(GPUS < 2, reason="needs two CUDA devices")

SFT = {
    "stage": "sft",
    "name": "sft",
    "data": {"train": "world:demonstrations"},
    "training": {"max_steps": 12, "batch_size": 8, "microbatch_size": 2, "adam_epsilon": 0.01},
}
REWARD = {
    "stage": "reward_model",
    "name": "preference",
    "model": "sft",
    "data": {"train": {"path": "world:comparisons", "limit": 64}},
    "training": {"batch_size": 8, "microbatch_size": 2, "adam_epsilon": 0.01},
}
PPO = {
    "stage": "ppo",
    "name": "aligned",
    "policy": "sft",
    "reward": [{"model": "preference"}],
    "data": "world:prompts",
    "generation": {"max_new_tokens": 16},
    "total_episodes": 64,
    "rollout_batch_size": 16,
    "minibatch_size": 8,
    "microbatch_size": 4,
    "training": {"adam_epsilon": 0.01},
}


@pytest.fixture
def recipe(tmp_path: Path, tiny_llama_folder: Path) -> Any:
    def write(*steps: dict[str, Any], **fields: Any) -> Path:
        path = tmp_path / "gpu.yaml"
        written = [{**step, **fields} for step in steps]
        path.write_text("name: gpu\nsteps:\n" + "".join(f"  - {json.dumps(step)}\n" for step in written))
        return path

    return lambda *steps, **fields: write({**SFT, "model": str(tiny_llama_folder)}, *steps, **fields)


def run(recipe: Path, home: Path, *launcher: str) -> dict[str, Any]:
    command = [sys.executable, *launcher, "-m", "stages", "run", str(recipe), "--home", str(home)]
    done = subprocess.run(
        command, cwd=REPOSITORY, env={**os.environ, "PYTHONPATH": str(REPOSITORY)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return json.loads((home / "runs" / "gpu" / "latest" / "summary.json").read_text())


def config(name: str, processes: int = 2) -> tuple[str, ...]:
    file = REPOSITORY / "recipes" / "accelerate" / f"{name}.yaml"
    return ("-m", "stages.process.launching", "--config_file", str(file), "--num_processes", str(processes))


@pytest.mark.parametrize("fields", [{"precision": "fp32"}, {"precision": "bf16"}, {"lora": {"r": 4}}], ids=["fp32", "bf16", "lora"])
def test_the_three_stages_on_one_gpu(recipe: Any, tmp_path: Path, fields: dict[str, Any]) -> None:
    summary = run(recipe(REWARD, PPO, **fields), tmp_path / "home")
    assert summary["finished"] and summary["environment"]["gpus"]
    registry = Registry(tmp_path / "home" / "registry")
    assert [registry.verify(f"gpu/{name}") for name in ("sft", "preference", "aligned")] == [[], [], []]


def test_quantized_weights_with_adapters(recipe: Any, tmp_path: Path, tiny_llama_folder: Path) -> None:
    model = {"ref": str(tiny_llama_folder), "quantization": "nf4"}
    run(recipe(model=model, lora={"r": 4}, precision="bf16"), tmp_path / "home")


@several
@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_two_gpus_compute_the_updates_of_one(recipe: Any, tmp_path: Path, name: str) -> None:
    from safetensors.torch import load_file

    path = recipe(REWARD, PPO, precision="fp32")
    run(path, tmp_path / "one")
    summary = run(path, tmp_path / "two", *config(name))
    assert summary["environment"]["num_processes"] == 2 and summary["environment"]["sharded"] == (name == "fsdp2")
    for step in ("sft", "preference"):
        folders = [Registry(tmp_path / home / "registry").get(f"gpu/{step}").path for home in ("one", "two")]
        one, two = (load_file(folder / "model.safetensors") for folder in folders)
        for weight, expected in one.items():
            torch.testing.assert_close(two[weight], expected, rtol=0, atol=1e-3, msg=f"{step}: {weight}")


@several
def test_zero3_trains_the_stages_with_a_trainer(recipe: Any, tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    summary = run(recipe(REWARD, precision="bf16"), tmp_path / "home", *config("zero3"))
    assert summary["finished"] and summary["environment"]["num_processes"] == 2


@several
def test_a_process_that_dies_ends_the_others(recipe: Any, tmp_path: Path) -> None:
    (tmp_path / "gpu_reward.py").write_text(
        "import os, signal\n"
        "def score(p, c):\n"
        "    if os.environ['RANK'] == '1':\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return [0.0] * len(c)\n"
    )
    path = recipe({**PPO, "reward": [{"function": "gpu_reward:score"}], "value": "policy"}, precision="fp32")
    command = [sys.executable, *config("ddp"), "-m", "stages", "run", str(path), "--home", str(tmp_path / "home")]
    environment = {**os.environ, "PYTHONPATH": f"{REPOSITORY}:{tmp_path}"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 137 and "process 1 of 2 was ended by SIGKILL" in done.stderr
