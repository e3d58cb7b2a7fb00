"""Run a command on a pretended GPU: tensors on ``cuda`` lie in CPU memory and are computed by CPU kernels.

    .venv/bin/python tests/pretend_gpu/run.py -m pytest -m gpu tests/gpu/test_decoding.py

It needs a PyTorch without CUDA, a C++ compiler, and a processor of type x86-64. The command is an invocation of this Python. All Python
processes that it starts have the device. PRETEND_GPU_GIB sets its memory (80).

It finds tensors on different devices, operations that make the CPU wait while a graph is recorded, graphs that read freed memory,
arguments that the attention kernels reject, and every branch that only runs on a GPU. It does not find wrong CUDA kernels or slow ones.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

HERE = Path(__file__).resolve().parent


def library() -> Path:
    """The device as a shared library, compiled for the installed PyTorch if necessary. Raises RuntimeError if it cannot be compiled."""
    spec = find_spec("torch")  # found, not imported: the library must be loaded before torch
    assert spec is not None and spec.origin is not None
    torch = Path(spec.origin).parent
    source = HERE / "device.cpp"
    key = hashlib.sha256(source.read_bytes() + f"{version('torch')} {torch}".encode()).hexdigest()[:16]
    made = Path(tempfile.gettempdir()) / f"pretend-gpu-{key}.so"
    if not made.exists():
        part = made.with_suffix(f".{os.getpid()}")
        paths = [f"-I{torch / 'include'}", str(source), f"-L{torch / 'lib'}", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{torch / 'lib'}"]
        try:
            done = subprocess.run(
                ["g++", "-O1", "-std=c++20", "-fPIC", "-shared", *paths, "-o", str(part)], capture_output=True, text=True, check=False
            )
        except OSError as error:
            raise RuntimeError(f"the pretended GPU needs g++: {error}") from error
        if done.returncode:
            raise RuntimeError(f"the pretended GPU does not compile:\n{done.stderr[-2000:]}")
        part.rename(made)
    return made


def environment() -> dict[str, str]:
    """The environment of a process that has the device. Raises RuntimeError like ``library``."""
    paths = [str(HERE / "site"), str(HERE.parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    programs = os.pathsep.join([str(HERE / "bin"), os.environ.get("PATH", os.defpath)])  # nvidia-smi
    own = {"PRETEND_GPU": str(library()), "TORCHDYNAMO_DISABLE": "1", "PYTHONPATH": os.pathsep.join(paths), "PATH": programs}
    return {**os.environ, **own}


if __name__ == "__main__":
    os.execve(sys.executable, [sys.executable, *sys.argv[1:]], environment())
