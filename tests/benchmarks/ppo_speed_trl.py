"""One run of TRL's PPO trainer (trl.experimental.ppo, 1.12.0) on a workload that ppo_speed.py has written. ppo_speed.py starts it.

It runs in TRL's environment and imports nothing of this project. It prints one line of JSON: seconds of each iteration, scores, memory.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def resident_mib(field: str) -> float:
    """VmRSS (now) or VmHWM (peak) of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) / 1024
    raise LookupError(field)


def main() -> None:
    workload, seed = json.loads(Path(sys.argv[1]).read_text()), int(sys.argv[2])
    import torch
    from trl_ppo import Files, run  # in the folder of this script

    torch.set_num_threads(workload["threads"])
    idle = resident_mib("VmRSS")
    files = Files(*(Path(workload[name]) for name in ("policy", "reward_model", "trl_tokenizer", "prompt_ids")))
    measured = run(
        files,
        **{name: workload[name] for name in ("batch", "microbatch", "epochs", "iterations", "new_tokens", "learning_rate", "kl_coef")},
        seed=seed,
        use_cpu=True,
        bf16=False,
        local_rollout_forward_batch_size=workload["batch"],
        lr_scheduler_type="linear",
        adam_epsilon=1e-5,
    )
    print(json.dumps({**vars(measured), "idle_mib": idle, "peak_mib": resident_mib("VmHWM")}))


if __name__ == "__main__":
    main()
