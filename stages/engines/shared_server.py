"""One started vLLM server for several models of a step, one after another. Models on the same base share the server.

The server starts again only for a model that it cannot serve: one with another base or dtype, or an adapter of a larger rank.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from stages.config import VllmStart
from stages.engines.vllm_start import Served, StartedServer, accepted_rank
from stages.models.adapters.stacks import ADAPTER_CONFIG, stack_of
from stages.registry.references import ResolvedModel


class SharedServer:
    """The server that the samplers of a step share. Only the first process has one.

    ``ranks``: for each base, the largest rank of an adapter that is expected on it, so that the server need not start again for it.
    """

    def __init__(self, ranks: dict[str, int]) -> None:
        self._ranks = ranks
        self._server: StartedServer | None = None

    def take(self, settings: VllmStart, served: Served, log: Path) -> StartedServer:
        """A server for ``served``: the running one, or a new one that is not started yet. A running one that does not fit is ended."""
        running = self._server
        if running is not None and running.is_running() and running.settings == settings and _serves(running.served, served):
            return running
        self.end()
        rank = max(served.lora_rank, self._ranks.get(served.model, 0))
        self._server = StartedServer(settings, replace(served, lora_rank=rank), log, outlives_sampler=True)
        return self._server

    def end(self) -> None:
        """End the server if one runs."""
        if self._server is not None:
            self._server.end()
            self._server = None


@contextmanager
def shared_server(models: Iterable[ResolvedModel]) -> Iterator[SharedServer]:
    """Context manager with a server for ``models``, which ends with the context."""
    server = SharedServer(expected_ranks(models))
    try:
        yield server
    finally:
        server.end()


def expected_ranks(models: Iterable[ResolvedModel]) -> dict[str, int]:
    """For each base with adapters among ``models``, the largest rank of the combined adapter of a model. By the base's path."""
    ranks: dict[str, int] = {}
    for model in models:
        stack = stack_of(model)
        rank = sum(_largest_rank(Path(adapter.path)) for adapter in stack.adapters)
        if rank:
            ranks[stack.base.path] = max(rank, ranks.get(stack.base.path, 0))
    return ranks


def _largest_rank(adapter: Path) -> int:
    """The largest rank of a module in an adapter's folder; 0 if it is not known here, e.g. on the Hub."""
    try:
        config = json.loads((adapter / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        return max(int(config["r"]), *map(int, (config.get("rank_pattern") or {}).values()), 0)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return 0


def _serves(running: Served, wanted: Served) -> bool:
    """Whether a server that was started for ``running`` can serve ``wanted``."""
    return replace(running, lora_rank=0) == replace(wanted, lora_rank=0) and accepted_rank(running.lora_rank) >= wanted.lora_rank
