"""One run of TRL 1.12's PPO trainer on the files of ``workloads.prepare``. It imports nothing of this project.

    PYTHON ppo_trl.py JSON

JSON has ``workdir`` (the folder of the files), ``packages`` (a folder to import TRL from, or null), ``device``, ``microbatch``, and the
settings of the workload. The last line of the output is JSON: seconds per iteration, and peak GPU memory in bytes (null on a CPU).
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any


def main(task: dict[str, Any]) -> dict[str, Any]:
    if task["packages"] is not None:
        sys.path.insert(0, task["packages"])
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    import torch
    import trl
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback

    if not trl.__version__.startswith("1.12."):
        return {"skipped": f"TRL {trl.__version__} is installed there, not 1.12"}
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    on_gpu = task["device"] == "cuda"
    if on_gpu:
        torch.backends.cuda.enable_cudnn_sdp(False)  # as this project does; with it TRL is slower
    workdir, batch, microbatch = Path(task["workdir"]), task["batch"], task["microbatch"]
    tokenizer = AutoTokenizer.from_pretrained(workdir / "trl_tokenizer", padding_side="left")
    policy, reference = (AutoModelForCausalLM.from_pretrained(workdir / "policy", dtype=torch.float32) for _ in range(2))
    reward, value = (
        AutoModelForSequenceClassification.from_pretrained(workdir / "reward_model", num_labels=1, dtype=torch.float32) for _ in range(2)
    )
    rows = json.loads((workdir / "prompt_ids.json").read_text())
    times: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            if on_gpu:
                torch.cuda.synchronize()
            times.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder:
        arguments = PPOConfig(
            output_dir=folder,
            report_to="none",
            seed=0,
            use_cpu=not on_gpu,
            bf16=True,
            save_strategy="no",
            disable_tqdm=True,
            logging_steps=1,
            per_device_train_batch_size=microbatch,
            gradient_accumulation_steps=batch // microbatch,
            num_mini_batches=1,
            num_ppo_epochs=task["epochs"],
            local_rollout_forward_batch_size=max(microbatch, batch // 2),
            total_episodes=batch * task["iterations"],
            learning_rate=1e-6,
            response_length=task["new_tokens"],
            temperature=1.0,
            stop_token="eos",
            kl_coef=0.05,
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
    return {
        "seconds": [after - before for before, after in zip([began, *times], times, strict=False)],
        "peak_bytes": torch.cuda.max_memory_allocated() if on_gpu else None,
        "versions": {"trl": trl.__version__, "torch": torch.__version__},
    }


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
