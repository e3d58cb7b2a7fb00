"""Opens the sampler that the settings ask for. Only this module imports all engines."""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal
from urllib.parse import urlsplit

from stages.config import GenerationSettings, Vllm, VllmStart
from stages.engines import shared_memory
from stages.engines.shared_server import SharedServer
from stages.engines.vllm_client import Lost, VllmClient, logprobs_mode
from stages.engines.vllm_sampler import VllmSampler, Weights, write_full_weights
from stages.engines.vllm_servers import Servers
from stages.engines.vllm_start import Served, StartedServer, wants_gpu
from stages.errors import LaunchError, ModelError
from stages.models.adapters.served import total_rank, updates_of
from stages.models.adapters.stacks import stack_of, trained_on
from stages.models.loaded import LoadedModel
from stages.models.loading import config_of
from stages.models.passes.responses import Policy
from stages.models.saving import save_tokenizer
from stages.models.sharding import unsharded_state_dict
from stages.process.environment import secret
from stages.process.runtime import Runtime
from stages.registry.references import ResolvedModel
from stages.sampling.sampler import LocalSampler
from stages.sampling.support import plain_model, weight_of
from stages.step import StepContext

if TYPE_CHECKING:
    from stages.model_types import TransformersModel
    from stages.sampling.sampler import Sampler

CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
"""Sizes of attention heads that vLLM's build for CPUs can compute (0.32)."""
Trains = Literal["nothing", "adapter", "full"]


def check_reachable(settings: GenerationSettings) -> None:
    """Check that at least one of the servers in ``url`` answers, and that the versions of those that answer are supported.

    Call it before a model is loaded. Raises LaunchError if no server answers, ModelError if a server has a version that is not tested.
    """
    vllm = settings.vllm
    if vllm is None or vllm.url is None:
        return
    reasons = []
    for url in vllm.url:
        client = VllmClient(url, vllm, _key(vllm))
        try:
            client.version()
        except Lost as error:
            reasons.append(f"{url} ({error})")
        finally:
            client.close()
    if len(reasons) == len(vllm.url):
        raise LaunchError(
            f"generation.engine.vllm.url: no server answers: {'; '.join(reasons)}. Start one (docs/vllm.md), or use start: {{}}"
        )


def _key(vllm: Vllm) -> str | None:
    return secret(vllm.api_key_variable) if vllm.api_key_variable is not None else None


@dataclass(frozen=True)
class Workplace:
    """Where a sampler works: its process, the log file of a started server, and a folder for the files that servers read.

    ``folder`` is used only if no better one exists (see ``_shared_folder``).
    """

    runtime: Runtime
    log: Path
    folder: Path


@contextmanager
def step_sampler(
    settings: GenerationSettings,
    loaded: LoadedModel,
    context: StepContext,
    *,
    trains: Trains = "nothing",
    policy: Policy | None = None,
    shared: SharedServer | None = None,
) -> Iterator[Sampler]:
    """``open_sampler`` in the folders of a step; the sampler's report is added to the run's summary."""
    workplace = Workplace(context.runtime, context.folder / "vllm.log", context.cache_folder / "served")
    with open_sampler(settings, loaded, workplace, trains=trains, policy=policy, shared=shared) as sampler:
        try:
            yield sampler
        finally:
            if settings.vllm is not None:
                context.sampling.append(sampler.report())


@contextmanager
def open_sampler(
    settings: GenerationSettings,
    loaded: LoadedModel,
    workplace: Workplace,
    *,
    trains: Trains = "nothing",
    policy: Policy | None = None,
    shared: SharedServer | None = None,
) -> Iterator[Sampler]:
    """Open the sampler that ``settings`` ask for, and close it at the end of the context.

    ``trains``: the part of the model that will be trained. If it is not "nothing", the caller must call ``take_weights`` before it
    samples. ``policy``: the model as a policy, if the caller has one. ``shared``: a started server stays there for the next sampler, unless
    it has the merged weights of this model.

    Raises LaunchError if no server can be started or reached, ModelError if a server cannot serve the model.
    """
    vllm = settings.vllm
    if vllm is None:
        yield LocalSampler(loaded.model, loaded.tokenizer)
        return

    check_reachable(settings)
    runtime = workplace.runtime
    policy = policy or Policy(loaded.model, temperature=1.0, autocast=None)
    policy.activate()
    location = (
        _shared_folder(vllm, workplace.folder, loaded.model) / f"{shared_memory.PREFIX}{runtime.decide(lambda: secrets.token_hex(6))}"
    )
    say = lambda line: runtime.console.print(line, style="yellow")  # noqa: E731
    with ExitStack() as stack:
        if runtime.is_main and location.parent == shared_memory.FOLDER:
            stack.enter_context(shared_memory.claimed(location))
        stack.callback(shutil.rmtree, location, ignore_errors=True)
        weights, served = _plan_weights(settings, loaded, trains, location, runtime)
        served = replace(served, logprobs_mode=logprobs_mode(policy.temperature))
        started, urls, key = None, vllm.url or [], _key(vllm)
        if vllm.start is not None:
            if runtime.is_main:
                started = _server_for(vllm.start, served, workplace.log, location, shared, stack)
                if not started.is_running():
                    runtime.console.print(f"starting a vLLM server (its log: {workplace.log})")
            urls, key = runtime.decide(lambda: _started(started))
        servers = Servers(urls, vllm, key, say=say, started=started)
        sampler = VllmSampler(policy, loaded.tokenizer, vllm, servers, weights, runtime=runtime, dtype=loaded.dtype, folder=location)
        stack.callback(sampler.close)
        if trains == "nothing":
            sampler.take_weights()
        yield sampler


def _server_for(
    settings: VllmStart, served: Served, log: Path, location: Path, shared: SharedServer | None, stack: ExitStack
) -> StartedServer:
    """The server for a sampler: of ``shared``, or one that ``stack`` ends. Call it on the first process only."""
    if shared is not None and not Path(served.model).is_relative_to(location):  # files in ``location`` are removed with the sampler
        return shared.take(settings, served, log)
    if shared is not None:
        shared.end()  # two servers may not fit into memory
    server = StartedServer(settings, served, log)
    stack.callback(server.end)
    return server


def _started(server: StartedServer | None) -> tuple[list[str], str]:
    assert server is not None
    if not server.is_running():
        server.start()
    return [server.url], server.key


def _plan_weights(
    settings: GenerationSettings, loaded: LoadedModel, trains: Trains, folder: Path, runtime: Runtime
) -> tuple[Weights, Served]:
    """Decide how the weights reach the servers, and what a started server must serve.

    If a started server cannot begin with the saved base model, this writes the current weights for it into ``folder``. Raises ModelError
    if a server cannot serve the model.
    """
    vllm, source = settings.vllm, loaded.source
    assert vllm is not None
    on_gpu = vllm.start is not None and wants_gpu(vllm.start, runtime.device.type)
    base, quantization = stack_of(source).base, source.input.quantization
    _refuse_quantization(quantization, vllm, on_gpu)
    if vllm.start is not None and not on_gpu:
        _refuse_head_size(base)
    served = Served(
        base.path,
        dtype=str(loaded.dtype).removeprefix("torch."),
        quantization=quantization,
        revision=base.input.revision if base.kind == "hub" else None,
        trust_remote_code=base.input.trust_remote_code,
        cuda_graphs=settings.cuda_graphs,
        on_gpu=on_gpu,
    )
    try:
        if trains == "full":
            raise ModelError("all weights train")
        merged = _merged_adapters(source) if loaded.merges_adapters and quantization == "none" else ()
        _same_rows(loaded.model, base)
        rank = total_rank(updates_of(loaded.model, merged))
    except ModelError as error:
        if trains == "adapter" or quantization != "none" or (vllm.start is None and trains == "nothing"):
            raise
        if trains == "nothing":
            runtime.console.print(f"vLLM serves {source.ref} with its adapters merged: {error}")
        if vllm.start is not None:
            _write_to_start(loaded, folder / "start", runtime)
        return Weights("full" if trains == "full" else "base"), replace(served, model=str(folder / "start"), revision=None)
    return Weights("adapter" if rank else "base", merged, base.path), replace(served, lora_rank=rank)


def _write_to_start(loaded: LoadedModel, folder: Path, runtime: Runtime) -> None:
    """Write the current model and its tokenizer for a server to start from. Call it on every process."""
    state = unsharded_state_dict(loaded.model)
    if runtime.is_main:
        write_full_weights(loaded.model, folder, loaded.dtype, state)
        save_tokenizer(loaded.tokenizer, folder)


def _merged_adapters(source: ResolvedModel) -> tuple[ResolvedModel, ...]:
    """The adapters that loading merged into the weights.

    Raises ModelError if ``source`` was trained on quantized base weights: no server has those weights in full precision.
    """
    adapters = stack_of(source).adapters
    if adapters and (trained := trained_on(source).quantization) != "none":
        raise ModelError(
            f"the adapter {source.ref!r} was trained on a base in {trained}, and no server has those weights in full precision. Export the "
            "merged model (stages models export) and name its folder"
        )
    return adapters


def _same_rows(model: TransformersModel, base: ResolvedModel) -> None:
    """Raise ModelError if the embedding and the saved base have different numbers of rows: a server that loads the base lacks the rows."""

    rows, saved = weight_of(plain_model(model).get_input_embeddings()).shape[0], int(config_of(base).get_text_config().vocab_size)
    if rows != saved:
        raise ModelError(
            f"the model has {rows} rows in its embedding, but its base {base.ref!r} has {saved}: tokens were added, and a vLLM server that "
            "loads the base has no rows for them. Export the merged model (stages models export) and name its folder"
        )


def _refuse_quantization(quantization: str, vllm: Vllm, on_gpu: bool) -> None:
    """Raise ModelError if a started server cannot load the base in the quantization that the recipe asks for."""
    if vllm.start is None or quantization == "none":
        return
    if quantization == "int8":
        raise ModelError(
            "vLLM cannot quantize weights to int8 while it loads them; use quantization: nf4 or none, or generation.engine: local"
        )
    if not on_gpu:
        raise ModelError("vLLM's build for CPUs has no bitsandbytes: remove quantization, or use generation.engine: local")


def _refuse_head_size(base: ResolvedModel) -> None:
    """Raise ModelError if vLLM's build for CPUs cannot compute the attention heads of the model."""
    config = config_of(base).get_text_config()
    heads = getattr(config, "num_attention_heads", None)
    if heads is None or getattr(config, "kv_lora_rank", None) is not None:  # no attention, or a latent one with other sizes
        return
    # The heads of layers may differ in width (Gemma 4).
    layers = getattr(config, "per_layer_config", None) or [config]
    sizes = {getattr(layer, "head_dim", None) or config.hidden_size // heads for layer in layers}
    if size := max(sizes - set(CPU_HEAD_SIZES), default=None):
        raise ModelError(
            f"the attention heads of {base.ref!r} have {size} dimensions, and vLLM's build for CPUs has only heads of "
            f"{', '.join(map(str, CPU_HEAD_SIZES))}. Use generation.engine: local, or a server on a GPU (generation.engine.vllm.url)"
        )


def _shared_folder(vllm: Vllm, folder: Path, model: TransformersModel) -> Path:
    """The folder in which servers read adapters and weights.

    It is ``adapter_folder`` of the settings if set. Otherwise it is shared memory, if all servers are on this machine and there is enough
    space. Otherwise it is ``folder``.
    """
    if vllm.adapter_folder is not None:
        return Path(vllm.adapter_folder).expanduser().absolute()
    are_here = all(urlsplit(url).hostname in ("127.0.0.1", "localhost", "::1") for url in vllm.url or ())
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    if are_here and shared_memory.FOLDER.is_dir() and shutil.disk_usage(shared_memory.FOLDER).free > 3 * size:
        return shared_memory.FOLDER
    return folder.absolute()
