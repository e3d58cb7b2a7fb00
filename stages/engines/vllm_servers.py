"""Several vLLM servers as one: prompts are dealt out in turn, a server that dies is left out (or started again), and at least one stays."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from typing import Any

from stages.config import GenerationSettings, Vllm
from stages.engines.vllm_client import Completed, Lost, VllmClient
from stages.engines.vllm_start import StartedServer
from stages.errors import LaunchError
from stages.sampling.generation import Finished, OnFinished, episode_seed
from stages.sampling.sampler import SamplerLost

RESTARTS = 3  # of a started server, after which its ends are no accident


class Servers:
    """The servers that answer. ``say`` tells the user; ``started`` is the one that this run started, where it did."""

    def __init__(
        self, urls: Sequence[str], settings: Vllm, key: str | None, *, say: Callable[[str], None], started: StartedServer | None = None
    ) -> None:
        self.settings, self.started, self._key, self._say = settings, started, key, say
        self.clients = [VllmClient(url, settings, key) for url in urls]
        self.left_out: list[dict[str, str]] = []
        self.restarts = 0

    def close(self) -> None:
        """Close the connections; the started server is ended by who started it."""
        for client in self.clients:
            client.close()

    def keep(self, urls: Sequence[str]) -> None:
        """Leave out those that another process of this run has left out."""
        self.clients = [client for client in self.clients if client.url in urls]

    def leave_out(self, client: VllmClient, why: str) -> None:
        """Go on without a server, and say so."""
        if client not in self.clients:
            return
        self.clients.remove(client)
        client.close()
        self.left_out.append({"server": client.url, "reason": why})
        if self.clients or self.started is None:
            total = len(self.clients) + len(self.left_out)
            self._say(f"the vLLM server {client.url} is lost ({why}); {len(self.clients)} of {total} are left")

    def on_each(self, action: Callable[[VllmClient], Any]) -> dict[str, Any]:
        """What ``action`` gives for every server, by its URL; one that gets lost over it is left out. Raises SamplerLost for the last."""
        found = {}
        for client in list(self.clients):
            try:
                found[client.url] = action(client)
            except Lost as error:
                self.leave_out(client, str(error))
        self.require_one({})
        return found

    def require_one(self, completed: dict[int, list[int]]) -> None:
        """Raise SamplerLost where no server is left."""
        if not self.clients:
            last = self.left_out[-1]
            raise SamplerLost(f"no vLLM server is left; the last one, {last['server']}, ended with: {last['reason']}", completed)

    def restart(self) -> bool:
        """Start the run's own server again after it died; whether that was done."""
        if self.started is None or self.restarts >= RESTARTS:
            return False
        self.restarts += 1
        self._say(f"the vLLM server that this run started died ({self.left_out[-1]['reason']}); starting it again")
        self.started.end()
        try:
            self.started.start()
        except LaunchError as error:
            self._say(str(error))
            return False
        self.clients = [VllmClient(self.started.url, self.settings, self._key)]
        return True

    def complete(
        self,
        model: str,
        prompts: Sequence[Sequence[int]],
        settings: GenerationSettings,
        seeds: Sequence[int],
        *,
        stop_ids: Sequence[int],
        late_stop_ids: Sequence[int],
        revive: Callable[[], bool] = lambda: False,
        on_finished: OnFinished | None = None,
    ) -> list[Completed]:
        """A completion for each prompt. Those of a server that dies are asked of the others, with the same seeds.

        ``revive``: called where none is left; whether there is one again, with the model loaded. ``on_finished`` gets every completion as
        it arrives. Raises SamplerLost, ModelError.
        """
        done: dict[int, Completed] = {}

        def ask(row: int, client: VllmClient) -> Completed:
            return _complete(client, model, prompts[row], settings, seeds[row], stop_ids, late_stop_ids)

        def arrived(row: int, one: Completed) -> None:
            done[row] = one
            if on_finished is not None:
                on_finished([Finished(row, one.tokens, one.stopped)])

        while len(done) < len(prompts):
            if not self.clients and not revive():
                self.require_one({row: one.tokens for row, one in done.items()})
            turn = list(self.clients)
            self._ask_all([(row, turn[row % len(turn)]) for row in range(len(prompts)) if row not in done], ask, arrived)
        return [done[row] for row in range(len(prompts))]

    def _ask_all(
        self,
        jobs: list[tuple[int, VllmClient]],
        ask: Callable[[int, VllmClient], Completed],
        arrived: Callable[[int, Completed], None],
    ) -> None:
        """Hand what the servers answer to ``arrived``; rows whose server got lost have no answer."""
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
                    self.leave_out(client, str(error))  # its other threads give up with it
                    for other, (_, asked) in futures.items():
                        if asked is client:
                            other.cancel()
        except BaseException:
            # Threads that still wait for an answer must not keep the process: their connections are closed under them.
            self.close()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
        pool.shutdown()


def _complete(
    client: VllmClient,
    model: str,
    prompt: Sequence[int],
    settings: GenerationSettings,
    seed: int,
    stop_ids: Sequence[int],
    late_stop_ids: Sequence[int],
) -> Completed:
    """One completion. Tokens that end it only from ``stop_after`` on take a second request: up to there, and from there."""
    most, early = settings.max_new_tokens, settings.stop_after
    if not late_stop_ids or not early:
        return client.complete(model, prompt, settings, most=most, stop_ids=[*stop_ids, *late_stop_ids], seed=seed)
    first = client.complete(model, prompt, settings, most=min(early, most), stop_ids=stop_ids, seed=seed)
    if first.stopped or len(first.tokens) >= most:
        return first
    rest = client.complete(
        model,
        [*prompt, *first.tokens],
        settings,
        most=most - len(first.tokens),
        stop_ids=[*stop_ids, *late_stop_ids],
        seed=episode_seed(seed, 1),  # a stream of its own: the server begins each request's anew
    )
    return Completed(first.tokens + rest.tokens, first.logprobs + rest.logprobs, rest.stopped)
