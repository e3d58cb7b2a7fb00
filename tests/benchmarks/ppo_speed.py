"""Compares this project's PPO with that of TRL 1.12.0: episodes per second, peak memory, and the score of each iteration.

    ./launch.sh recipes/quickstart.yaml                                # makes the policy and the reward model of the first workload
    .venv/bin/python tests/benchmarks/ppo_speed.py [--pairs 3] [--iterations 8] [--threads 1] [--trl-env FOLDER] [--json FILE]

Both use the same initial weights, reward model, prompts (up to 32 tokens) and number of threads, 64 episodes of up to 48 new tokens in an
iteration, 4 epochs of one minibatch in microbatches of 16, and fp32. The runs take turns, each in a separate process. TRL has a separate
environment, which is made the first time. There are two workloads:

    natural       the quickstart's SFT policy, which ends its responses itself
    no early end  a policy of random weights with 4 M parameters (256 wide, 4 layers, 4,096 tokens), whose tokenizer has no end token

TRL has a separate value network only. Ours runs with a separate value network, and with a value head on the policy. The first iteration of
a run is not counted. Memory is the peak of the process minus its memory after the imports.

Time: not measured on an idle machine. Result: printed, and written to --json (results/ppo_speed.json); docs/speed.md, section "PPO
compared with TRL".
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
from pathlib import Path
from typing import Any

from ppo_speed_trl import resident_mib

REPOSITORY = Path(__file__).resolve().parents[2]
TRL_REQUIREMENTS = ("torch==2.13.0", "trl==1.12.0", "transformers==5.24.0", "accelerate==1.15.0", "datasets>=5,<6", "pandas")
SETTINGS = {"batch": 64, "microbatch": 16, "epochs": 4, "new_tokens": 48, "prompt_tokens": 32, "kl_coef": 0.05, "learning_rate": 3e-4}


# Workloads


def natural(folder: Path, home: Path, num_prompts: int) -> dict[str, Any]:
    """The quickstart's models and prompts in a form that TRL can load: the reward bias is 0, because TRL drops it without a message."""
    import torch

    from stages.config import DataSource
    from stages.corpora.prompts import load_prompts
    from stages.corpora.templates import encode_prompt
    from stages.models.heads import RewardModel
    from stages.models.loading import load_tokenizer
    from stages.registry.ledger import Registry

    registry = Registry(home / "registry")
    sft, preference = registry.get("quickstart/sft"), registry.get("quickstart/preference")
    tokenizer = load_tokenizer(str(sft.path))
    reward_model = RewardModel.from_pretrained(str(preference.path), dtype=torch.float32)
    reward_model.center(reward_model.reward_bias)
    reward_model.save(folder / "reward_model", tokenizer)
    prompts = [text for text in load_prompts([DataSource(path="world:prompts")]) if isinstance(text, str)]
    ids = [encode_prompt(tokenizer, text) for text in prompts]
    kept = [(text, row) for text, row in zip(prompts, ids, strict=True) if len(row) <= SETTINGS["prompt_tokens"]][:num_prompts]
    return written(folder, [text for text, _ in kept], [row for _, row in kept], policy=str(sft.path), trl_tokenizer=str(sft.path))


def no_early_end(folder: Path, num_prompts: int) -> dict[str, Any]:
    """A Llama of random weights. Its tokens are words, so text and tokens correspond. No token that it can sample ends a response."""
    import random

    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from stages.models.heads import RewardModel

    vocabulary = {"[PAD]": 0, **{f"w{index}": index for index in range(1, 4096)}}
    blank = Tokenizer(models.WordLevel(vocabulary, unk_token="w1"))
    blank.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=blank, pad_token="[PAD]")
    tokenizer.save_pretrained(folder / "policy")
    ending = PreTrainedTokenizerFast(tokenizer_object=blank, pad_token="[PAD]", eos_token="[END]")  # TRL needs one: id 4096, no logit
    ending.save_pretrained(folder / "trl_tokenizer")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=256,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "policy")
    RewardModel.from_language_model(str(folder / "policy"), dtype=torch.float32).save(folder / "reward_model", tokenizer)
    draw = random.Random(0)
    ids = [[draw.randrange(1, 4096) for _ in range(draw.randint(8, SETTINGS["prompt_tokens"]))] for _ in range(num_prompts)]
    prompts = [" ".join(f"w{token}" for token in row) for row in ids]
    return written(folder, prompts, ids, policy=str(folder / "policy"), trl_tokenizer=str(folder / "trl_tokenizer"))


def written(folder: Path, prompts: list[str], ids: list[list[int]], **models: str) -> dict[str, Any]:
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in prompts))
    (folder / "prompt_ids.json").write_text(json.dumps(ids))
    files = {"prompts": str(folder / "prompts.jsonl"), "prompt_ids": str(folder / "prompt_ids.json")}
    return {**SETTINGS, **models, **files, "reward_model": str(folder / "reward_model")}


# One run of this project's PPO, in a separate process


def ours(workload: dict[str, Any], seed: int, value: str) -> dict[str, Any]:
    # Import everything that a run needs before reading the memory, as ppo_speed_trl.py does.
    import datasets  # noqa: F401
    import peft  # noqa: F401
    import torch
    import torch.utils.tensorboard  # noqa: F401
    import transformers  # noqa: F401
    import trl  # noqa: F401

    from stages.config import ModelInput
    from stages.ppo.config import PPOStepConfig
    from stages.ppo.loop import run
    from stages.process.runtime import Runtime
    from stages.registry.ledger import Registry
    from stages.registry.references import ResolvedModel
    from stages.step import StepContext

    torch.set_num_threads(workload["threads"])
    idle = resident_mib("VmRSS")
    settings = {
        "name": "aligned",
        "policy": "policy",
        "precision": "fp32",
        "reward": [{"model": "preference", "name": "preference"}],
        "data": workload["prompts"],
        "generation": {"max_new_tokens": workload["new_tokens"]},
        "kl_coef": workload["kl_coef"],
        "total_episodes": workload["batch"] * workload["iterations"],
        "rollout_batch_size": workload["batch"],
        "minibatch_size": workload["batch"],
        "microbatch_size": workload["microbatch"],
        "ppo_epochs": workload["epochs"],
        "training": {"learning_rate": workload["learning_rate"], "max_grad_norm": None},
        "checkpoint_seconds": 1e9,
        **({"value": "shared"} if value == "shared" else {}),
    }

    def folder_model(path: str) -> ResolvedModel:
        return ResolvedModel(ref=path, kind="folder", path=path, digest=path, input=ModelInput(ref=path))

    times, lines = [time.perf_counter()], []
    with tempfile.TemporaryDirectory() as scratch:
        runtime = Runtime(quiet=True)
        runtime.begin_step(seed)
        context = StepContext(
            name="benchmark/aligned",
            seed=seed,
            runtime=runtime,
            registry=Registry(Path(scratch) / "registry"),
            models={"policy": folder_model(workload["policy"]), "reward[0].model": folder_model(workload["reward_model"])},
            folder=Path(scratch) / "run",
            checkpoint_folder=Path(scratch) / "work",
        )
        context.folder.mkdir()
        log = context.log

        def timed(step: int, metrics: dict[str, float]) -> None:
            log(step, metrics)
            times.append(time.perf_counter())
            lines.append(metrics)

        context.log = timed  # type: ignore[method-assign]
        run(PPOStepConfig.model_validate(settings), context)
    seconds = [after - before for before, after in zip(times, times[1:], strict=False)]
    phases = {name: statistics.mean(line[name] for line in lines[1:]) for name in lines[0] if name.startswith("time/")}
    return {
        "seconds": seconds,
        "scores": [line["rewards/score_mean"] for line in lines],
        "idle_mib": idle,
        "peak_mib": resident_mib("VmHWM"),
        "phases": phases,
        "length": statistics.mean(line["responses/length_mean"] for line in lines),
    }


# Comparison


def trl_python(folder: Path) -> Path:
    """The Python of TRL's environment. Makes the environment if it does not exist."""
    python = folder / "bin" / "python"
    if not python.exists():
        print(f"making an environment with trl 1.12.0 in {folder} (once)", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", TRL_REQUIREMENTS[0]], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *TRL_REQUIREMENTS], check=True)
    return python


def started(command: list[str], threads: int) -> dict[str, Any]:
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def speed(result: dict[str, Any], batch: int) -> float:
    """Episodes per second of all iterations except the first."""
    return batch * (len(result["seconds"]) - 1) / sum(result["seconds"][1:])


def show(name: str, runs: dict[str, list[dict[str, Any]]], batch: int) -> dict[str, Any]:
    base = runs["trl"]
    length = runs["separate"][0]["length"]
    print(f"\n{name}: {len(base)} interleaved runs of {len(base[0]['seconds'])} iterations; mean response {length:.1f} tokens")
    shown: dict[str, Any] = {}
    for kind, results in runs.items():
        ratios = [speed(one, batch) / speed(other, batch) for one, other in zip(results, base, strict=True)]
        above = [result["peak_mib"] - result["idle_mib"] for result in results]
        memory = [one / (other["peak_mib"] - other["idle_mib"]) for one, other in zip(above, base, strict=True)]
        shown[kind] = {
            "episodes_per_second": statistics.median(speed(result, batch) for result in results),
            "ratio": statistics.median(ratios),
            "ratio_range": [min(ratios), max(ratios)],
            "memory_mib": statistics.median(above),
            "memory_ratio": statistics.median(memory),
            "scores": [result["scores"] for result in results],
        }
        row = shown[kind]
        print(
            f"  {kind:9s} {row['episodes_per_second']:6.1f} episodes/s   {row['ratio']:.2f}x ({min(ratios):.2f} to {max(ratios):.2f})   "
            f"{row['memory_mib']:6.0f} MiB above idle, {row['memory_ratio']:.2f}x"
        )
        if "phases" in results[0]:
            print("            " + ", ".join(f"{key[5:]} {value:.3g}" for key, value in results[0]["phases"].items()))
    for kind, results in runs.items():
        curves = [statistics.mean(result["scores"][index] for result in results) for index in range(len(results[0]["scores"]))]
        print(f"  score, mean over seeds, {kind:9s} " + " ".join(f"{score:+.2f}" for score in curves))
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--iterations", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1, help="Threads of each run (default: 1, as in docs/speed.md).")
    parser.add_argument("--home", type=Path, default=REPOSITORY / "outputs")
    parser.add_argument("--trl-env", type=Path, default=REPOSITORY / ".venv-trl112")
    parser.add_argument("--only", choices=["natural", "no-early-end"])
    parser.add_argument("--skip-trl", action="store_true", help="Run this project's PPO only, for profiling.")
    parser.add_argument("--json", type=Path, help="Also write all numbers to this file.")
    parser.add_argument("--worker", nargs=3, metavar=("WORKLOAD", "SEED", "VALUE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        workload, seed, value = options.worker
        print(json.dumps(ours(json.loads(Path(workload).read_text()), int(seed), value)))
        return
    python = None if options.skip_trl else trl_python(options.trl_env.absolute())
    results = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name in ("natural", "no-early-end"):
            if options.only not in (None, name):
                continue
            folder = Path(scratch) / name
            folder.mkdir()
            number = SETTINGS["batch"] * options.iterations
            workload = natural(folder, options.home, number) if name == "natural" else no_early_end(folder, number)
            path = folder / "workload.json"
            path.write_text(json.dumps({**workload, "iterations": options.iterations, "threads": options.threads}))
            runs: dict[str, list[dict[str, Any]]] = {"trl": [], "separate": [], "shared": []}
            for seed in range(options.pairs):
                for value in ("separate", "shared"):
                    runs[value].append(started([sys.executable, __file__, "--worker", str(path), str(seed), value], options.threads))
                if python is not None:
                    script = Path(__file__).with_name("ppo_speed_trl.py")
                    runs["trl"].append(started([str(python), str(script), str(path), str(seed)], options.threads))
                else:
                    runs["trl"].append(runs["separate"][-1])
            results[name] = show(name, runs, SETTINGS["batch"])
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
