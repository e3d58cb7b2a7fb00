"""Tokens per second and seconds per PPO iteration, sampled locally and by vLLM. The engines take turns in every round.

The model is a random Llama of 4 M parameters (256 wide, 4 layers, heads of 32, 4,096 tokens) in fp32. Prompts have 8 to 32 tokens.
Speed: nothing ends a completion. Iterations: one token in 256 ends a completion of at most 512 tokens; PPO with LoRA, a value head on the
policy's hidden states, one epoch, minibatches of 64, and a reward that takes no time.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from stages.config import GenerationSettings, ModelInput
from stages.engines.opening import Workplace, open_sampler
from stages.models.loaded import LoadedModel
from stages.models.loading import load_language_model, load_tokenizer
from stages.ppo.config import PPOStepConfig
from stages.ppo.loop import PPORun
from stages.process.runtime import Runtime
from stages.registry.ledger import Registry
from stages.registry.references import ResolvedModel
from stages.sampling.sampler import LocalSampler, Sampler
from stages.step import StepContext
from tests.benchmarks.engines.kept import Kept, Row
from tests.benchmarks.engines.server import RunningServer, served

TESTS = Path(__file__).resolve().parents[2]
ENGINES = ("local", "vllm")
VOCABULARY, MOST, RANK = 4096, 512, 8
FIRST_WORD = 300  # token ids from here on are one word each


def save_model(folder: Path) -> ResolvedModel:
    """The random Llama, with a tokenizer of single bytes and of words <300>, <301>, ..."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<eos>": 0, "<pad>": 1, **{letter: index + 2 for index, letter in enumerate(letters)}}
    vocabulary |= {f"<{index}>": index for index in range(len(vocabulary), VOCABULARY)}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>", pad_token="<pad>")
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=2048,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=1,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return ResolvedModel(str(folder), "folder", str(folder), "sha256:benchmark", ModelInput(ref=str(folder)))


# Tokens per second


def measure_speed(options: argparse.Namespace, kept: Kept, folder: Path) -> None:
    """One row per round, batch, length and engine."""
    source = save_model(folder / "model")
    tokenizer = load_tokenizer(source)
    model = load_language_model(source, dtype=torch.float32, trainable=False, tokenizer=tokenizer)
    with served(source.path, folder / "vllm.log") as server:
        settings = GenerationSettings.model_validate({"engine": server.engine, "ignore_eos": True})
        workplace = Workplace(Runtime(quiet=True), folder / "log", folder / "served")
        with open_sampler(settings, LoadedModel(model, tokenizer, source, torch.float32), workplace) as other:
            samplers: dict[str, Sampler] = {"local": LocalSampler(model, tokenizer), "vllm": other}
            for turn in range(1, options.rounds + 1):
                for batch in options.batches:
                    measure_batch(batch, turn, options, kept, samplers, settings, server)


def measure_batch(
    batch: int,
    turn: int,
    options: argparse.Namespace,
    kept: Kept,
    samplers: Mapping[str, Sampler],
    settings: GenerationSettings,
    server: RunningServer,
) -> None:
    """One round of one batch, with all lengths. The engines take turns; every second round begins with vLLM."""
    draw = random.Random(batch)
    prompts = [[draw.randrange(FIRST_WORD, VOCABULARY) for _ in range(draw.randint(8, 32))] for _ in range(batch)]
    keys = [
        {"engine": engine, "batch": batch, "length": length, "round": turn}
        for length in options.lengths
        for engine in (ENGINES if turn % 2 else ENGINES[::-1])
    ]
    if not all(kept.has(key) for key in keys):
        for sampler in samplers.values():
            sampled(sampler, prompts, settings, 16, 0, server)  # not measured
    for key in keys:
        kept.once(key, lambda key=key: sampled(samplers[key["engine"]], prompts, settings, key["length"], turn, server))  # type: ignore[misc]


def sampled(sampler: Sampler, prompts: list[list[int]], settings: GenerationSettings, length: int, turn: int, server: RunningServer) -> Row:
    """Sample ``length`` tokens for each prompt. Returns the number of tokens and the seconds."""
    chosen = settings.model_copy(update={"max_new_tokens": length, "batch_size": len(prompts)})
    wall, processor = time.perf_counter(), server.processor_seconds()
    made = sampler.sample(prompts, chosen, [1000 * turn + row for row in range(len(prompts))])
    return {
        "tokens": int(made.lengths.sum()),
        "wall_seconds": round(time.perf_counter() - wall, 3),
        "processor_seconds": round(server.processor_seconds() - processor, 3),
    }


def speed_table(kept: Kept) -> str:
    """Medians over the rounds, in Markdown; the ratio is that of the medians, with the smallest and largest ratio of a round."""
    lines = [
        "| batch | new tokens | local, tokens/s | vLLM, tokens/s | vLLM / local (range of the rounds) |",
        "|---|---|---|---|---|",
    ]
    for batch, length in sorted({(row["batch"], row["length"]) for row in kept.rows}):
        rows = [row for row in kept.rows if (row["batch"], row["length"]) == (batch, length)]
        speeds = {engine: by_round(rows, engine) for engine in ENGINES}
        both = sorted(speeds["local"].keys() & speeds["vllm"].keys())
        if not both:
            continue
        ours, theirs = (statistics.median(speeds[engine][turn] for turn in both) for engine in ENGINES)
        ratios = [speeds["vllm"][turn] / speeds["local"][turn] for turn in both]
        cells = [f"{batch}", f"{length}", f"{ours:,.0f}", f"{theirs:,.0f}", f"{theirs / ours:.2f} ({min(ratios):.2f} to {max(ratios):.2f})"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def by_round(rows: Sequence[Mapping[str, Any]], engine: str) -> dict[int, float]:
    """Tokens per second of processor time, by round."""
    return {row["round"]: row["tokens"] / row["processor_seconds"] for row in rows if row["engine"] == engine}


# Seconds per iteration


def measure_iterations(options: argparse.Namespace, kept: Kept, folder: Path) -> None:
    """One row per round, rollout size and engine. Before them, each engine runs one small iteration that is not measured."""
    sys.path.insert(0, str(TESTS / "ppo"))
    source = save_model(folder / "model")
    draw = random.Random(0)
    prompts = ["".join(draw.choice("abcdefgh ") for _ in range(draw.randint(8, 32))) for _ in range(1024)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in prompts))
    engines = (*ENGINES, "overlap") if options.overlap else ENGINES
    with served(source.path, folder / "vllm.log", lora_rank=RANK) as server:
        for engine in engines:
            iteration(source, server, engine, 64, 0, folder)  # not measured
        for turn in range(1, options.rounds + 1):
            for episodes in options.rollouts:
                for engine in engines if turn % 2 else engines[::-1]:
                    key = {"engine": engine, "episodes": episodes, "round": turn}
                    kept.once(key, lambda key=key: iteration(source, server, key["engine"], key["episodes"], key["round"], folder))  # type: ignore[misc]


def iteration(source: ResolvedModel, server: RunningServer, engine: str, episodes: int, turn: int, folder: Path) -> Row:
    """Run PPO for one iteration, with ``overlap: 1`` for three; the seconds of the iteration, of the second one with ``overlap: 1``.

    Loading and saving the models are not counted.
    """
    iterations = 3 if engine == "overlap" else 1
    stops = [f"<{index}>" for index in random.Random(0).sample(range(FIRST_WORD, VOCABULARY), VOCABULARY // 256)]
    config = PPOStepConfig.model_validate(
        {
            "name": "aligned",
            "policy": source.path,
            "precision": "fp32",
            "value": "shared",
            "lora": {"r": RANK},
            "reward": [{"function": "letters_reward:vowels"}],
            "data": str(folder / "prompts.jsonl"),
            "generation": {
                "engine": "local" if engine == "local" else server.engine,
                "max_new_tokens": MOST,
                "stop": stops,
                "batch_size": min(episodes, 256),
            },
            "overlap": int(engine == "overlap"),
            "total_episodes": episodes * iterations,
            "rollout_batch_size": episodes,
            "minibatch_size": 64,
            "ppo_epochs": 1,
            "num_samples": 0,
        }
    )
    here = folder / f"{engine}-{episodes}-{turn}"
    runtime = Runtime(quiet=True)
    runtime.begin_step(turn)
    context = StepContext("benchmark/aligned", turn, runtime, Registry(here / "registry"), {"policy": source}, here / "run", here / "work")
    ppo = PPORun(config, context)
    with ppo.sampling():
        processor = server.processor_seconds()
        ppo.iterate()
        processor = server.processor_seconds() - processor
    context.close()
    entry = json.loads((here / "run" / "metrics.jsonl").read_text().splitlines()[iterations // 2])
    seconds = {name.removeprefix("time/"): round(entry[name], 2) for name in entry if name.startswith("time/") and name.endswith("_s")}
    return {
        "tokens": round(entry["responses/length_mean"] * episodes),
        "wall_seconds": round(episodes / entry["time/episodes_per_second"], 2),
        "processor_seconds": round(processor / iterations, 2),
        "seconds": seconds,
    }


def iterations_table(kept: Kept) -> str:
    """Medians over the rounds, in Markdown."""
    lines = [
        "| episodes | sampler | tokens | processor seconds per iteration (range of the rounds) | wall seconds | sampling "
        "| scoring passes | update |",
        "|---|---|---|---|---|---|---|---|",
    ]
    order = [*ENGINES, "overlap"]
    for episodes, engine in sorted(
        {(row["episodes"], row["engine"]) for row in kept.rows}, key=lambda case: (case[0], order.index(case[1]))
    ):
        rows = [row for row in kept.rows if (row["episodes"], row["engine"]) == (episodes, engine)]
        processor, wall = [row["processor_seconds"] for row in rows], [row["wall_seconds"] for row in rows]
        cells = [f"{episodes:,}", engine, f"{statistics.median(row['tokens'] for row in rows):,.0f}"]
        cells.append(f"{statistics.median(processor):.1f} ({min(processor):.1f} to {max(processor):.1f})")
        cells.append(f"{statistics.median(wall):.1f}")
        cells += [f"{statistics.median(row['seconds'][f'{name}_s'] for row in rows):.1f}" for name in ("generation", "measuring", "update")]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"
