"""vLLM beside the local sampler: tokens per second by batch and length, and whether PPO with LoRA learns alike.

    STAGES_VLLM_PYTHON=... .venv/bin/python tests/benchmarks/vllm.py speed [--rounds 3] [--batches 16 64] [--lengths 48 256]
    STAGES_VLLM_PYTHON=... .venv/bin/python tests/benchmarks/vllm.py learning [--seeds 3] [--iterations 15]

One server is started for all runs. ``speed``: pure sampling from a random Llama of 4 M parameters (256 wide, 4 layers, heads of 32, 4,096
tokens) in fp32, prompts of 8 to 32 tokens, nothing ends a completion; the two take turns, the first round is not counted. ``--cpu-time``
counts the processor time of this process and of the server, for a machine that is not idle. ``learning``: a random Llama of two layers,
LoRA, rewarded for vowels; the mean score of the first and the last three iterations.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from stages.config import GenerationSettings, ModelInput, VllmStart
from stages.engines.opening import open_sampler
from stages.engines.vllm_start import Served, StartedServer
from stages.models.loading import load_language_model, load_tokenizer
from stages.process.runtime import Runtime
from stages.registry.references import ResolvedModel
from stages.sampling.sampler import LocalSampler

REPOSITORY = Path(__file__).resolve().parents[2]


def save_model(folder: Path, **shape: Any) -> ResolvedModel:
    """A random Llama with a tokenizer of single bytes, saved."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<eos>": 0, "<pad>": 1, **{letter: index + 2 for index, letter in enumerate(letters)}}
    words = {f"<{index}>": index for index in range(len(vocabulary), shape["vocab_size"])}
    inner = Tokenizer(models.BPE(vocab={**vocabulary, **words}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>", pad_token="<pad>")
    torch.manual_seed(0)
    config = LlamaConfig(max_position_embeddings=2048, bos_token_id=None, eos_token_id=0, pad_token_id=1, **shape)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return ResolvedModel(str(folder), "folder", str(folder), "sha256:benchmark", ModelInput(ref=str(folder)))


@contextmanager
def served(source: ResolvedModel, folder: Path, lora_rank: int = 0) -> Iterator[tuple[dict[str, Any], StartedServer]]:
    """generation.engine for a server of ``source``, and the server."""
    server = StartedServer(VllmStart(), Served(source.path, "float32", lora_rank=lora_rank), folder / "vllm.log")
    began = time.perf_counter()
    server.start()
    print(f"the server answers after {time.perf_counter() - began:.0f} s", flush=True)
    os.environ["BENCHMARK_VLLM_KEY"] = server.key
    try:
        yield {"vllm": {"url": server.url, "api_key_variable": "BENCHMARK_VLLM_KEY", "timeout_seconds": 1800.0}}, server
    finally:
        server.end()


def processor_time(server: StartedServer) -> float:
    """Seconds of processor time of this process and of all of the server's."""
    import psutil

    processes = [psutil.Process(), psutil.Process(server._process.pid)]  # type: ignore[union-attr]
    processes += processes[1].children(recursive=True)
    return sum(one.cpu_times().user + one.cpu_times().system for one in processes)


def speed(options: argparse.Namespace, folder: Path) -> None:
    source = save_model(
        folder / "model",
        vocab_size=4096,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=8,
    )
    tokenizer = load_tokenizer(source)
    model = load_language_model(source, dtype=torch.float32, trainable=False, tokenizer=tokenizer)
    local, draw = LocalSampler(model, tokenizer), random.Random(0)
    with served(source, folder) as (engine, server):
        clock = (lambda: processor_time(server)) if options.cpu_time else time.perf_counter
        settings = GenerationSettings.model_validate({"engine": engine, "ignore_eos": True})
        places = {"log": folder / "log", "folder": folder / "served"}
        with open_sampler(settings, model, tokenizer, source, runtime=Runtime(quiet=True), dtype=torch.float32, **places) as other:
            print("batch new-tokens  local tokens/s  vLLM tokens/s  vLLM/local (rounds)", flush=True)
            for batch in options.batches:
                prompts = [[draw.randrange(300, 4096) for _ in range(draw.randint(8, 32))] for _ in range(batch)]
                for length in options.lengths:
                    chosen = settings.model_copy(update={"max_new_tokens": length, "batch_size": batch})
                    rows = []
                    for turn in range(options.rounds + 1):
                        speeds = []
                        for sampler in (local, other):
                            began = clock()
                            made = sampler.sample(prompts, chosen, [1000 * turn + row for row in range(batch)])
                            speeds.append(int(made.lengths.sum()) / (clock() - began))
                        rows.append(speeds)
                    ours, theirs = (statistics.median(column) for column in zip(*rows[1:], strict=True))
                    ratios = sorted(theirs / ours for ours, theirs in rows[1:])
                    print(
                        f"{batch:5d} {length:10d} {ours:15.0f} {theirs:14.0f}  {statistics.median(ratios):.2f} ({ratios[0]:.2f} to "
                        f"{ratios[-1]:.2f})",
                        flush=True,
                    )


def learning(options: argparse.Namespace, folder: Path) -> None:
    from stages.ppo.config import PPOStepConfig
    from stages.ppo.loop import run
    from stages.registry.ledger import Registry
    from stages.step import StepContext

    sys.path.insert(0, str(REPOSITORY / "tests" / "ppo"))
    source = save_model(
        folder / "model",
        vocab_size=258,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    data = folder / "prompts.jsonl"
    data.write_text(
        "".join(json.dumps({"prompt": f"{word} {number}"}) + "\n" for number in range(20) for word in ("film", "a plot", "music"))
    )
    with served(source, folder, lora_rank=8) as (engine, _):
        for seed in range(options.seeds):
            for name, chosen in (("local", "local"), ("vllm", engine)):
                config = PPOStepConfig.model_validate(
                    {
                        "name": "aligned",
                        "policy": source.path,
                        "precision": "fp32",
                        "value": "shared",
                        "lora": {"r": 8},
                        "reward": [{"function": "letters_reward:vowels"}],
                        "data": str(data),
                        "generation": {"engine": chosen, "max_new_tokens": 16},
                        "total_episodes": 64 * options.iterations,
                        "rollout_batch_size": 64,
                        "minibatch_size": 32,
                        "training": {"learning_rate": 2e-2},
                        "kl_coef": 0.0,
                        "num_samples": 0,
                    }
                )
                here = folder / f"{name}-{seed}"
                runtime = Runtime(quiet=True)
                runtime.begin_step(seed)
                context = StepContext(
                    "test/aligned", seed, runtime, Registry(here / "registry"), {"policy": source}, here / "run", here / "work"
                )
                began = time.perf_counter()
                run(config, context)
                entries = [json.loads(line) for line in (here / "run" / "metrics.jsonl").read_text().splitlines()]
                curve = [entry["rewards/score_mean"] for entry in entries]
                gaps = [entry.get("policy/sampling_gap", 0.0) for entry in entries]
                print(
                    f"seed {seed} {name:5s}: score {statistics.fmean(curve[:3]):.3f} -> {statistics.fmean(curve[-3:]):.3f}, largest gap "
                    f"{max(gaps):.1e}, {time.perf_counter() - began:.0f} s",
                    flush=True,
                )
                print("  " + " ".join(f"{score:.3f}" for score in curve), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["speed", "learning"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cpu-time", action="store_true")
    parser.add_argument("--batches", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--lengths", type=int, nargs="+", default=[48, 256])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--iterations", type=int, default=15)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        {"speed": speed, "learning": learning}[options.what](options, Path(folder))


if __name__ == "__main__":
    main()
