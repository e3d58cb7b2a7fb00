"""Compares the speed of this project's sampling with that of ``model.generate`` of transformers, in tokens per second.

    .venv/bin/python tests/benchmarks/sampling_speed.py [--rounds 5] [--device cuda]

Both sample at temperature 1, without top-k or top-p, from a Llama of random weights with 4 M parameters (256 wide, 4 layers, 4,096 tokens).
The batch has 64 left-padded prompts of 8 to 32 tokens and up to 48 new tokens (--new-tokens). There are two workloads:

    full     no token ends a response
    ragged   one token of the vocabulary in sixteen ends a response, so responses end at different times

The two programs take turns in one process, and the first round is not counted.

Time: not measured on an idle machine. Result: printed; docs/decoding.md, section "What makes it fast".
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from stages.config import GenerationSettings
from stages.kernels.matmul import use_fast_matmuls
from stages.sampling.generation import generate, left_pad


def model_on(device: str, dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=4096,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
        attn_implementation="sdpa",
    )
    return LlamaForCausalLM(config).eval().to(device, dtype)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--cpu-time", action="store_true", help="Measure processor time, for a machine that is not idle.")
    parser.add_argument("--same-matmuls", action="store_true", help="Use PyTorch's default matrix products here, too.")
    options = parser.parse_args()
    clock = time.process_time if options.cpu_time else time.perf_counter
    model, plain = (model_on(options.device, getattr(torch, options.dtype)) for _ in range(2))
    if not options.same_matmuls:
        use_fast_matmuls(model)  # as for every model that this project loads
    draw = random.Random(0)
    prompts = [[draw.randrange(1, 4096) for _ in range(draw.randint(8, 32))] for _ in range(64)]
    for name, stops in (("full", []), ("ragged", list(range(256)))):
        settings = GenerationSettings(max_new_tokens=options.new_tokens)
        ids, mask = left_pad(prompts, 0, options.device)

        def ours(seed: int, settings: GenerationSettings = settings, stops: list[int] = stops) -> int:
            seeds = [1000 * seed + row for row in range(64)]
            return int(generate(model, prompts, settings, seeds=seeds, stop_ids=stops, pad_token_id=0).lengths.sum())

        def theirs(seed: int, ids: Any = ids, mask: Any = mask, stops: list[int] = stops) -> int:
            torch.manual_seed(seed)
            made = plain.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=options.new_tokens,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                eos_token_id=stops or None,
                pad_token_id=0,
            )[:, ids.shape[1] :]
            if not stops:
                return made.numel()
            ended = torch.isin(made, torch.tensor(stops, device=made.device)).long().cumsum(1)
            return int((ended - torch.isin(made, torch.tensor(stops, device=made.device)).long() == 0).sum())

        ratios, speeds = [], []
        for turn in range(options.rounds + 1):
            speed = []
            for way in (ours, theirs):
                began = clock()
                tokens = way(turn)
                if options.device == "cuda":
                    torch.cuda.synchronize()
                speed.append(tokens / (clock() - began))
            if turn:
                ratios.append(speed[0] / speed[1])
                speeds.append(speed)
        ours_median, theirs_median = (statistics.median(column) for column in zip(*speeds, strict=True))
        print(
            f"{name}: {ours_median:.0f} tokens/s here, {theirs_median:.0f} by model.generate: "
            f"{statistics.median(ratios):.2f}x ({min(ratios):.2f} to {max(ratios):.2f} in {len(ratios)} rounds)"
        )


if __name__ == "__main__":
    main()
