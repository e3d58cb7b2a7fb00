"""The HTTP client of one vLLM server: completions from token ids, loading of adapters and weights, sleep and wake-up.

The endpoints and their answers are those of vLLM 0.32 (docs/vllm.md). A server that does not answer after all attempts counts as lost
(``Lost``). A refused request raises ModelError.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from stages.config import GenerationSettings, Vllm
from stages.errors import ModelError
from stages.json_types import JsonObject
from stages.process.remote import GaveUp, JsonClient, Refused

TESTED_VERSIONS = ("0.32",)
"""vLLM releases that are tested. Other releases are refused, because their answers may differ."""

Answer = TypeVar("Answer")


class Lost(Exception):
    """A server gave no answer after all attempts. The message gives the error of the last attempt."""


@dataclass(frozen=True)
class Completed:
    """A completion from a server: token ids, the log-probability of each token, and whether a stop token ended it."""

    tokens: list[int]
    logprobs: list[float]
    stopped: bool


class VllmClient:
    """The client of one server. It is thread-safe."""

    def __init__(self, url: str, settings: Vllm, key: str | None) -> None:
        self.url, self.settings = url.rstrip("/").removesuffix("/v1"), settings
        self._base_model = ""  # empty: not asked yet
        self._client = JsonClient(
            key=key,
            timeout=settings.timeout_seconds,
            retries=settings.retries,
            backoff_seconds=settings.backoff_seconds,
            jitter=0.2,
            connections=settings.concurrency,
        )

    def close(self) -> None:
        """Close the connections. Threads that wait for another attempt give up."""
        self._client.stop()
        self._client.close()

    # Version and model

    def version(self) -> str:
        """The server's version. Raises ModelError if that version is not tested, Lost if the server does not answer."""
        version = str(self._get("/version", lambda answer: _field(answer, "version")))
        if ".".join(version.split(".")[:2]) not in TESTED_VERSIONS:
            raise ModelError(
                f"the vLLM server {self.url} has version {version}; this release is tested with {', '.join(TESTED_VERSIONS)}. Other "
                f"versions may answer the same request differently. Install vllm=={TESTED_VERSIONS[-1]}.*"
            )
        return version

    def base_model(self) -> str:
        """The name of the server's base model, without an adapter. Only the first call asks the server.

        Raises ModelError if there is none, Lost without an answer.
        """
        if self._base_model:
            return self._base_model
        listed = self._get("/v1/models", lambda answer: _field(answer, "data"))
        names = [str(one["id"]) for one in listed if not one.get("parent")]
        if not names:
            raise ModelError(f"the vLLM server {self.url} lists no base model under /v1/models; start it with --model BASE (docs/vllm.md)")
        self._base_model = names[0]
        return self._base_model

    # Sampling

    def complete(
        self, model: str, prompt: Sequence[int], settings: GenerationSettings, *, most: int, stop_ids: Sequence[int], seed: int
    ) -> Completed:
        """Sample up to ``most`` tokens after ``prompt`` (token ids). Only ``stop_ids`` end the completion earlier.

        The server's logprobs mode decides the temperature of the log-probabilities (see ``logprobs_mode``). Raises Lost if the server does
        not answer. Raises ModelError if it refuses the request or allows fewer tokens.
        """
        body = {
            "model": model,
            "prompt": list(prompt),
            "max_tokens": most,
            "temperature": settings.temperature,
            "top_k": settings.top_k,
            "top_p": settings.top_p,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "seed": seed,
            "stop_token_ids": list(stop_ids),
            "ignore_eos": True,  # if the eos token ends completions, it is in stop_token_ids
            "skip_special_tokens": False,
            "logprobs": 0,
            "return_token_ids": True,
        }
        completed = self._post("/v1/completions", body, lambda answer: _completed(answer, model))
        if not completed.stopped and len(completed.tokens) < most:
            raise ModelError(
                f"the vLLM server {self.url} ended a completion after {len(completed.tokens)} of {most} tokens without a stop token: it "
                "allows fewer; start it with a larger --max-model-len and --generation-config vllm"
            )
        return completed

    # Weights

    def load_adapter(self, name: str, folder: Path) -> None:
        """Load an adapter in peft format from ``folder``. The server must be able to read this path. Raises Lost, ModelError."""
        refusal = (
            "start it with --enable-lora, --max-lora-rank of at least the adapter's rank and VLLM_ALLOW_RUNTIME_LORA_UPDATING=True, and "
            "let it read the folder under the same path (generation.engine.vllm.adapter_folder)"
        )
        self._post("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(folder)}, lambda _: None, refusal)

    def unload_adapter(self, name: str) -> None:
        """Unload an adapter. A missing adapter causes no error. Raises Lost if the server does not answer."""
        try:
            self._client.post(f"{self.url}/v1/unload_lora_adapter", {"lora_name": name}, lambda _: None)
        except Refused:
            pass
        except GaveUp as error:
            raise Lost(str(error)) from error

    def reload_weights(self, folder: Path) -> None:
        """Replace the server's weights by the full weights in ``folder``, and clear its prefix cache. Raises Lost, ModelError."""
        refusal = "full weights need a server with VLLM_SERVER_DEV_MODE=1 that can read this folder under the same path; or train with lora"
        body: JsonObject = {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
        self._post("/collective_rpc", body, lambda _: None, refusal)
        self._post("/reset_prefix_cache", {}, lambda _: None, refusal)

    # A GPU shared with the run

    def sleep(self) -> None:
        """Move the server's weights out of GPU memory and discard its KV cache."""
        self._post("/sleep?level=1", {}, lambda _: None, "start it with --enable-sleep-mode and VLLM_SERVER_DEV_MODE=1")

    def wake_up(self) -> None:
        """Move the weights back into GPU memory."""
        self._post("/wake_up", {}, lambda _: None, "start it with --enable-sleep-mode and VLLM_SERVER_DEV_MODE=1")

    # Requests

    def _get(self, path: str, read: Callable[[object], Answer]) -> Answer:
        return self._answered(lambda: self._client.get(self.url + path, read), path, "")

    def _post(self, path: str, body: JsonObject, read: Callable[[object], Answer], advice: str = "") -> Answer:
        return self._answered(lambda: self._client.post(self.url + path, body, read), path, advice)

    def _answered(self, ask: Callable[[], Answer], path: str, advice: str) -> Answer:
        try:
            return ask()
        except Refused as error:
            key = "; the key comes from generation.engine.vllm.api_key_variable" if str(error).startswith("status 401") else ""
            further = f". Next: {advice}" if advice else ""
            raise ModelError(f"the vLLM server {self.url} refused {path} ({error}){key}{further}") from error
        except GaveUp as error:
            raise Lost(str(error)) from error


def logprobs_mode(temperature: float) -> str:
    """The server's ``--logprobs-mode`` with which its log-probabilities are those at ``temperature``, without top-k and top-p."""
    return "raw_logprobs" if temperature == 1 else "processed_logprobs"


def _field(answer: object, name: str) -> Any:
    if not isinstance(answer, dict) or name not in answer:
        raise GaveUp(f"an answer without {name!r}")
    return answer[name]


def _completed(answer: Any, model: str) -> Completed:
    """The completion in an answer of /v1/completions. Raises GaveUp if the answer has no valid completion of ``model``."""
    try:
        choice = answer["choices"][0]
        tokens = [int(token) for token in choice["token_ids"]]
        logprobs = [float(value) for value in choice["logprobs"]["token_logprobs"]]
        reason, served = choice["finish_reason"], answer["model"]
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise GaveUp(f"an answer without a valid completion: token ids and log-probabilities ({type(error).__name__}: {error})") from error
    if served != model:
        raise GaveUp(f"an answer from the model {served!r} instead of {model!r}")
    if reason not in ("stop", "length") or not tokens or len(tokens) != len(logprobs):
        raise GaveUp(f"a completion of {len(tokens)} tokens with {len(logprobs)} log-probabilities that ended by {reason!r}")
    if not all(map(math.isfinite, logprobs)):
        raise GaveUp("a completion with a log-probability that is not a finite number")
    return Completed(tokens, logprobs, reason == "stop")
