"""Checks that an exported model works in other programs: ``transformers serve``, an endpoint judge, and lm-eval.

    python tests/benchmarks/ecosystem.py REF [--home DIR]        for example quickstart/aligned

The script exports REF, serves it on this machine, sends it a chat request by the OpenAI protocol, lets an ``EndpointClient`` judge two
texts with it, and runs lm-eval on a task of local files. lm-eval and the packages of the server are installed into a separate environment
that also sees the packages of this one. Only packages are downloaded. vLLM is not run, because its wheels need a GPU.

Time: a few minutes for the environment, the first time only; the rest depends on the model. Result: printed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import site
import socket
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path

import httpx2

from stages.judges.config import EndpointJudge
from stages.judges.endpoint import Comparison, EndpointClient

TASK = """
task: tristage_local
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{prompt}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{label}}"
metric_list: [{metric: acc}]
"""
ROWS = [
    {"prompt": "The plot is clumsy. I", "choices": [" regretted it.", " adored it."], "label": 0},
    {"prompt": "The cast is brilliant. I", "choices": [" hated it.", " enjoyed it."], "label": 1},
]


def environment(folder: Path) -> Path:
    """The Python of an environment with lm-eval and the server's packages. All other packages are those of this environment."""
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
        packages = folder / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
        (packages / "this.pth").write_text("\n".join(site.getsitepackages()) + "\n")
        subprocess.run([python, "-m", "pip", "install", "-q", "lm-eval", "fastapi", "uvicorn", "openai"], check=True)
    return python


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ref")
    parser.add_argument("--home", default="outputs")
    parser.add_argument("--environment", type=Path, default=Path(tempfile.gettempdir()) / "tristage-ecosystem")
    chosen = parser.parse_args()
    python = environment(chosen.environment)
    offline = {**os.environ, "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryDirectory() as scratch:
        model = Path(scratch) / "model"
        subprocess.run([sys.executable, "-m", "stages", "models", "export", chosen.ref, str(model), "--home", chosen.home], check=True)
        port = free_port()
        start = "import sys; sys.argv[0] = 'transformers'; from transformers.cli.transformers import main; main()"
        serve = [str(python), "-c", start, "serve", str(model), "--port", str(port), "--device", "cpu"]
        server = subprocess.Popen(serve, env=offline, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            address = f"http://localhost:{port}/v1"
            wait_for(f"http://localhost:{port}/health", server)
            ask = {"model": str(model), "messages": [{"role": "user", "content": "Review the music of the drama Silent Garden. Be warm."}]}
            reply = httpx2.post(f"{address}/chat/completions", json={**ask, "max_tokens": 48}, timeout=120)
            reply.raise_for_status()
            print("transformers serve:", reply.json()["choices"][0]["message"]["content"])
            judge = EndpointJudge(endpoint=address, model=str(model), max_failed_share=1.0, concurrency=1, timeout_seconds=120)
            with EndpointClient(judge, key=None) as client:
                client.compare([Comparison("a", "b", "c")])
                print("judge:", {name: value for name, value in client.tally.as_json(judge).items() if value})
        finally:
            server.terminate()
            server.wait()
        task, data = Path(scratch) / "tasks", Path(scratch) / "rows.jsonl"
        task.mkdir()
        data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
        (task / "local.yaml").write_text(TASK.replace("DATA", str(data)))
        command = [str(python), "-m", "lm_eval", "--model", "hf", "--model_args", f"pretrained={model},dtype=float32", "--device", "cpu"]
        command += ["--tasks", "tristage_local", "--include_path", str(task), "--batch_size", "2"]
        done = subprocess.run(command, env=offline, capture_output=True, text=True, check=False)
        match = re.search(r"^\|tristage_local.*$", done.stdout, re.MULTILINE)
        print("lm-eval:", match[0] if match else f"no result\n{done.stdout[-1000:]}{done.stderr[-2000:]}")


def wait_for(address: str, server: subprocess.Popen[bytes]) -> None:
    """Wait until the server answers. Exits if the server ends or does not answer within three minutes."""
    for _ in range(180):
        if server.poll() is not None:
            raise SystemExit(f"the server ended with status {server.returncode}")
        try:
            if httpx2.get(address, timeout=5).status_code == 200:
                return
        except httpx2.TransportError:
            pass
        time.sleep(1)
    raise SystemExit("the server did not answer within three minutes")


if __name__ == "__main__":
    main()
