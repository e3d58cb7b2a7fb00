"""Load of ``stages label``: the time to open a file of 10,000 tasks, and the time of a request with 8 simultaneous annotators.

    PYTHONPATH=. python tests/benchmarks/label_load.py [--tasks 10000] [--annotators 8] [--answers 100]

The goal is to open the tasks in under a second and to acknowledge an answer in under 50 ms. The server is a separate process, pinned to one
core. The annotators share the other cores. They answer in two ways: one answer about every half second, and without any pause, which is
far faster than people are. The client measures the times; they include HTTP and fsync.

Time: about a minute. Result: results/label_load.json; docs/results.md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from pathlib import Path
from random import Random
from statistics import median

import httpx2
import psutil

REPOSITORY = Path(__file__).resolve().parents[2]
RESULT = Path(__file__).parent / "results" / "label_load.json"


def write_tasks(path: Path, number: int) -> None:
    """Write tasks with 4 completions of about 600 characters each, a length typical of InstructGPT."""
    random = Random(0)
    words = [f"{first}{second}" for first in "bdfgklmn" for second in ("ana", "eso", "iru", "olt", "umen", "arith")]
    with path.open("w", encoding="utf-8") as file:
        for task in range(number):
            completions = [" ".join(random.choices(words, k=90)) for _ in range(4)]
            prompt = f"Instruction {task}: " + " ".join(random.choices(words, k=30))
            file.write(json.dumps({"prompt": prompt, "completions": completions}) + "\n")


def start(folder: Path, names: list[str]) -> tuple[subprocess.Popen[str], dict[str, str], float, float]:
    """(the server, the annotators' links, seconds from its start to the answer with the first task, processor seconds of these)."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    named = [part for name in names for part in ("--annotator", name)]
    command = [sys.executable, "-m", "stages", "label", str(folder), "--port", str(port), *named]
    began = time.perf_counter()
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    os.sched_setaffinity(process.pid, {0})
    links: dict[str, str] = {}
    assert process.stdout is not None
    while "progress" not in links:
        line = process.stdout.readline()
        assert line, "the server ended"
        if line.startswith("  "):
            name, _, address = line.strip().partition(": ")
            links[name] = address
    client, name = client_of(links[names[0]]), names[0]
    while True:
        try:
            assert client.get("/api/task").json()["task"] is not None, name
            break
        except httpx2.TransportError:
            time.sleep(0.005)
    seconds, times = time.perf_counter() - began, psutil.Process(process.pid).cpu_times()
    return process, links, seconds, times.user + times.system


def client_of(link: str) -> httpx2.Client:
    """A client with an annotator's link."""
    base, _, query = link.partition("/?")
    name, token = (part.partition("=")[2] for part in query.split("&"))
    headers = {"authorization": f"Bearer {token}"}
    return httpx2.Client(base_url=base, params={"annotator": name}, headers=headers, timeout=30, trust_env=False)


def percentile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def annotate(link: str, answers: int, acknowledged: list[float], shown: list[float], think: float) -> None:
    client, random = client_of(link), Random(link)
    time.sleep(random.random() * think)
    for _ in range(answers):
        began = time.perf_counter()
        task = client.get("/api/task").json()["task"]
        shown.append(time.perf_counter() - began)
        if think:
            time.sleep(think * (0.5 + random.random()))
        sent = {"id": uuid.uuid4().hex, "task": task["id"], "order": task["order"], "seconds": 20, "ranks": [0, 1, 2, 3]}
        began = time.perf_counter()
        response = client.post("/api/answer", json=sent)
        acknowledged.append(time.perf_counter() - began)
        assert response.status_code == 200, response.text
    client.close()


def measure(links: dict[str, str], names: list[str], answers: int, think: float) -> dict[str, float]:
    acknowledged: list[float] = []
    shown: list[float] = []
    threads = [threading.Thread(target=annotate, args=(links[name], answers, acknowledged, shown, think)) for name in names]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - began
    times = {"answer": acknowledged, "task": shown}
    counts = {
        f"{name}_{what}_ms": round(1000 * value(list(values)), 1)
        for name, values in times.items()
        for what, value in (("median", median), ("p99", lambda values: percentile(values, 0.99)), ("worst", max))
    }
    return {**counts, "answers": len(acknowledged), "answers_per_second": round(len(acknowledged) / seconds, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", type=int, default=10_000)
    parser.add_argument("--annotators", type=int, default=8)
    parser.add_argument("--answers", type=int, default=100, help="answers of each annotator")
    options = parser.parse_args()
    names = [f"annotator-{index}" for index in range(options.annotators)]
    with tempfile.TemporaryDirectory() as work:
        path = Path(work) / "tasks.jsonl"
        write_tasks(path, options.tasks)
        home = Path(work) / "home"
        subprocess.run(
            [sys.executable, "-m", "stages", "label", str(path), "--home", str(home), "--report", "--json"],
            check=True,
            stdout=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        )
        (folder,) = (home / "labelling" / "files").iterdir()
        opened, computed = [], []
        for _ in range(3):
            process, links, seconds, busy = start(folder, names)
            opened.append(seconds)
            computed.append(busy)
            process.kill()
            process.wait()
        process, links, _, _ = start(folder, names)
        paced = measure(links, names, max(10, options.answers // 5), think=0.5)
        unpaced = measure(links, names, options.answers, think=0.0)
        process.kill()
        process.wait()
    result = {
        "tasks": options.tasks,
        "annotators": options.annotators,
        "open_seconds": [round(seconds, 3) for seconds in opened],
        "open_cpu_seconds": [round(seconds, 3) for seconds in computed],
        "answering_every_half_second": paced,
        "answering_without_a_pause": unpaced,
        "load_average": round(os.getloadavg()[0], 2),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "cores_of_the_server": 1,
        "real_time_scheduling": os.sched_getscheduler(0) == os.SCHED_FIFO,  # with chrt -f 5, other processes wait
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
