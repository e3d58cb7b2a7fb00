"""Sampling from vLLM servers that have the model's weights. Adapters are loaded by name; full weights are reloaded.

After each transfer, a probe checks that the servers and the local model compute the same log-probabilities. The probe is kept: a server
that gets the same weights later, when the local model has changed, is compared with it.
"""

from __future__ import annotations

import json
import math
import secrets
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from stages.config import GenerationSettings, Vllm
from stages.engines.vllm_client import Completed, Lost, VllmClient, logprobs_mode
from stages.engines.vllm_servers import Servers
from stages.errors import ModelError, TrainingError
from stages.json_types import JsonObject
from stages.models.adapters.served import updates_of, write_adapter
from stages.models.parts import evaluation_mode
from stages.models.passes.responses import Policy, sequence_batch
from stages.models.quiet import quiet_transformers
from stages.models.sharding import unsharded_state_dict
from stages.process.runtime import Runtime
from stages.registry.references import ResolvedModel
from stages.sampling.generation import Generated, OnFinished, ending_tokens, joined, require_room
from stages.sampling.support import plain_model, weight_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from stages.model_types import TransformersModel

PROBE_PROMPT, PROBE_TOKENS = 8, 16  # tokens of the probe's prompt and of its completion
WEIGHTS, PROBE = "weights", "probe.json"  # what save_weights writes
FP32_BOUND, ROUNDED_BOUND = 1e-3, 0.1  # bounds on the mean difference in fp32 and in lower precision, in nats per token
NOT_PROMISED = (
    "vLLM's completions depend on its version, on the hardware and on the batching of requests. So the same seeds may give other "
    "completions on another system, and they differ from those of the local sampler. Seeds, prompts and settings do not change."
)


@dataclass(frozen=True)
class Weights:
    """How the model's weights reach the servers.

    ``kind``: ``adapter`` (loaded by name), ``full`` (all weights, reloaded), or ``base`` (the servers already have them). ``merged``:
    adapters that are merged into the local weights, but not into the weights of the servers. ``base``: path of the base model.
    """

    kind: str
    merged: tuple[ResolvedModel, ...] = ()
    base: str = ""


@dataclass(frozen=True)
class Probe:
    """A completion by the weights that the servers have: its token ids, and its log-probabilities by the local model."""

    tokens: list[int]
    logprobs: list[float]


class VllmSampler:
    """Completes prompts on vLLM servers. Every process of a run has one sampler; only the first process transfers weights."""

    is_local = False

    def __init__(
        self,
        policy: Policy,
        tokenizer: PreTrainedTokenizerBase,
        settings: Vllm,
        servers: Servers,
        weights: Weights,
        *,
        runtime: Runtime,
        dtype: torch.dtype,
        folder: Path,
    ) -> None:
        self.policy, self.tokenizer, self.servers, self.weights = policy, tokenizer, servers, weights
        self._runtime, self._dtype, self._folder = runtime, dtype, folder
        self._run = f"tristage-{secrets.token_hex(4)}"  # a unique name, because several runs may use one server
        self._transfers = 0
        self._model = ""  # the adapter's name on the servers; empty: the servers' base model
        self._current: Path | None = None  # files of the weights that the servers have; on the first process only
        self._probe = Probe([], [])
        self._version = ""
        is_rounded = dtype != torch.float32 or any(not parameter.is_floating_point() for parameter in policy.model.parameters())
        self._bound = settings.probe_bound or (ROUNDED_BOUND if is_rounded else FP32_BOUND)

    # Weights

    def take_weights(self) -> None:
        """Send the current weights to the servers and check them with a probe.

        Raises TrainingError if a server's log-probabilities of the probe differ from those of the local model.
        """
        self.policy.activate()
        state = unsharded_state_dict(self.policy.model) if self.weights.kind == "full" else None
        updates = updates_of(self.policy.model, self.weights.merged) if self.weights.kind == "adapter" else {}

        def write(folder: Path) -> None:
            if self.weights.kind == "adapter":
                write_adapter(updates, folder, self.weights.base)
            elif self.weights.kind == "full":
                write_full_weights(self.policy.model, folder, self._dtype, state)

        probes = self._transfer(write)
        for url, answer in probes.items():
            self._probe = Probe(answer.tokens, self._own_logprobs(answer.tokens))
            self._compare(url, answer)

    def save_weights(self, folder: Path) -> None:
        """Copy the weights of the last transfer and their probe into ``folder``. Call it on the first process only."""
        assert self._current is not None
        shutil.copytree(self._current, folder / WEIGHTS)
        (folder / PROBE).write_text(json.dumps(vars(self._probe)), encoding="utf-8")

    def restore_weights(self, folder: Path) -> None:
        """Send the weights that ``save_weights`` copied into ``folder`` to the servers. Call it on every process.

        Raises TrainingError if a server's log-probabilities of the probe differ from the saved ones.
        """
        self._probe = Probe(**json.loads((folder / PROBE).read_text(encoding="utf-8")))
        probes = self._transfer(lambda target: shutil.copytree(folder / WEIGHTS, target))
        for url, answer in probes.items():
            self._compare(url, answer)

    def _transfer(self, write: Callable[[Path], object]) -> dict[str, Completed]:
        """Load the weights that ``write(folder)`` writes on every server. Returns the probe's completion by server URL.

        Call it on every process; only the first one writes and loads.
        """
        self.servers.share_losses(self._runtime.gather)
        self._transfers += 1
        self._model, probes = self._runtime.decide(lambda: self._send(write))
        self.servers.use(list(probes))
        return probes

    def _send(self, write: Callable[[Path], object]) -> tuple[str, dict[str, Completed]]:
        """Write the weights and load them on every server. Call it on the first process only.

        Returns (adapter name on the servers, empty for the base model; the probe's completion by server URL).
        """
        self._wake()
        self._replace_dead()
        before, old_folder = self._model, self._current
        name = f"{self._run}-{self._transfers}"
        if self.weights.kind != "base":
            self._current = self._folder / name
            write(self._current)
        probes = self.servers.on_each(lambda client: self._equip(client, name))
        if self.weights.kind == "adapter" and before:
            self.servers.on_each(lambda client: client.unload_adapter(before))
        if old_folder is not None:
            shutil.rmtree(old_folder, ignore_errors=True)
        named = name if self.weights.kind == "adapter" else ""
        return named, {client.url: probes[client.url] for client in self.servers.clients}

    def _equip(self, client: VllmClient, name: str) -> Completed:
        """Load the current weights on one server, and sample the probe from it."""
        self._version = client.version()
        if self.weights.kind == "adapter":
            assert self._current is not None
            client.load_adapter(name, self._current)
        elif self.weights.kind == "full":
            assert self._current is not None
            client.reload_weights(self._current)
        served = name if self.weights.kind == "adapter" else client.base_model()
        settings = GenerationSettings(temperature=self.policy.temperature)  # without top-k and top-p
        return client.complete(served, self._probe_prompt(), settings, most=PROBE_TOKENS, stop_ids=[], seed=0)

    def _probe_prompt(self) -> list[int]:
        """The token ids of the probe's prompt, spread over the vocabulary."""
        size = min(len(self.tokenizer), weight_of(plain_model(self.policy.model).get_input_embeddings()).shape[0])
        return torch.linspace(1, size - 1, PROBE_PROMPT).long().tolist()

    def _own_logprobs(self, tokens: list[int]) -> list[float]:
        """The local model's log-probabilities of ``tokens`` after the probe's prompt."""
        with evaluation_mode(self.policy.model), torch.inference_mode():
            batch = sequence_batch([self._probe_prompt()], [tokens], self.tokenizer.pad_token_id, self.policy.device)
            own: list[float] = self.policy.logprobs(batch).float().cpu().tolist()
        return own

    def _compare(self, url: str, answer: Completed) -> None:
        """Compare a server's log-probabilities of the probe with the kept ones. Raises TrainingError if they differ too much.

        Only the first tokens that both completions share can be compared. If there are none, the server has other weights.
        """
        pairs = list(zip(self._probe.tokens, answer.tokens, strict=False))
        shared = next((index for index, (kept, new) in enumerate(pairs) if kept != new), len(pairs))
        differences = [abs(kept - new) for kept, new in zip(self._probe.logprobs[:shared], answer.logprobs[:shared], strict=True)]
        gap = sum(differences) / shared if shared else math.inf
        if not gap <= self._bound:
            raise TrainingError(
                f"the sampler does not have the policy's weights: on a probe of {max(1, shared)} tokens the log-probabilities of the "
                f"vLLM server {url} differ from the trainer's by {gap:.3g} nats per token (bound {self._bound:g}). Does it serve the "
                f"policy's base model, in the same dtype, with --logprobs-mode {logprobs_mode(self.policy.temperature)}? To "
                "allow a larger difference, set generation.engine.vllm.probe_bound"
            )

    # Sampling

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        settings: GenerationSettings,
        seeds: Sequence[int],
        *,
        on_finished: OnFinished | None = None,
    ) -> Generated:
        """Sample one completion for each prompt (token ids), with one seed per prompt. The tensors of the result are on the CPU.

        Raises SamplerLost if no server is left, ModelError if a prompt is too long or a server refuses a request.
        """
        if len(seeds) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts and {len(seeds)} seeds")
        require_room(self.policy.model, prompts, settings)
        stop = ending_tokens(self.policy.model, self.tokenizer, settings)
        made = self.servers.complete(
            self._model,
            prompts,
            settings,
            seeds,
            stop,
            # Several processes must restart a server together, so the caller does that (``revive``).
            revive=lambda: self._runtime.num_processes == 1 and self.revive(),
            on_finished=on_finished,
        )
        return joined(prompts, made, self.tokenizer.pad_token_id)

    def revive(self) -> bool:
        """Restart the server that this run started, and load the weights of the last transfer. Call it on every process.

        Returns whether it can sample again. The local model is not used, so it may be training. Raises TrainingError if the server's
        log-probabilities of the probe differ from the kept ones.
        """
        self.servers.share_losses(self._runtime.gather)
        probes = self._runtime.decide(self._restart)
        self.servers.use(list(probes))
        for url, answer in probes.items():
            self._compare(url, answer)
        return bool(probes)

    def _restart(self) -> dict[str, Completed]:
        """Call it on the first process only. Returns the probe's completion by server URL; empty if no server can be used."""
        if not self.servers.restart():
            return {}
        (client,) = self.servers.clients
        try:
            return {client.url: self._equip(client, self._model)}
        except Lost as error:
            self.servers.leave_out(client, str(error))
            return {}

    # A GPU shared with the run

    def sleep(self) -> None:
        """Let a started server on the run's GPU release its GPU memory."""
        self._runtime.wait_for_everyone()  # another process may still be sampling
        started = self.servers.started
        if started is not None and started.shares_gpu and not started.sleeps:
            self.servers.on_each(lambda client: client.sleep())
            started.sleeps = True

    def _wake(self) -> None:
        started = self.servers.started
        if started is None:
            return
        if started.sleeps and started.is_running():
            self.servers.on_each(lambda client: client.wake_up())
        started.sleeps = False

    def _replace_dead(self) -> None:
        """Restart the server that this run started, if it died during training."""
        started = self.servers.started
        if started is None or started.is_running():
            return
        for client in list(self.servers.clients):
            self.servers.leave_out(client, "its process ended")
        if self.servers.restart():
            self._model = ""  # a new server has no old adapter to unload

    def close(self) -> None:
        """Cancel all requests, unload this run's adapter from servers that stay, and remove the adapter's files.

        A server that stays and shares the run's GPU releases its GPU memory.
        """
        urls, started = [client.url for client in self.servers.clients], self.servers.started
        self.servers.close()
        if self._runtime.is_main and (started is None or started.outlives_sampler):
            for url in urls:
                client = self.servers.client(url)
                try:
                    if self._model:
                        client.unload_adapter(self._model)
                    if started is not None and started.shares_gpu and not started.sleeps:
                        client.sleep()
                        started.sleeps = True
                except Lost:
                    continue
                finally:
                    client.close()
        if self._runtime.is_main:
            shutil.rmtree(self._folder, ignore_errors=True)

    def report(self) -> JsonObject:
        """For the run's summary: the engine, the servers, lost servers, restarts, transfers, and the limits of reproducibility."""
        return {
            "engine": "vllm",
            "version": self._version,
            "servers": [client.url for client in self.servers.clients],
            "left_out": self.servers.left_out,
            "restarts": self.servers.restarts,
            "weights": self.weights.kind,
            "transfers": self._transfers,
            "not_promised": NOT_PROMISED,
        }


def write_full_weights(model: TransformersModel, folder: Path, dtype: torch.dtype, state: dict[str, torch.Tensor] | None) -> None:
    """Write the full weights in ``dtype`` in transformers' format.

    ``state``: the unsharded state dict, if the model is sharded over processes; None: take it from ``model``. Raises ModelError if the
    model has peft adapters.
    """
    if hasattr(model, "peft_config"):
        raise ModelError("a model with adapters cannot be sent as full weights; its adapter is loaded by name")
    state = model.state_dict() if state is None else state
    cast = {name: value.to(dtype) if value.is_floating_point() else value for name, value in state.items()}
    with quiet_transformers():
        model.save_pretrained(str(folder), state_dict=cast)
