"""Several vLLM servers used as one. Prompts are distributed round-robin; a server that dies is left out, or restarted.

Sampling continues as long as at least one server is left. With several processes, each has its own ``Servers``. A process that loses a
server tells the others at the next ``share_losses``.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from typing import TypeVar

from stages.config import GenerationSettings, Vllm
from stages.engines.vllm_client import Completed, Lost, VllmClient
from stages.engines.vllm_start import StartedServer
from stages.errors import LaunchError
from stages.sampling.generation import Finished, OnFinished, StopTokens, episode_seed
from stages.sampling.sampler import SamplerLost

RESTARTS = 3  # the most restarts of a started server; if it dies more often, the run gives up

Result = TypeVar("Result")


class Servers:
    """The servers in use. ``say``: prints a message to the user. ``started``: the server that this run started, if any."""

    def __init__(
        self, urls: Sequence[str], settings: Vllm, key: str | None, *, say: Callable[[str], None], started: StartedServer | None = None
    ) -> None:
        self.settings, self.started, self._key, self._say = settings, started, key, say
        self.clients = [self.client(url) for url in urls]
        self.left_out: list[dict[str, str]] = []
        self.restarts = 0
        self._shared = 0  # number of lost servers in left_out that all processes know
        self._closed = threading.Event()

    def close(self) -> None:
        """Cancel all requests and close the connections. It does not end a started server; the code that started it does."""
        self._closed.set()
        for client in list(self.clients):
            client.close()

    def share_losses(self, gather: Callable[[list[dict[str, str]]], list[list[dict[str, str]]]]) -> None:
        """Leave out, on every process, the servers that any process has lost since the last call.

        Call it on every process. ``gather``: returns the values of all processes (``Runtime.gather``).
        """
        for losses in gather(self.left_out[self._shared :]):
            for lost in losses:
                client = next((client for client in self.clients if client.url == lost["server"]), None)
                if client is not None:
                    self.leave_out(client, lost["reason"])
        self._shared = len(self.left_out)

    def use(self, urls: Sequence[str]) -> None:
        """Use exactly the servers with these URLs, in this order. Another process may have left out others, or restarted one."""
        known = {client.url: client for client in self.clients}
        for url in known.keys() - set(urls):
            known[url].close()
        self.clients = [known.get(url) or self.client(url) for url in urls]

    def client(self, url: str) -> VllmClient:
        """A new client of the server ``url``."""
        return VllmClient(url, self.settings, self._key)

    def leave_out(self, client: VllmClient, why: str) -> None:
        """Continue without this server, and tell the user."""
        if client not in self.clients:
            return
        self.clients.remove(client)
        client.close()
        self.left_out.append({"server": client.url, "reason": why})
        if (self.clients or self.started is None) and not self._closed.is_set():
            total = len(self.clients) + len(self.left_out)
            self._say(f"the vLLM server {client.url} is lost ({why}). {len(self.clients)} of {total} servers are left")

    def on_each(self, action: Callable[[VllmClient], Result]) -> dict[str, Result]:
        """Run ``action`` on every server; returns its results by server URL.

        A server that is lost during the action is left out. Raises SamplerLost if no server is left.
        """
        results = {}
        for client in list(self.clients):
            try:
                results[client.url] = action(client)
            except Lost as error:
                self.leave_out(client, str(error))
        self.require_one({})
        return results

    def require_one(self, completed: dict[int, Finished]) -> None:
        """Raise SamplerLost if no server is left. ``completed``: the finished completions by prompt index, for the error."""
        if not self.clients:
            last = self.left_out[-1]
            raise SamplerLost(f"no vLLM server is left. The last one, {last['server']}, was lost because: {last['reason']}", completed)

    def restart(self) -> bool:
        """Restart the server that this run started after it died; returns whether it runs again."""
        if self.started is None or self.restarts >= RESTARTS or self._closed.is_set():
            return False
        self.restarts += 1
        self._say(f"the vLLM server that this run started died ({self.left_out[-1]['reason']}); starting it again")
        self.started.end()
        try:
            self.started.start()
        except LaunchError as error:
            self._say(str(error))
            return False
        self.clients = [self.client(self.started.url)]
        return True

    def complete(
        self,
        model: str,
        prompts: Sequence[Sequence[int]],
        settings: GenerationSettings,
        seeds: Sequence[int],
        stop: StopTokens,
        *,
        revive: Callable[[], bool] = lambda: False,
        on_finished: OnFinished | None = None,
    ) -> list[Finished]:
        """Sample a completion for each prompt (token ids). If a server dies, the others get its prompts, with the same seeds.

        ``model``: the adapter's name on the servers; empty: the base model of each server, whose names may differ.
        ``revive``: called if no server is left; it returns whether a server with the model is available again. ``on_finished`` gets every
        completion when it arrives. Raises SamplerLost if no server is left, ModelError if a server refuses a request.
        """
        done: dict[int, Finished] = {}

        def ask(row: int, client: VllmClient) -> Completed:
            return _complete(client, model or client.base_model(), prompts[row], settings, seeds[row], stop)

        def arrived(row: int, one: Completed) -> None:
            done[row] = Finished(row, one.tokens, one.logprobs, one.stopped)
            if on_finished is not None:
                on_finished([done[row]])

        while len(done) < len(prompts):
            if not self.clients and not revive():
                self.require_one(done)
            turn = list(self.clients)
            self._ask_all([(row, turn[row % len(turn)]) for row in range(len(prompts)) if row not in done], ask, arrived)
        return [done[row] for row in range(len(prompts))]

    def _ask_all(
        self,
        jobs: list[tuple[int, VllmClient]],
        ask: Callable[[int, VllmClient], Completed],
        arrived: Callable[[int, Completed], None],
    ) -> None:
        """Send all jobs (row, server) in parallel and pass each completion to ``arrived``. Rows of a lost server get no completion."""
        pool = ThreadPoolExecutor(self.settings.concurrency, thread_name_prefix="vllm")
        futures: dict[Future[Completed], tuple[int, VllmClient]] = {}
        try:
            futures = {pool.submit(ask, row, client): (row, client) for row, client in jobs}
            for future in as_completed(futures):
                row, client = futures[future]
                if future.cancelled():
                    continue
                try:
                    arrived(row, future.result())
                except Lost as error:
                    self.leave_out(client, str(error))  # this also makes the other threads of this server give up
                    for other in [other for other, (_, asked) in futures.items() if asked is client]:
                        other.cancel()
        except BaseException:
            # Waiting threads must not keep the process from ending, so close their connections.
            self.close()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
        pool.shutdown()


def _complete(
    client: VllmClient, model: str, prompt: Sequence[int], settings: GenerationSettings, seed: int, stop: StopTokens
) -> Completed:
    """Sample one completion.

    If late stop tokens apply only from ``settings.stop_after`` on, it takes two requests: one up to that position, and one from there.
    """
    most, early = settings.max_new_tokens, settings.stop_after
    if not stop.late or not early:
        return client.complete(model, prompt, settings, most=most, stop_ids=[*stop.anywhere, *stop.late], seed=seed)
    first = client.complete(model, prompt, settings, most=min(early, most), stop_ids=stop.anywhere, seed=seed)
    if first.stopped or len(first.tokens) >= most:
        return first
    rest = client.complete(
        model,
        [*prompt, *first.tokens],
        settings,
        most=most - len(first.tokens),
        stop_ids=[*stop.anywhere, *stop.late],
        seed=episode_seed(seed, 1),  # a different seed: with the same seed, the server would repeat the same random numbers
    )
    return Completed(first.tokens + rest.tokens, first.logprobs + rest.logprobs, rest.stopped)
