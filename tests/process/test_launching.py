"""The launcher starts the requested number of processes or says why not. It passes on exit statuses and signals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from stages.errors import LaunchError
from stages.process import environment as process_environment
from stages.process import launching

REPOSITORY = Path(__file__).resolve().parents[2]
PRINTER = """\
import os
from stages.process.runtime import Runtime

r = Runtime()
os.write(1, f"joined {r.num_processes} {r.process_index}\\n".encode())  # one write: the processes share the pipe
r.leave()
"""

CONFIG = """\
compute_environment: LOCAL_MACHINE
distributed_type: {kind}
num_machines: 1
num_processes: {processes}
use_cpu: {cpu}
"""


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "ACCELERATE_DYNAMO_MODE", "PMI_SIZE"):
        monkeypatch.delenv(name, raising=False)
    return {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}


def launch(arguments: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "stages.process.launching", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)


@pytest.mark.parametrize(("kind", "cpu"), [("MULTI_CPU", "true"), ("MULTI_GPU", "false")])
def test_config_file_sets_the_number_of_processes(tmp_path: Path, environment: dict[str, str], kind: str, cpu: str) -> None:
    import torch

    if torch.accelerator.is_available():
        pytest.skip("for machines without a GPU")
    (tmp_path / "config.yaml").write_text(CONFIG.format(kind=kind, processes=2, cpu=cpu))
    (tmp_path / "printer.py").write_text(PRINTER)
    done = launch(["--config_file", str(tmp_path / "config.yaml"), str(tmp_path / "printer.py")], environment)
    assert (done.returncode, sorted(done.stdout.splitlines())) == (0, ["joined 2 0", "joined 2 1"]), done.stderr


@pytest.mark.parametrize(
    ("code", "status", "said"),
    [
        ("import sys; sys.exit(7)", 7, ""),
        ("import os; os.kill(os.getpid(), 9)", 137, ""),
        ("raise ValueError('a bug')", 1, "ValueError: a bug"),
    ],
)
def test_exit_status_is_that_of_the_process(tmp_path: Path, environment: dict[str, str], code: str, status: int, said: str) -> None:
    (tmp_path / "script.py").write_text(code)
    done = launch(["--cpu", str(tmp_path / "script.py")], environment)
    assert done.returncode == status and said in done.stderr
    assert "CalledProcessError" not in done.stderr


def test_signal_reaches_the_process(tmp_path: Path, environment: dict[str, str]) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import signal, sys, time\nsignal.signal(signal.SIGTERM, lambda *_: (print('stopping', flush=True), sys.exit(143)))\n"
        "print('ready', flush=True)\ntime.sleep(60)\n"
    )
    command = [sys.executable, "-m", "stages.process.launching", "--cpu", str(script)]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=30)[0] == "stopping\n"
    assert process.returncode == 143 and time.monotonic() - began < 20


def test_failed_launch_is_reported(tmp_path: Path, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "zero.yaml").write_text(CONFIG.format(kind="DEEPSPEED", processes=2, cpu="false") + "deepspeed_config: {zero_stage: 3}\n")
    monkeypatch.setattr(launching, "_num_devices", lambda: 0)
    with pytest.raises(LaunchError, match="DeepSpeed was requested, but this machine has no GPU; use recipes/accelerate/fsdp2.yaml"):
        launching.launch(["--config_file", str(tmp_path / "zero.yaml"), "script.py"])
    monkeypatch.setattr(launching, "_num_devices", lambda: 1)
    with pytest.raises(LaunchError, match=r"4 processes were requested, but this machine has 1 GPU\(s\), one per process"):
        launching.launch(["--num_processes", "4", "script.py"])
    with pytest.raises(LaunchError, match="accelerate does not accept its options: You can only use one of"):
        launching.launch(["--cpu", "--multi_gpu", "script.py"])


def test_missing_processes_are_noticed(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert not process_environment.is_short_of_processes()
    monkeypatch.setenv("ACCELERATE_DYNAMO_MODE", "default")
    assert not process_environment.is_short_of_processes()  # one process was requested
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    assert process_environment.is_short_of_processes()
    monkeypatch.setattr(launching, "_arguments_of_launcher", lambda: None)
    with pytest.raises(LaunchError, match="more than one process was requested, but accelerate started only this one"):
        launching.start_missing_processes()
    started: list[list[str]] = []
    monkeypatch.setattr(launching, "_arguments_of_launcher", lambda: ["--num_processes", "2", "-m", "stages", "run", "x.yaml"])
    monkeypatch.setattr(os, "execve", lambda path, command, given: started.append(command[1:]) or None)
    launching.start_missing_processes()
    assert started == [["-m", "stages.process.launching", "--num_processes", "2", "-m", "stages", "run", "x.yaml"]]
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert not process_environment.is_short_of_processes()
