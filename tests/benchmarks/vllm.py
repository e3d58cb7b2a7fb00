"""vLLM compared with the local sampler on a CPU: what PPO with LoRA learns, tokens per second, and seconds per PPO iteration.

    STAGES_VLLM_PYTHON=... python tests/benchmarks/vllm.py all --core 1              # about 75 minutes of one core
    STAGES_VLLM_PYTHON=... python tests/benchmarks/vllm.py learning [--seeds 3] [--episodes 5120] [--home outputs/vllm]
    STAGES_VLLM_PYTHON=... python tests/benchmarks/vllm.py speed [--rounds 2] [--batches 16 64 256] [--lengths 64 256 512]
    STAGES_VLLM_PYTHON=... python tests/benchmarks/vllm.py iterations [--rounds 2] [--rollouts 64 256 1024] [--overlap]
    python tests/benchmarks/vllm.py tables                                           # write the tables again from the kept numbers

Each command keeps every finished measurement in tests/benchmarks/results/vllm-<command>.json (``--out`` names another folder). After an
interruption, the same command continues with the missing ones. ``--core N`` lets this process and the server use only core N, with one
thread. Speeds are per second of processor time of this process and the server together, so other jobs on the machine change them little.
Wall times are in the JSON. docs/vllm-measurements.md explains the results.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

import torch

sys.path[0] = str(Path(__file__).resolve().parents[2])  # not this folder, where other packages would import this file as vllm
from tests.benchmarks.engines import learning, speed  # noqa: E402
from tests.benchmarks.engines.kept import Kept  # noqa: E402

RESULTS = Path(__file__).resolve().parent / "results"
COMMANDS = {
    "learning": (learning.measure, learning.table),
    "speed": (speed.measure_speed, speed.speed_table),
    "iterations": (speed.measure_iterations, speed.iterations_table),
}


def confine(core: int) -> None:
    """Let this process and all processes that it starts use only this core, with one thread."""
    os.sched_setaffinity(0, {core})
    os.environ["OMP_NUM_THREADS"] = "1"  # vLLM starts one thread per usable core in any case
    torch.set_num_threads(1)


def options_of(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=[*COMMANDS, "all", "tables"])
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--home", type=Path, default=Path("outputs/vllm"), help="learning: home folder of the runs")
    parser.add_argument("--core", type=int)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--episodes", type=int, default=5120, help="learning: episodes of a run")
    parser.add_argument("--learning-rate", type=float, default=3e-3, help="learning: of the policy")
    parser.add_argument("--arms", nargs="+", choices=learning.ARMS, default=list(learning.ARMS), help="learning: the samplers")
    parser.add_argument("--rounds", type=int, default=2, help="speed, iterations: measured rounds; the engines take turns in each")
    parser.add_argument("--batches", type=int, nargs="+", default=[16, 64, 256])
    parser.add_argument("--lengths", type=int, nargs="+", default=[64, 256, 512])
    parser.add_argument("--rollouts", type=int, nargs="+", default=[64, 256, 1024], help="iterations: episodes of a rollout")
    parser.add_argument("--overlap", action="store_true", help="iterations: measure overlap: 1, too; it needs a second core")
    return parser.parse_args(arguments)


def main() -> None:
    options = options_of(sys.argv[1:])
    if options.core is not None:
        confine(options.core)
    options.out.mkdir(parents=True, exist_ok=True)
    for name, (measure, table) in COMMANDS.items():
        kept = Kept(options.out / f"vllm-{name}.json")
        if options.what in (name, "all"):
            with tempfile.TemporaryDirectory() as folder:
                measure(options, kept, Path(folder))
        if kept.rows and options.what in (name, "all", "tables"):
            text = table(kept)
            (options.out / f"vllm-{name}.md").write_text(text, encoding="utf-8")
            print(text, flush=True)
            if name == "learning":
                learning.draw(kept, options.out / "vllm-learning.png")


if __name__ == "__main__":
    main()
