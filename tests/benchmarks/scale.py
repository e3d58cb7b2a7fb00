"""How the time and memory of a PPO iteration grow with the model, the lengths, the batch and the number of processes.

    python tests/benchmarks/scale.py [--iterations 6]

Each row of the table is one run with a policy of random weights and a separate value network, in fp32, with one thread per process. The
rows of a block differ in one quantity. All responses have their full length, because end tokens are ignored. Seconds are medians over all
iterations except the first. Memory is the peak of the first process minus that of a process that has only imported the program.

Time: about 10 minutes on 2 idle cores; less with --iterations 3. Result: printed as a table; docs/speed.md, section "How time
and memory grow".
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

REPOSITORY = Path(__file__).resolve().parents[2]
BASE = {"width": 128, "layers": 4, "prompt": 16, "response": 32, "batch": 32, "processes": 1}
BLOCKS: dict[str, list[dict[str, int]]] = {
    "model width": [{"width": width} for width in (64, 128, 256, 512)],
    "model depth": [{"layers": layers} for layers in (2, 4, 8)],
    "prompt tokens": [{"prompt": tokens} for tokens in (16, 64, 256)],
    "response tokens": [{"response": tokens} for tokens in (16, 32, 64, 128)],
    "episodes per iteration": [{"batch": batch} for batch in (16, 32, 64, 128)],
    "processes of one thread": [{"processes": number, "batch": 64} for number in (1, 2)],
}


def make_model(folder: Path, *, width: int, layers: int) -> int:
    """Save a Llama of random weights with a byte tokenizer. Returns its number of parameters."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {piece: index for index, piece in enumerate(["<|endoftext|>", "<|pad|>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|pad|>").save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=max(1, width // 32),
        max_position_embeddings=1024,
        eos_token_id=0,
        pad_token_id=1,
        bos_token_id=None,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())


def measure(workdir: Path, given: dict[str, int], iterations: int) -> dict[str, Any]:
    """Make one run. Returns the number of parameters, the seconds of each phase and their sum, and the peak memory in bytes."""
    name = "-".join(map(str, given.values()))
    model = workdir / f"model-{given['width']}-{given['layers']}"
    parameters = make_model(model, width=given["width"], layers=given["layers"])
    rows = [{"prompt": f"{number:03d} " + "a" * (given["prompt"] - 4)} for number in range(128)]
    (workdir / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    step = {
        "stage": "ppo",
        "name": "aligned",
        "precision": "fp32",
        "policy": str(model),
        "value": "policy",
        "data": "prompts.jsonl",
        "reward": [{"function": "scale_reward:score"}],
        "generation": {"max_new_tokens": given["response"], "ignore_eos": True},
        "total_episodes": given["batch"] * iterations,
        "rollout_batch_size": given["batch"],
        "minibatch_size": given["batch"] // 2,
        "microbatch_size": 16,
        "ppo_epochs": 1,
        "checkpoint_seconds": 1e9,
    }
    (workdir / "scale.yaml").write_text(f"name: scale\nsteps:\n  - {json.dumps(step)}\n")
    launcher = [] if given["processes"] == 1 else ["-m", "stages.process.launching", "--cpu", "--num_processes", str(given["processes"])]
    command = [sys.executable, *launcher, "-m", "stages", "run", "scale.yaml", "--home", name]
    environment = {**os.environ, "PYTHONPATH": f"{REPOSITORY}:{workdir}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=workdir, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(done.stdout[-1000:] + done.stderr[-3000:])
    run = workdir / name / "runs" / "scale" / "latest"
    lines = [json.loads(line) for line in (run / "aligned" / "metrics.jsonl").read_text().splitlines()][1:]
    seconds = {phase: statistics.median(line[f"time/{phase}_s"] for line in lines) for phase in ("generation", "measuring", "update")}
    peak = json.loads((run / "summary.json").read_text())["peak_memory_bytes"]
    return {"parameters": parameters, "seconds": seconds, "total": sum(seconds.values()), "peak": peak}


def idle_memory() -> int:
    """Peak memory, in bytes, of a process that has imported the modules of a run and has done nothing else."""
    code = "import resource, torch, transformers, peft, stages.ppo.loop; print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)"
    return int(subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--iterations", type=int, default=6)
    given = options.parse_args()
    idle = idle_memory()
    print("| varied | value | parameters | generation s | measuring s | update s | iteration s | relative | memory MiB |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|---:|", flush=True)
    with tempfile.TemporaryDirectory(prefix="scale-") as folder:
        workdir = Path(folder)
        (workdir / "scale_reward.py").write_text("def score(p, c):\n    return [text.count('e') / (len(text) + 1) for text in c]\n")
        measured: dict[str, dict[str, Any]] = {}  # some rows are in several blocks
        for block, variants in BLOCKS.items():
            first = None
            for variant in variants:
                settings = {**BASE, **variant}
                name = "-".join(map(str, settings.values()))
                result = measured[name] = measured.get(name) or measure(workdir, settings, given.iterations)
                first = first or result["total"]
                phases = " | ".join(f"{value:.2f}" for value in result["seconds"].values())
                print(
                    f"| {block} | {next(iter(variant.values()))} | {result['parameters'] / 1e6:.2f} M | {phases} | {result['total']:.2f} | "
                    f"{result['total'] / first:.2f} | {(result['peak'] - idle) / 2**20:.0f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
