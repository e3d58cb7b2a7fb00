"""Padding in supervised fine-tuning: processor time per step with passes over random rows, and with passes over rows of similar length.

    .venv/bin/python tests/benchmarks/sft_padding.py DATA.jsonl.gz [--batch 32] [--width 128] [--layers 2] [--steps 20] [--rounds 3]

Time: about four minutes with the defaults. Result: printed; docs/speed.md has a table.

DATA has a prompt and a completion per row. The model is a random Llama; its tokenizer of 4,096 tokens is trained on DATA. Both ways make
the same optimizer steps, so their losses must agree. They alternate in one process, on one thread. The time is processor time, because
other programs change it little.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
from small_llama import save_small_llama  # noqa: E402

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))


def texts_of(data: Path) -> list[str]:
    """The first 1,000 demonstrations, for the tokenizer."""
    from stages.config import DataInput
    from stages.corpora.demonstrations import load_demonstrations

    rows = load_demonstrations(DataInput.model_validate({"train": {"path": str(data), "limit": 1000}})).train
    return [f"{row['prompt']}\n{row['completion']}" for row in rows]


def one_run(model: Path, data: Path, options: argparse.Namespace, *, splits: bool) -> dict[str, float]:
    """Train for some steps; returns processor seconds per step, tokens per step with and without padding, and the mean loss."""
    import transformers

    from stages.chain import run as chain
    from stages.process.runtime import Runtime
    from stages.recipe.schema import load_recipe
    from stages.registry.ledger import Registry
    from stages.sft import trainer as sft_trainer

    sizes: list[tuple[int, int]] = []
    seconds: list[float] = []
    usual = sft_trainer.training_arguments
    step = transformers.Trainer.training_step
    full_step = sft_trainer.DemonstrationTrainer.training_step

    def arguments(settings: Any, *positional: Any, **named: Any) -> Any:
        made = usual(settings, *positional, **named)
        if not splits:
            made.by_tokens = False
            made.per_device_train_batch_size = settings.rows_per_pass
            made.gradient_accumulation_steps = -(-settings.batch_size // settings.rows_per_pass)
        return made

    def counted(self: Any, passed: Any, inputs: Any, *rest: Any) -> Any:
        sizes.append((inputs["input_ids"].numel(), int(inputs["attention_mask"].sum())))
        return step(self, passed, inputs, *rest)

    def timed(self: Any, *rest: Any) -> Any:
        began = time.process_time()
        made = full_step(self, *rest)
        seconds.append(time.process_time() - began)
        return made

    training = {"learning_rate": 1e-3, "batch_size": options.batch, "max_steps": options.steps}
    recipe = {
        "stage": "sft",
        "name": "step",
        "precision": "fp32",
        "model": str(model),
        "max_length": 1024,
        "data": {"train": {"path": str(data), "limit": 2000}, "validation": {"path": str(data), "limit": 4}},
        "training": training,
    }
    sft_trainer.training_arguments = arguments
    transformers.Trainer.training_step = counted
    sft_trainer.DemonstrationTrainer.training_step = timed
    try:
        with tempfile.TemporaryDirectory() as scratch:
            file, home = Path(scratch) / "recipe.yaml", Path(scratch) / "home"
            file.write_text(json.dumps({"name": "padding", "steps": [recipe]}))
            summary = chain.run(load_recipe(file, [], Registry(home / "registry")), home, Runtime(quiet=True))
    finally:
        sft_trainer.training_arguments = usual
        transformers.Trainer.training_step = step
        sft_trainer.DemonstrationTrainer.training_step = full_step
    read, real = (sum(column) for column in zip(*sizes, strict=True))
    return {
        "seconds": sum(seconds) / options.steps,
        "passes": len(sizes) / options.steps,
        "read": read / options.steps,
        "real": real / options.steps,
        "loss": float(summary["steps"][0]["metrics"]["train_loss"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    for name, default in (("batch", 32), ("width", 128), ("layers", 2), ("steps", 20), ("rounds", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    from stages.process.hardware import cpu_name

    runs: dict[bool, list[dict[str, float]]] = {False: [], True: []}
    with tempfile.TemporaryDirectory() as folder:
        save_small_llama(Path(folder), texts_of(options.data), vocab_size=4096, width=options.width, layers=options.layers, positions=1024)
        for number in range(options.rounds):
            for splits in (False, True) if number % 2 else (True, False):
                runs[splits].append(one_run(Path(folder), options.data, options, splits=splits))
    print(
        f"{cpu_name()}, one thread; {options.width} wide, {options.layers} layers; batches of {options.batch}; {options.data.parent.name}"
    )
    print("| passes over | passes per step | tokens per step | of them padding | processor seconds per step | loss |")
    print("|---|---|---|---|---|---|")
    middle: Callable[[bool, str], float] = lambda splits, name: statistics.median(one[name] for one in runs[splits])  # noqa: E731
    for splits, name in ((False, "random rows"), (True, "rows of similar length")):
        read, real = middle(splits, "read"), middle(splits, "real")
        numbers = f"{middle(splits, 'passes'):.1f} | {read:,.0f} | {1 - real / read:.0%} | {middle(splits, 'seconds'):.3f}"
        print(f"| {name} | {numbers} | {middle(splits, 'loss'):.6f} |")
    ratios = [slow["seconds"] / fast["seconds"] for slow, fast in zip(runs[False], runs[True], strict=True)]
    print(f"{statistics.median(ratios):.2f} times as many steps per second ({min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    main()
