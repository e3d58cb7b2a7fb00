"""A server with vLLM's HTTP interface, for tests: answers in the shapes that vLLM 0.32.0 gave (recorded.json), computed by plain peft.

    python stub_server.py --model FOLDER --port PORT [other arguments of vLLM, which are ignored]

Transformers and peft load the models and adapters from the same folders as vLLM would. Each token takes a forward pass over the full
sequence, one row at a time, without a cache.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import threading
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch

RECORDED: dict[str, Any] = json.loads((Path(__file__).parent / "recorded.json").read_text(encoding="utf-8"))


class StubServer:
    """Serves one folder.

    ``requests``: all requests so far, as (path, body). ``before``: called with each request; it may raise or sleep.
    """

    def __init__(self, model: str, *, port: int = 0, key: str | None = None, processed: bool = False) -> None:
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="eager").eval()
        self.adapted: dict[str, Any] = {}
        self.key, self.processed = key, processed
        self.requests: list[tuple[str, dict[str, Any]]] = []
        self.before: Callable[[str, dict[str, Any]], None] = lambda path, body: None
        self.ignores_adapters = False  # as a server whose adapters are stale
        self._lock = threading.Lock()
        self._connections: set[Any] = set()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def setup(self) -> None:
                super().setup()
                server._connections.add(self.connection)

            def do_GET(self) -> None:
                self.answer({})

            def do_POST(self) -> None:
                size = int(self.headers.get("Content-Length") or 0)
                self.answer(json.loads(self.rfile.read(size) or b"{}"))

            def answer(self, body: dict[str, Any]) -> None:
                path = self.path.partition("?")[0]
                if server.key and path.startswith("/v1") and self.headers.get("Authorization") != f"Bearer {server.key}":
                    status, content = 401, {"error": "Unauthorized"}
                else:
                    status, content = server.answer(path, body)
                data = content.encode() if isinstance(content, str) else json.dumps(content).encode()
                with suppress(BrokenPipeError, ConnectionError, OSError):
                    self.send_response(status)
                    self.send_header("Content-Type", "text/plain" if isinstance(content, str) else "application/json")
                    self.send_header("Content-Length", str(len(data)))
                    self.end_headers()
                    self.wfile.write(data)

            def log_message(self, *_: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"

    def start(self) -> StubServer:
        """Start to answer, in a thread of this process."""
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def die(self) -> None:
        """Close every connection and stop answering."""
        self.http.shutdown()
        self.http.server_close()
        for connection in list(self._connections):
            with suppress(OSError):
                connection.shutdown(2)

    # Answers

    def answer(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        self.requests.append((path, body))
        self.before(path, body)
        with self._lock:
            if path == "/health":
                return 200, ""
            if path == "/version":
                return 200, RECORDED["version"]
            if path == "/v1/models":
                return 200, RECORDED["models"]
            if path == "/v1/completions":
                return self._complete(body)
            if path == "/v1/load_lora_adapter":
                return self._load(body["lora_name"], body["lora_path"])
            if path == "/v1/unload_lora_adapter":
                known = self.adapted.pop(body["lora_name"], None)
                return (200, "Success") if known is not None else (404, RECORDED["unknown_adapter"])
            if path == "/collective_rpc" and body["method"] == "reload_weights":
                from transformers import AutoModelForCausalLM

                self.model = AutoModelForCausalLM.from_pretrained(body["kwargs"]["weights_path"], dtype=torch.float32).eval()
                return 200, RECORDED["reloaded"]
            if path in ("/reset_prefix_cache", "/sleep", "/wake_up"):
                return 200, RECORDED[path.removeprefix("/")]
            return 404, {"detail": "Not Found"}

    def _load(self, name: str, folder: str) -> tuple[int, Any]:
        from peft import PeftModel

        if not (Path(folder) / "adapter_config.json").exists():
            return 404, RECORDED["no_adapter_folder"]
        if name in self.adapted:
            return 400, RECORDED["adapter_is_there"]
        self.adapted[name] = PeftModel.from_pretrained(copy.deepcopy(self.model), folder).eval()
        return 200, "Success"

    def _complete(self, body: dict[str, Any]) -> tuple[int, Any]:
        if body["model"] != "base" and body["model"] not in self.adapted:
            return 404, RECORDED["unknown_model"]
        model = self.model if self.ignores_adapters else self.adapted.get(body["model"], self.model)
        tokens, logprobs, reason = self._sample(model, body)
        answer = copy.deepcopy(RECORDED["completion"])
        answer["model"] = body["model"]
        choice = answer["choices"][0]
        choice |= {"token_ids": tokens, "prompt_token_ids": body["prompt"], "finish_reason": reason}
        choice["logprobs"]["token_logprobs"] = logprobs
        return 200, answer

    @torch.no_grad()
    def _sample(self, model: Any, body: dict[str, Any]) -> tuple[list[int], list[float], str]:
        generator = torch.Generator().manual_seed(body["seed"])
        ids, tokens, logprobs = list(body["prompt"]), [], []
        temperature = body["temperature"]
        for _ in range(body["max_tokens"]):
            logits = model(input_ids=torch.tensor([ids])).logits[0, -1].float()
            scaled = logits / (temperature or 1.0)
            if body["top_k"]:
                scaled = scaled.masked_fill(scaled < scaled.topk(body["top_k"]).values[-1], -torch.inf)
            drawn = torch.multinomial(scaled.softmax(-1), 1, generator=generator)
            token = int(logits.argmax() if temperature == 0 else drawn)
            ids.append(token)
            tokens.append(token)
            logprobs.append(float((scaled if self.processed else logits).log_softmax(-1)[token]))
            if token in body["stop_token_ids"]:
                return tokens, logprobs, "stop"
        return tokens, logprobs, "length"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--logprobs-mode", default="raw_logprobs")
    options, _ = parser.parse_known_args()
    torch.set_num_threads(1)
    server = StubServer(
        options.model, port=options.port, key=os.environ.get("VLLM_API_KEY"), processed=options.logprobs_mode != "raw_logprobs"
    )
    server.http.serve_forever()


if __name__ == "__main__":
    main()
