"""Speed of continuous batching compared with decoding batch by batch, in tokens per second.

    .venv/bin/python tests/benchmarks/continuous_batching.py [--rounds 3] [--device cuda --dtype bfloat16] [--json FILE]

Llamas of random weights decode 256 prompts of 8 to 32 tokens in 64 slots. Completions have 16 to 512 tokens: after the 16th token, one
token of the vocabulary in 256 ends a completion. There are three ways:

    continuous            a waiting prompt takes the slot of a finished completion
    batch after batch     finished rows leave the batch; the next batch starts when the last row is finished
    full batches          finished rows stay in the batch until its last row is finished

The ways take turns in one process, and the first round is not counted. In fp32 all ways must sample the same tokens.

Time: not measured on an idle machine. Result: printed, and written to --json; docs/decoding.md, section "Continuous batching".
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from stages.config import GenerationSettings
from stages.kernels.matmul import use_fast_matmuls
from stages.sampling import decoding
from stages.sampling.generation import Generated, generate

SIZES = {"quickstart (128 wide, 2 layers)": (128, 2, 1024), "4 M (256 wide, 4 layers)": (256, 4, 4096)}
GPU_SIZES = {"1B (2048 wide, 16 layers)": (2048, 16, 128256)}
WAYS = ("continuous", "batch after batch", "full batches")


def model_on(width: int, layers: int, vocabulary: int, device: str, dtype: torch.dtype) -> Any:
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=width * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=max(4, width // 64),
        num_key_value_heads=max(4, width // 64),
        max_position_embeddings=4096,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
        attn_implementation="sdpa",
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = LlamaForCausalLM(config).eval().to(dtype)
    use_fast_matmuls(model)
    return model


def sample(model: Any, prompts: list[list[int]], way: str, seed: int, batch_size: int, new_tokens: int = 512) -> Generated:
    stops = random.Random(0).sample(range(1, model.config.vocab_size), model.config.vocab_size // 256)
    settings = GenerationSettings(
        max_new_tokens=new_tokens,
        stop_after=min(16, new_tokens),
        batch_size=batch_size,
        continuous_batching=way == "continuous",
        cuda_graphs=way != "full batches",
    )
    usual = decoding.COMPACT_BELOW
    decoding.COMPACT_BELOW = 0.0 if way == "full batches" else usual
    try:
        seeds = [1000 * seed + row for row in range(len(prompts))]
        return generate(model, prompts, settings, seeds=seeds, stop_ids=[], late_stop_ids=stops, pad_token_id=0)
    finally:
        decoding.COMPACT_BELOW = usual


def measure_ways(model: Any, prompts: list[list[int]], rounds: int, batch_size: int, clock: Any) -> dict[str, list[float]]:
    """Tokens per second of each way, one number for each round but the first."""
    speeds: dict[str, list[float]] = {way: [] for way in WAYS}
    for turn in range(rounds + 1):
        made = {}
        for way in WAYS:
            began = clock()
            made[way] = sample(model, prompts, way, turn, batch_size)
            tokens = int(made[way].lengths.sum())
            speeds[way].append(tokens / (clock() - began))
        if model.dtype == torch.float32:
            different = sum(int((made[way].response_ids != made[WAYS[1]].response_ids).any(dim=1).sum()) for way in WAYS)
            print(f"  round {turn}: {tokens} tokens, {different} completions differ", flush=True)
    return {way: speeds[way][1:] for way in WAYS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--cpu-time", action="store_true", help="Measure processor time, for a machine that is not idle.")
    parser.add_argument("--json", type=Path, help="Write the result to this file as well.")
    options = parser.parse_args()
    clock = time.process_time if options.cpu_time else time.perf_counter
    results = {}
    for name, shape in (GPU_SIZES if options.device == "cuda" else SIZES).items():
        model = model_on(*shape, options.device, getattr(torch, options.dtype))
        draw = random.Random(0)
        prompts = [[draw.randrange(1, shape[2]) for _ in range(draw.randint(8, 32))] for _ in range(options.prompts)]
        speeds = measure_ways(model, prompts, options.rounds, options.batch_size, clock)
        base = speeds[WAYS[1]]
        results[name] = {
            way: {
                "tokens_per_second": round(statistics.median(of_way)),
                "times_batch_after_batch": round(statistics.median(a / b for a, b in zip(of_way, base, strict=True)), 2),
            }
            for way, of_way in speeds.items()
        }
        print(name, json.dumps(results[name], indent=1), flush=True)
    if options.json is not None:
        device = torch.cuda.get_device_name() if options.device == "cuda" else platform.processor() or platform.machine()
        options.json.write_text(json.dumps({"device": device, "threads": torch.get_num_threads(), "ways": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
