"""Threads, the way they wait, and dtypes on a CPU: training steps per second, on idle cores and with busy processes.

    .venv/bin/python tests/benchmarks/cpu_threads.py [--rounds 3] [--seconds 1] [--width 128] [--json FILE] [--markdown FILE]

The defaults take about two minutes. Results are printed and, with --json and --markdown, written to files. docs/cpu.md has
a table.

A step is forward, backward and AdamW on 768 tokens with a random Llama of two layers, with the layers that stages use. OpenMP reads its
environment variables only once, so each way of waiting has a separate process, which sleeps while another one is measured. Each round
measures every way once, in random order, and ratios are between measurements of the same round. The last column is the number of cores
that other programs used.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
WAITING: dict[str, dict[str, str]] = {
    "libgomp's default": {},
    "3,000 turns": {"GOMP_SPINCOUNT": "3000"},
    "20,000 turns": {"GOMP_SPINCOUNT": "20000"},
    "passive": {"OMP_WAIT_POLICY": "PASSIVE"},
}
TICK = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Way:
    """One way to compute: threads, how they wait (a key of WAITING) and the dtype."""

    threads: int
    waiting: str
    precision: str

    @property
    def name(self) -> str:
        return f"{self.threads} threads, {self.waiting}, {self.precision}" if self.threads > 1 else f"1 thread, {self.precision}"


def ways(threads: int) -> list[Way]:
    """All ways; the others are compared with the first one."""
    several = [Way(threads, waiting, "fp32") for waiting in WAITING]
    return [*several, Way(threads, "20,000 turns", "bf16"), Way(1, "20,000 turns", "fp32"), Way(1, "20,000 turns", "bf16")]


# A worker process: one way of waiting


def work(width: int) -> None:
    """Measure what each line on standard input asks for (threads, dtype, seconds), and print steps per second."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from stages.models.layers.replacing import use_own_layers

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=width * 11 // 4,
        num_hidden_layers=2,
        num_attention_heads=max(2, width // 64),
        vocab_size=1024,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    use_own_layers(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    ids = torch.randint(0, 1024, (6, 128))

    def step(precision: str) -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    for line in sys.stdin:
        threads, precision, seconds = line.split()
        torch.set_num_threads(int(threads))
        step(precision)  # chooses kernels, and wakes threads up
        began, count = time.perf_counter(), 0
        while time.perf_counter() - began < float(seconds):
            step(precision)
            count += 1
        print(count / (time.perf_counter() - began), flush=True)


class Worker:
    """A process with one way of waiting."""

    def __init__(self, waiting: str, threads: int, width: int) -> None:
        given = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_", "STAGES_CHOSEN"))}
        environment = {**given, **WAITING[waiting], "OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(REPOSITORY)}
        command = [sys.executable, __file__, "--work", "--width", str(width)]
        self.process = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def measure(self, way: Way, seconds: float) -> float:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(f"{way.threads} {way.precision} {seconds}\n")
        self.process.stdin.flush()
        return float(self.process.stdout.readline())


# All measurements


@contextmanager
def busy_processes(number: int) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Run ``number`` processes that use one core each, until the end of the context."""
    started = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(number)]
    try:
        yield started
    finally:
        for process in started:
            process.kill()
            process.wait()


def run(worker: Worker, way: Way, seconds: float, busy: int) -> dict[str, float]:
    """Steps per second of one way, and the number of cores that other programs used at the same time."""
    with busy_processes(busy) as started:
        own = [worker.process.pid, *(process.pid for process in started)]
        used, began = used_by_all() - sum(map(used_by, own)), time.monotonic()
        rate = worker.measure(way, seconds)
        wall = time.monotonic() - began
        others = used_by_all() - sum(map(used_by, own)) - used
    return {"steps_per_second": rate, "others": max(0.0, others / wall)}


def used_by_all() -> float:
    """Seconds of processor time of all programs of this machine, since it started."""
    user, nice, system, *_ = map(int, Path("/proc/stat").read_text().splitlines()[0].split()[1:])
    return (user + nice + system) / TICK


def used_by(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICK


def summarized(runs: list[dict[str, Any]], first: str) -> list[dict[str, Any]]:
    """Per condition and way: the median of steps per second, and of the ratio to ``first`` in the same round."""
    rows = []
    for condition in dict.fromkeys(run["condition"] for run in runs):
        of_condition = [run for run in runs if run["condition"] == condition]
        base = {run["round"]: run["steps_per_second"] for run in of_condition if run["way"] == first}
        for way in dict.fromkeys(run["way"] for run in of_condition):
            own = [run for run in of_condition if run["way"] == way]
            ratios = [run["steps_per_second"] / base[run["round"]] for run in own]
            rows.append(
                {
                    "condition": condition,
                    "way": way,
                    "steps_per_second": statistics.median(run["steps_per_second"] for run in own),
                    "ratio": statistics.median(ratios),
                    "lowest_ratio": min(ratios),
                    "highest_ratio": max(ratios),
                    "others": statistics.median(run["others"] for run in own),
                }
            )
    return rows


def markdown(rows: list[dict[str, Any]], title: str) -> str:
    lines = [title, "", "| cores | way | steps/s | relative | cores that others used |", "|---|---|---|---|---|"]
    for row in rows:
        spread = f"{row['ratio']:.2f} ({row['lowest_ratio']:.2f} to {row['highest_ratio']:.2f})"
        lines.append(f"| {row['condition']} | {row['way']} | {row['steps_per_second']:.1f} | {spread} | {row['others']:.1f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=1.0, help="of each measurement")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--threads", type=int, help="of the ways with several threads (default: one for each usable core)")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--markdown", type=Path, metavar="FILE")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work(options.width)
        return
    sys.path.insert(0, str(REPOSITORY))
    from stages.process.hardware import cpu_name, usable_cores

    cores = usable_cores()
    all_ways = ways(options.threads or max(2, cores.usable))
    title = f"{cpu_name()}, {cores}; a Llama {options.width} wide, {options.rounds} rounds"
    print(title, flush=True)
    runs: list[dict[str, Any]] = []
    conditions = {"no added process": 0, "one busy process": 1, "one busy process per core": cores.usable}
    workers = {waiting: Worker(waiting, all_ways[0].threads, options.width) for waiting in WAITING}
    try:
        for worker, way in ((workers[way.waiting], way) for way in all_ways):  # not counted
            worker.measure(way, 0.1)
        for number in range(options.rounds):
            order = [(condition, way) for condition in conditions for way in all_ways]
            random.Random(number).shuffle(order)
            for condition, way in order:
                made = run(workers[way.waiting], way, options.seconds, conditions[condition])
                runs.append({"round": number, "condition": condition, "way": way.name, **made})
                print(f"round {number + 1}, {condition}, {way.name}: {made['steps_per_second']:.1f} steps/s", file=sys.stderr, flush=True)
    finally:
        for worker in workers.values():
            worker.process.kill()
            worker.process.wait()
    runs.sort(key=lambda run: list(conditions).index(run["condition"]))
    rows = summarized(runs, all_ways[0].name)
    text = markdown(rows, title)
    print(text)
    if options.markdown is not None:
        options.markdown.write_text(text)
    if options.json is not None:
        content = {"processor": cpu_name(), "cores": str(cores), "width": options.width, "summary": rows, "runs": runs}
        options.json.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
