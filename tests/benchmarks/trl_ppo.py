"""TRL 1.12's PPO trainer on the files of a benchmark, for the scripts that measure it.

It runs in TRL's environment, which need not have this project, and imports nothing of this project.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback
from trl.experimental.ppo import PPOConfig, PPOTrainer


@dataclass(frozen=True)
class Files:
    """The folders of the models and the tokenizer, and a JSON file with the token ids of the prompts."""

    policy: Path
    reward_model: Path
    tokenizer: Path
    prompt_ids: Path


@dataclass
class Measured:
    """The seconds and the mean score of each iteration."""

    seconds: list[float] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)


def run(
    files: Files,
    *,
    batch: int,
    microbatch: int,
    epochs: int,
    iterations: int,
    new_tokens: int,
    synchronize: Callable[[], object] = lambda: None,
    **settings: Any,
) -> Measured:
    """Load the models and train. ``synchronize`` waits for the device before the time is read. ``settings``: more fields of PPOConfig."""
    tokenizer = AutoTokenizer.from_pretrained(files.tokenizer, padding_side="left")
    policy, reference = (AutoModelForCausalLM.from_pretrained(files.policy, dtype=torch.float32) for _ in range(2))
    reward, value = (
        AutoModelForSequenceClassification.from_pretrained(files.reward_model, num_labels=1, dtype=torch.float32) for _ in range(2)
    )
    rows = json.loads(files.prompt_ids.read_text())
    times: list[float] = []
    measured = Measured()

    class Clock(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
            if logs and "objective/scores" in logs:
                measured.scores.append(logs["objective/scores"])

        def on_step_end(self, *_: Any, **__: Any) -> None:
            synchronize()
            times.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder:
        arguments = PPOConfig(
            output_dir=folder,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            logging_steps=1,
            per_device_train_batch_size=microbatch,
            gradient_accumulation_steps=batch // microbatch,
            num_mini_batches=1,
            num_ppo_epochs=epochs,
            total_episodes=batch * iterations,
            response_length=new_tokens,
            temperature=1.0,
            stop_token="eos",
            num_sample_generations=0,
            gradient_checkpointing=False,
            eval_strategy="no",
            **settings,
        )
        trainer = PPOTrainer(
            args=arguments,
            processing_class=tokenizer,
            model=policy,
            ref_model=reference,
            reward_model=reward,
            value_model=value,
            train_dataset=Dataset.from_dict({"input_ids": rows}),
            eval_dataset=Dataset.from_dict({"input_ids": rows[:batch]}),
            callbacks=[Clock()],
        )
        began = time.perf_counter()
        trainer.train()
    measured.seconds = [after - before for before, after in zip([began, *times], times, strict=False)]
    return measured
