"""One run of TRL 1.12's PPO trainer on the files of ``workloads.prepare``. It imports nothing of this project.

    PYTHON ppo_trl.py JSON

JSON has ``workdir`` (the folder of the files), ``packages`` (a folder to import TRL from, or null), ``device``, ``microbatch``, and the
settings of the workload. The last line of the output is JSON: seconds per iteration, and peak GPU memory in bytes (null on a CPU).
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any


def main(task: dict[str, Any]) -> dict[str, Any]:
    if task["packages"] is not None:
        sys.path.insert(0, task["packages"])
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for trl_ppo
    trl_version = version("trl")
    if not trl_version.startswith("1.12."):
        return {"skipped": f"TRL {trl_version} is installed there, not 1.12"}
    import torch
    from trl_ppo import Files, run

    on_gpu = task["device"] == "cuda"
    if on_gpu:
        torch.backends.cuda.enable_cudnn_sdp(False)  # as this project does; with it TRL is slower
    workdir = Path(task["workdir"])
    measured = run(
        Files(workdir / "policy", workdir / "reward_model", workdir / "trl_tokenizer", workdir / "prompt_ids.json"),
        **{name: task[name] for name in ("batch", "microbatch", "epochs", "iterations", "new_tokens")},
        synchronize=torch.cuda.synchronize if on_gpu else lambda: None,
        seed=0,
        use_cpu=not on_gpu,
        bf16=True,
        local_rollout_forward_batch_size=max(task["microbatch"], task["batch"] // 2),
        learning_rate=1e-6,
        kl_coef=0.05,
    )
    return {
        "seconds": measured.seconds,
        "peak_bytes": torch.cuda.max_memory_allocated() if on_gpu else None,
        "versions": {"trl": trl_version, "torch": torch.__version__},
    }


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
