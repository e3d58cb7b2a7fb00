"""Compares the stages that use a Trainer with that Trainer alone: optimizer steps per second on the same rows.

    .venv/bin/python tests/benchmarks/trainer_speed.py [--rounds 3]

The model is a Llama of random weights of the quickstart's size (128 wide, 2 layers), and the data come from the embedded world:

    sft            compared with trl.SFTTrainer
    reward_model   compared with a transformers.Trainer with the same ranking loss
    sentiment      compared with a transformers.Trainer; both train a small DistilBERT

Both sides use PyTorch's default matrix products. With --fast-matmuls, the stages use the faster products of the two libraries, as they do
for users. The runs take turns, each in a separate process. The time is the one that the Trainer reports, without start and evaluation.

Time: not measured on an idle machine. Result: printed; docs/speed.md, section "Other stages".
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
from small_llama import raw_texts, save_small_llama  # noqa: E402

REPOSITORY = Path(__file__).resolve().parents[2]
STEPS = {"sft": 200, "reward_model": 60, "sentiment": 200}
TRAINING = {"learning_rate": 1e-3, "batch_size": 8, "microbatch_size": 8}
DATA = {
    "sft": {"train": "world:demonstrations", "validation": {"path": "world:demonstrations/validation", "limit": 8}},
    "reward_model": {"train": "world:comparisons", "validation": {"path": "world:comparisons/validation", "limit": 8}},
    "sentiment": {"train": "world:reviews", "validation": {"path": "world:reviews/validation", "limit": 8}},
}


def step(kind: str) -> dict[str, Any]:
    training = {**TRAINING, "max_steps": STEPS[kind]}
    common = {"stage": kind, "name": "step", "precision": "fp32", "data": DATA[kind], "training": training}
    if kind == "sentiment":
        architecture = {"type": "distilbert", "dim": 64, "hidden_dim": 128, "n_layers": 2, "n_heads": 4}
        return {**common, "architecture": architecture, "max_length": 64}
    return {**common, "model": "MODEL"}


# One run, in a separate process


def ours(kind: str, folder: Path) -> float:
    """Optimizer steps per second of the stage."""
    with tempfile.TemporaryDirectory() as scratch:
        recipe, home = Path(scratch) / "recipe.yaml", Path(scratch) / "home"
        recipe.write_text(json.dumps({"name": "speed", "steps": [step(kind)]}).replace("MODEL", str(folder)))
        from stages.chain import run as chain
        from stages.process.runtime import Runtime
        from stages.recipe.schema import load_recipe
        from stages.registry.ledger import Registry

        summary = chain.run(load_recipe(recipe, [], Registry(home / "registry")), home, Runtime(quiet=True))
        return float(summary["steps"][0]["metrics"]["steps_per_second"])


def theirs(kind: str, folder: Path) -> float:
    """Optimizer steps per second of the plain Trainer."""
    import transformers

    transformers.set_seed(0)
    with tempfile.TemporaryDirectory() as scratch:
        shared = {
            "output_dir": scratch,
            "per_device_train_batch_size": 8,
            "max_steps": STEPS[kind],
            "learning_rate": 1e-3,
            "use_cpu": True,
            "report_to": "none",
            "save_strategy": "no",
            "logging_steps": 0.01,
            "disable_tqdm": True,
            "dataloader_pin_memory": False,
        }
        trainer = {"sft": plain_sft, "reward_model": plain_reward_model, "sentiment": plain_classifier}[kind](folder, shared)
        return float(trainer.train().metrics["train_steps_per_second"])


def plain_sft(folder: Path, shared: dict[str, Any]) -> Any:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    from stages.config import DataInput
    from stages.corpora.demonstrations import load_demonstrations

    rows = load_demonstrations(DataInput.model_validate(DATA["sft"])).train
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    table = Dataset.from_list([{"prompt": row["prompt"], "completion": " " + row["completion"]} for row in rows])
    return SFTTrainer(model=model, args=SFTConfig(**shared, bf16=False, max_length=None), train_dataset=table, processing_class=tokenizer)


def plain_reward_model(folder: Path, shared: dict[str, Any]) -> Any:
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments

    from stages.config import DataInput
    from stages.corpora.comparisons import load_comparisons
    from stages.reward_model.rows import collate, encode
    from stages.rl.ranking import ranking_loss

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)
    comparisons = load_comparisons(DataInput.model_validate(DATA["reward_model"])).train
    rows = [encode(item, tokenizer, 512) for item in comparisons if item.num_pairs]

    class Ranking(Trainer):
        def compute_loss(self, model: Any, inputs: dict[str, torch.Tensor], return_outputs: bool = False, **_: Any) -> Any:
            scores = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits[:, 0]
            return ranking_loss(scores, inputs["ranks"], inputs["prompt_index"])

    arguments = TrainingArguments(**shared, remove_unused_columns=False)
    return Ranking(model=model, args=arguments, train_dataset=rows, data_collator=lambda items: collate(items, tokenizer.pad_token_id))


def plain_classifier(folder: Path, shared: dict[str, Any]) -> Any:
    from transformers import DataCollatorWithPadding, DistilBertConfig, DistilBertForSequenceClassification, Trainer, TrainingArguments

    from stages.config import DataInput
    from stages.corpora.reviews import load_reviews
    from stages.sentiment.config import WordPieceSettings
    from stages.sentiment.tokenizer import train_wordpiece

    reviews = load_reviews(DataInput.model_validate(DATA["sentiment"]), ["negative", "positive"]).train
    tokenizer = train_wordpiece([review.text for review in reviews], WordPieceSettings(), 64)
    config = DistilBertConfig(
        vocab_size=len(tokenizer),
        dim=64,
        hidden_dim=128,
        n_layers=2,
        n_heads=4,
        max_position_embeddings=64,
        pad_token_id=tokenizer.pad_token_id,
    )
    ids = tokenizer([review.text for review in reviews], truncation=True)["input_ids"]
    rows = [{"input_ids": row, "labels": review.label} for row, review in zip(ids, reviews, strict=True)]
    return Trainer(
        model=DistilBertForSequenceClassification(config),
        args=TrainingArguments(**shared, train_sampling_strategy="group_by_length"),
        train_dataset=rows,
        data_collator=DataCollatorWithPadding(tokenizer),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--fast-matmuls", action="store_true")
    parser.add_argument("--worker", nargs=3, metavar=("SIDE", "KIND", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        side, kind, scratch = options.worker
        if not options.fast_matmuls:
            from stages.kernels import matmul

            matmul.prefers_onednn = lambda: False  # type: ignore[assignment]
        print({"ours": ours, "theirs": theirs}[side](kind, Path(scratch)))
        return
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "TOKENIZERS_PARALLELISM": "false"}
    with tempfile.TemporaryDirectory() as scratch:
        save_small_llama(Path(scratch), raw_texts(), vocab_size=1024, heads=4)
        for kind in STEPS:
            speeds: dict[str, list[float]] = {"ours": [], "theirs": []}
            for _ in range(options.rounds):
                for side, side_speeds in speeds.items():
                    command = [sys.executable, "-W", "ignore", __file__, "--worker", side, kind, scratch]
                    command += ["--fast-matmuls"] if options.fast_matmuls else []
                    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
                    if done.returncode:
                        sys.exit(done.stderr[-3000:])
                    side_speeds.append(float(done.stdout.split()[-1]))
            ratios = [one / other for one, other in zip(speeds["ours"], speeds["theirs"], strict=True)]
            ours_median, theirs_median = (statistics.median(side_speeds) for side_speeds in speeds.values())
            speed = f"{ours_median:6.1f} steps/s here, {theirs_median:6.1f} by the Trainer alone"
            print(f"{kind:12s} {speed}: {statistics.median(ratios):.2f}x ({min(ratios):.2f} to {max(ratios):.2f})", flush=True)


if __name__ == "__main__":
    main()
