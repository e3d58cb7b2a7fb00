"""One run of TRL's PPO trainer (trl.experimental.ppo, 1.12.0) on a workload that ppo_speed.py has written. ppo_speed.py starts it.

It runs in TRL's environment and imports nothing of this project. It prints one line of JSON: seconds of each iteration, scores, memory.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from pathlib import Path


def resident_mib(field: str) -> float:
    """VmRSS (now) or VmHWM (peak) of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) / 1024
    raise LookupError(field)


def main() -> None:
    workload, seed = json.loads(Path(sys.argv[1]).read_text()), int(sys.argv[2])
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    torch.set_num_threads(workload["threads"])
    idle = resident_mib("VmRSS")
    tokenizer = AutoTokenizer.from_pretrained(workload["trl_tokenizer"], padding_side="left")
    policy = AutoModelForCausalLM.from_pretrained(workload["policy"], dtype=torch.float32)
    reference = AutoModelForCausalLM.from_pretrained(workload["policy"], dtype=torch.float32)
    reward = AutoModelForSequenceClassification.from_pretrained(workload["reward_model"], num_labels=1, dtype=torch.float32)
    value = AutoModelForSequenceClassification.from_pretrained(workload["reward_model"], num_labels=1, dtype=torch.float32)
    rows = json.loads(Path(workload["prompt_ids"]).read_text())
    times: list[float] = []
    scores: list[float] = []

    class Clock(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **_):  # noqa: ANN001, ANN202
            if logs and "objective/scores" in logs:
                scores.append(logs["objective/scores"])

        def on_step_end(self, args, state, control, **_):  # noqa: ANN001, ANN202
            times.append(time.perf_counter())

    batch, microbatch = workload["batch"], workload["microbatch"]
    with tempfile.TemporaryDirectory() as folder:
        arguments = PPOConfig(
            output_dir=folder,
            report_to="none",
            seed=seed,
            use_cpu=True,
            bf16=False,
            save_strategy="no",
            disable_tqdm=True,
            logging_steps=1,
            per_device_train_batch_size=microbatch,
            gradient_accumulation_steps=batch // microbatch,
            num_mini_batches=1,
            num_ppo_epochs=workload["epochs"],
            local_rollout_forward_batch_size=batch,
            total_episodes=batch * workload["iterations"],
            learning_rate=workload["learning_rate"],
            lr_scheduler_type="linear",
            adam_epsilon=1e-5,
            response_length=workload["new_tokens"],
            temperature=1.0,
            stop_token="eos",
            kl_coef=workload["kl_coef"],
            num_sample_generations=0,
            gradient_checkpointing=False,
            eval_strategy="no",
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
    seconds = [after - before for before, after in zip([began, *times], times, strict=False)]
    print(json.dumps({"seconds": seconds, "scores": scores, "idle_mib": idle, "peak_mib": resident_mib("VmHWM")}))


main()
