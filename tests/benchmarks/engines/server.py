"""A vLLM server for all measurements of a benchmark, and the processor time of this process and the server together."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from stages.config import VllmStart
from stages.engines.vllm_start import Served, StartedServer

KEY_VARIABLE = "BENCHMARK_VLLM_KEY"
CACHE_GIB = "2"  # room for 256 completions of 512 tokens by the model of speed.py


@dataclass(frozen=True)
class RunningServer:
    """A started server. ``engine``: the setting generation.engine for it."""

    engine: dict[str, Any]
    started: StartedServer

    def processor_seconds(self) -> float:
        """Processor time of this process and of all processes of the server, since each began."""
        assert self.started._process is not None
        keeper = psutil.Process(self.started._process.pid)
        times = [one.cpu_times() for one in (psutil.Process(), keeper, *keeper.children(recursive=True))]
        return sum(one.user + one.system for one in times)


@contextmanager
def served(model: str, log: Path, lora_rank: int = 0) -> Iterator[RunningServer]:
    """Start a server for ``model`` (a folder) in fp32, and end it at the end of the context. ``lora_rank`` 0: without adapters.

    After an error, the end of the server's log is printed.
    """
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", CACHE_GIB)
    server = StartedServer(VllmStart(), Served(model, "float32", lora_rank=lora_rank), log)
    began = time.perf_counter()
    server.start()
    print(f"the server answers after {time.perf_counter() - began:.0f} s", flush=True)
    os.environ[KEY_VARIABLE] = server.key
    try:
        yield RunningServer({"vllm": {"url": server.url, "api_key_variable": KEY_VARIABLE, "timeout_seconds": 1800.0}}, server)
    except BaseException:
        print("\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-40:]), flush=True)
        raise
    finally:
        server.end()
