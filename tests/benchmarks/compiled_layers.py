"""Compares training with compiled layers (torch_compile) and without: processor time per step, memory, and the time to compile.

    .venv/bin/python tests/benchmarks/compiled_layers.py [--widths 128 256 512] [--layers 4] [--steps 6] [--lora] [--precision fp32]

Time: about 15 minutes with the defaults on one busy core. Result: printed; docs/compiled-layers.md has a table.

The model is a random Llama, the data come from the embedded world. A run makes the steps of one stage (sft, or ppo with a value network).
Each step is computed twice from the same weights and data: compiled and not compiled, in alternating order. Steps in which a graph is
compiled do not count. The time is processor time, because other programs change it little. Memory is the peak of the process in a step
minus its memory before. Each run is a separate process with an empty cache of compiled code.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
from small_llama import raw_texts, save_small_llama  # noqa: E402

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))
SIDES = ("not compiled", "compiled")


def step(stage: str, model: Path, options: argparse.Namespace) -> dict[str, Any]:
    common: dict[str, Any] = {"stage": stage, "name": "step", "precision": options.precision}
    if options.lora:
        common["lora"] = {"r": 16}
    if stage == "sft":
        data = {"train": "world:demonstrations", "validation": {"path": "world:demonstrations/validation", "limit": 2}}
        training = {"learning_rate": 1e-4, "batch_size": 64, "max_steps": options.steps, "torch_compile": True}
        return {**common, "model": str(model), "data": data, "training": training}
    return {
        **common,
        "policy": str(model),
        "value": "policy",
        "reward": [{"function": "compiled_layers:length"}],
        "data": "world:prompts",
        "generation": {"max_new_tokens": 48},
        "total_episodes": 32 * options.steps,
        "rollout_batch_size": 32,
        "minibatch_size": 32,
        "ppo_epochs": 1,
        "training": {"learning_rate": 1e-6, "torch_compile": True},
    }


def length(prompts: list[str], completions: list[str]) -> list[float]:
    """A reward function."""
    return [float(len(text)) for text in completions]


class Pairs:
    """Computes each step on both sides."""

    def __init__(self) -> None:
        self.compiler: Any = None
        self.seconds: dict[str, list[float]] = {side: [] for side in SIDES}
        self.memory: dict[str, list[int]] = {side: [] for side in SIDES}
        self.losses: dict[str, list[float]] = {side: [] for side in SIDES}
        self._turn = 0

    def both(self, work: Callable[[], Any], loss_of: Callable[[Any], float], clear: Callable[[], None]) -> Any:
        """The result of the second side; ``clear`` removes the gradients of the first."""
        order = SIDES if self._turn % 2 else SIDES[::-1]
        self._turn += 1
        graphs = self.compiler.facts()["graphs"]
        taken: dict[str, tuple[float, int, float]] = {}
        for index, side in enumerate(order):
            if index:
                clear()
            for forward in self.compiler._forwards.values():
                forward.reason = "" if side == "compiled" else "switched off"
            before = reset_peak()
            began = time.process_time()
            result = work()
            taken[side] = (time.process_time() - began, peak() - before, loss_of(result))
        for forward in self.compiler._forwards.values():
            forward.reason = ""
        if self.compiler.facts()["graphs"] == graphs:
            for side, (seconds, size, loss) in taken.items():
                self.seconds[side].append(seconds)
                self.memory[side].append(size)
                self.losses[side].append(loss)
        return result


def reset_peak() -> int:
    """Set the peak memory of this process to its present memory, and return that in bytes."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak()


def peak() -> int:
    status = Path("/proc/self/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))) * 1024


def worker(stage: str, model: Path, options: argparse.Namespace) -> dict[str, Any]:
    from stages.chain import run as chain
    from stages.models.layers import compiled as compiled_layers
    from stages.ppo.update.updater import Updater
    from stages.process.runtime import Runtime
    from stages.recipe.schema import load_recipe
    from stages.registry.ledger import Registry
    from stages.training.microbatches import PassesByTokens

    pairs, made, accumulate, training_step = (
        Pairs(),
        compiled_layers.LayerCompiler.__init__,
        Updater.accumulate,
        PassesByTokens.training_step,
    )

    def remembered(self: Any, **named: Any) -> None:
        made(self, **named)
        pairs.compiler = self

    def update(self: Any, *inputs: Any, **named: Any) -> Any:
        def work() -> Any:
            totals = accumulate(self, *inputs, **named)
            totals.read()
            return totals

        def clear() -> None:
            for network in self.roles.networks().values():
                network.zero_grad()

        return pairs.both(work, lambda totals: totals.sums["policy_loss"], clear)

    def trained(self: Any, network: Any, *inputs: Any) -> Any:
        return pairs.both(lambda: training_step(self, network, *inputs), float, network.zero_grad)

    compiled_layers.LayerCompiler.__init__ = remembered  # type: ignore[method-assign]
    Updater.accumulate = update  # type: ignore[method-assign]
    PassesByTokens.training_step = trained  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as scratch:
        recipe, home = Path(scratch) / "recipe.yaml", Path(scratch) / "home"
        recipe.write_text(json.dumps({"name": "compiled", "steps": [step(stage, model, options)]}))
        summary = chain.run(load_recipe(recipe, [], Registry(home / "registry")), home, Runtime(quiet=True))
    facts = summary["steps"][0]["circumstances"]["compiled_layers"]
    return {"facts": facts, "seconds": pairs.seconds, "memory": pairs.memory, "losses": pairs.losses}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=[128, 256, 512])
    parser.add_argument("--stages", nargs="+", default=["sft", "ppo"], choices=["sft", "ppo"])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--lora", action="store_true")
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--worker", nargs=2, metavar=("STAGE", "MODEL"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(worker(options.worker[0], Path(options.worker[1]), options)))
        return
    print("| stage | width | steps | seconds, not compiled | compiled | ratio | memory, not compiled | compiled | graphs | to compile, s |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for width in options.widths:
        with tempfile.TemporaryDirectory() as model:
            save_small_llama(Path(model), raw_texts(), vocab_size=2048, width=width, layers=options.layers)
            for stage in options.stages:
                print(row(stage, width, model, options), flush=True)


def row(stage: str, width: int, model: str, options: argparse.Namespace) -> str:
    """A row of the table, measured in a separate process."""
    command = [sys.executable, "-W", "ignore", __file__, "--worker", stage, model, "--steps", str(options.steps)]
    command += ["--precision", options.precision, *(["--lora"] if options.lora else [])]
    with tempfile.TemporaryDirectory() as cache:
        places = {"PYTHONPATH": f"{REPOSITORY}:{Path(__file__).parent}", "TORCHINDUCTOR_CACHE_DIR": cache}
        done = subprocess.run(command, env={**os.environ, **places}, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr[-3000:])
    measured = json.loads(done.stdout.splitlines()[-1])
    slow, fast = (measured["seconds"][side] for side in SIDES)
    ratios = [compiled / usual for usual, compiled in zip(slow, fast, strict=True)]
    spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
    memory = [f"{max(measured['memory'][side]) / 2**20:.0f} MiB" for side in SIDES]
    facts = measured["facts"]
    for usual, compiled in zip(*(measured["losses"][side] for side in SIDES), strict=True):
        if abs(usual - compiled) > 1e-4 * max(1.0, abs(usual)) and options.precision == "fp32":
            sys.exit(f"{stage}, width {width}: the losses differ: {usual} and {compiled}")
    cells = [stage, width, len(ratios), f"{statistics.median(slow):.2f}", f"{statistics.median(fast):.2f}", spread, *memory]
    return f"| {' | '.join(map(str, [*cells, facts['graphs'], round(facts['seconds'])]))} |{facts['reason']}"


if __name__ == "__main__":
    main()
