"""Checks that the memory of a long PPO run does not grow, and that the run ends soon after SIGTERM.

    python tests/benchmarks/soak.py             --minutes 3 for a quick look

The run has a small policy, a value network and a reward function, and it writes checkpoints. The resident memory of the process is read
every ten seconds. The growth is the slope of the least-squares line through these numbers, without the first fifth of the time. The exit
status is 0 if the growth in an hour is less than 2 % of the memory, and if the run ended within ten seconds of the signal, with status 143.

Time: 31 minutes. Result: printed; docs/speed.md, section "How time and memory grow".
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
from scale import make_model

REPOSITORY = Path(__file__).resolve().parents[2]
PAUSE_SECONDS = 10.0


def slope(points: list[tuple[float, float]]) -> float:
    """The slope of the least-squares line through points (x, y)."""
    mean_x, mean_y = (sum(values) / len(points) for values in zip(*points, strict=True))
    return sum((x - mean_x) * (y - mean_y) for x, y in points) / sum((x - mean_x) ** 2 for x, _ in points)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--minutes", type=float, default=31.0)
    given = options.parse_args()
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        workdir = Path(folder)
        make_model(workdir / "model", width=64, layers=2)
        (workdir / "soak_reward.py").write_text("def score(p, c):\n    return [text.count('e') / (len(text) + 1) for text in c]\n")
        (workdir / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"{n:03d} a film"}) + "\n" for n in range(500)))
        step = {
            "stage": "ppo",
            "name": "aligned",
            "precision": "fp32",
            "policy": "./model",
            "value": "policy",
            "data": "prompts.jsonl",
            "reward": [{"function": "soak_reward:score"}],
            "generation": {"max_new_tokens": 24},
            "total_episodes": 2**30,
            "rollout_batch_size": 16,
            "minibatch_size": 8,
            "microbatch_size": 8,
            "ppo_epochs": 2,
            "ema_decay": 0.99,
            "training": {"schedule": "constant"},
        }
        (workdir / "soak.yaml").write_text(f"name: soak\nsteps:\n  - {json.dumps(step)}\n")
        environment = {**os.environ, "PYTHONPATH": f"{REPOSITORY}:{workdir}", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "stages", "run", "soak.yaml", "--home", "home"]
        with (workdir / "log").open("w") as log:
            process = subprocess.Popen(command, cwd=workdir, env=environment, stdout=log, stderr=subprocess.STDOUT)
            watched, began, read = psutil.Process(process.pid), time.monotonic(), []
            while time.monotonic() - began < 60 * given.minutes:
                time.sleep(PAUSE_SECONDS)
                if process.poll() is not None:
                    raise SystemExit((workdir / "log").read_text()[-3000:])
                read.append((time.monotonic() - began, watched.memory_info().rss / 2**20))
            asked = time.monotonic()
            process.send_signal(signal.SIGTERM)
            status = process.wait(60)
            ending = time.monotonic() - asked
        metrics = workdir / "home" / "runs" / "soak" / "latest" / "aligned" / "metrics.jsonl"
        iterations = len(metrics.read_text().splitlines())
        late = read[len(read) // 5 :]
        growth = 3600 * slope(late)
        for share in range(0, 11, 2):
            seconds, held = late[min(len(late) - 1, share * len(late) // 10)]
            print(f"after {seconds / 60:5.1f} min: {held:7.1f} MiB")
        print(
            f"{iterations} iterations in {given.minutes:g} minutes; {late[-1][1]:.0f} MiB at the end, growing by {growth:.1f} MiB an hour "
            f"({1000 * growth / 3600 * 60 * given.minutes / iterations:.2f} MiB per 1000 iterations); ended {ending:.1f} s after SIGTERM "
            f"with status {status}"
        )
        sys.exit(not (growth < 0.02 * late[-1][1] and ending < 10 and status == 143))


if __name__ == "__main__":
    main()
