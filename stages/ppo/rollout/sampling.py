"""Sampling of a rollout's episodes by an engine outside this process: immediately, or in a thread during the previous update."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import cast

from stages.config import GenerationSettings
from stages.errors import LaunchError
from stages.ppo.config import PPOStepConfig
from stages.ppo.data import EncodedPrompt
from stages.ppo.roles import Roles
from stages.ppo.rollout.early_scoring import EarlyScoring
from stages.ppo.rollout.episodes import Episodes
from stages.process.runtime import Runtime
from stages.rewards.source import CombinedReward
from stages.sampling.generation import Finished, Generated, joined
from stages.sampling.sampler import SamplerLost, ServedSampler

FILE, SAMPLER = "sampled.json", "sampler"  # in the folder of a checkpoint


def check_overlap(config: PPOStepConfig, device_type: str) -> None:
    """Raise LaunchError if the started server would have to sample and sleep on the run's GPU at the same time."""
    vllm = config.generation.vllm
    if config.overlap and device_type == "cuda" and vllm is not None and vllm.start is not None and vllm.start.gpus is None:
        raise LaunchError(
            f"{config.name}: overlap=1 samples while the policy trains, but the started vLLM server shares the run's GPU and sleeps while "
            "it trains; give the server separate GPUs (generation.engine.vllm.start.gpus), name servers under url, or set overlap: 0"
        )


@dataclass
class SampledSoFar:
    """The episodes of an iteration that are sampled so far, as a checkpoint keeps them.

    ``finished``: completions by the index of their episode, of all processes. ``lag``: as in ``Sampling``. ``folder``: of a checkpoint with
    the sampler's weights; None if the missing episodes need none, because none is missing or the policy still has these weights.
    """

    iteration: int
    lag: int
    finished: dict[int, Finished] = field(default_factory=dict)
    folder: Path | None = None

    def save(self, folder: Path) -> None:
        """Save it into the folder of a checkpoint, without the weights."""
        rows = [[one.row, one.response_ids, one.logprobs, one.stopped] for one in self.finished.values()]
        content = {"iteration": self.iteration, "lag": self.lag, "finished": rows}
        (folder / FILE).write_text(json.dumps(content), encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> SampledSoFar | None:
        """Load what ``save`` saved; None if the checkpoint has no such episodes."""
        if not (folder / FILE).exists():
            return None
        content = json.loads((folder / FILE).read_text(encoding="utf-8"))
        finished = {row: Finished(row, ids, logprobs, stopped) for row, ids, logprobs, stopped in content["finished"]}
        return cls(content["iteration"], content["lag"], finished, folder / SAMPLER if (folder / SAMPLER).exists() else None)


class Sampling:
    """Samples this process's share of an iteration's episodes, with the weights that the sampler has when it begins.

    ``iteration``: that of the episodes. ``lag``: number of updates between these weights and the policy that will train on the episodes.
    ``early``: scores finished completions by remote rewards. ``finished``: known completions by index in the share. ``gather``: returns the
    values of all processes (``Runtime.gather``).
    """

    def __init__(
        self,
        sampler: ServedSampler,
        episodes: Episodes,
        settings: GenerationSettings,
        early: EarlyScoring,
        so_far: SampledSoFar,
        gather: Callable[[bool], list[bool]],
    ) -> None:
        """``so_far``: what is sampled of this share of the episodes."""
        self.iteration, self.lag, self.early = so_far.iteration, so_far.lag, early
        self.finished = dict(so_far.finished)
        self.seconds = 0.0  # of sampling so far
        self._sampler, self._episodes, self._settings, self._gather = sampler, episodes, settings, gather
        self._thread: threading.Thread | None = None
        self._lost: SamplerLost | None = None
        self._error: BaseException | None = None
        if self.finished and early.on_finished is not None:
            early.on_finished([replace(one, row=row) for row, one in self.finished.items()])

    def start(self) -> None:
        """Sample in a thread. It uses only the sampler, so the policy may train meanwhile."""
        self._thread = threading.Thread(target=self._in_thread, name="sampling ahead", daemon=True)
        self._thread.start()

    def result(self, pad_token_id: int) -> Generated:
        """Sample, or wait for the thread, and return the completions of the share. Call it on every process.

        If the sampler is lost, all processes revive it together and continue, or all raise SamplerLost with their finished completions.
        """
        if self._thread is None:
            self._sample()
        else:
            self._thread.join()
        if self._error is not None:
            raise self._error
        while any(self._gather(self._lost is not None)):
            if not self._sampler.revive():
                raise SamplerLost(str(self._lost or "another process of the run has no vLLM server left"), self.finished)
            self._sample()
        ids = self._episodes.prompt_ids
        return joined(ids, [self.finished[row] for row in range(len(ids))], pad_token_id)

    def _in_thread(self) -> None:
        try:
            self._sample()
        except BaseException as error:  # ``result`` raises it
            self._error = error

    def _sample(self) -> None:
        """Sample the missing completions as far as the sampler can."""
        missing = [row for row in range(len(self._episodes.prompt_ids)) if row not in self.finished]
        self._lost = None
        if not missing:
            return

        def note(new: list[Finished]) -> None:
            own = [replace(one, row=missing[one.row]) for one in new]
            self.finished.update({one.row: one for one in own})
            if self.early.on_finished is not None:
                self.early.on_finished(own)

        began = time.perf_counter()
        try:
            ids, seeds = [self._episodes.prompt_ids[row] for row in missing], [self._episodes.seeds[row] for row in missing]
            self._sampler.sample(ids, self._settings, seeds, on_finished=note)
        except SamplerLost as error:
            self._lost = error
        finally:
            self.seconds += time.perf_counter() - began


class ServedRollouts:
    """Samples the episodes of one iteration after another by an engine outside this process. ``current``: the current sampling.

    It is used on every process; each one samples every n-th episode of n processes. ``transfer_seconds``: of the transfers of weights that
    the caller has not counted so far.
    """

    def __init__(
        self, config: PPOStepConfig, roles: Roles, reward: CombinedReward, monitors: CombinedReward, runtime: Runtime, seed: int
    ) -> None:
        self._config, self._roles, self._rewards, self._runtime, self._seed = config, roles, (reward, monitors), runtime, seed
        self._sampler = cast("ServedSampler", roles.sampler)
        self._served_iteration = -1  # the servers have the policy with which this iteration began
        self.current: Sampling | None = None
        self.transfer_seconds = 0.0

    def begin(self, chosen: Sequence[EncodedPrompt], iteration: int) -> None:
        """Prepare to sample the episodes of ``iteration`` with the current policy. Raises SamplerLost, TrainingError."""
        self._send_policy(iteration)
        self.current = self._sampling(chosen, SampledSoFar(iteration, lag=0))

    def start_ahead(self, following: Sequence[EncodedPrompt], iteration: int) -> None:
        """Start to sample the episodes after ``iteration`` with the current policy, unless a resumed run has started it.

        Call it before the update of ``iteration``. Raises SamplerLost, TrainingError.
        """
        if self.current is not None:
            return
        if self._served_iteration != iteration:
            self._send_policy(iteration)
        self.current = self._sampling(following, SampledSoFar(iteration + 1, lag=1))
        self.current.start()

    def resume(self, sampled: SampledSoFar, chosen: Sequence[EncodedPrompt]) -> str:
        """Continue the sampling of a checkpoint, with the weights with which it began. ``chosen``: the prompts of its episodes.

        Returns a message. Raises SamplerLost, TrainingError.
        """
        if sampled.folder is not None:
            self._sampler.restore_weights(sampled.folder)
        elif len(sampled.finished) < len(chosen):
            self._send_policy(sampled.iteration)
        self.current = self._sampling(chosen, sampled)
        self.current.start()
        return f"{len(sampled.finished)} of {len(chosen)} episodes of iteration {sampled.iteration} were sampled before the interruption"

    def so_far(self) -> tuple[SampledSoFar | None, Callable[[Path], None] | None]:
        """For a checkpoint: what is sampled so far, and a function that saves the weights that the other episodes need.

        These weights are needed only if the policy no longer has them (lag).
        """
        if self.current is None:
            return None, None
        shares = self._runtime.gather(dict(self.current.finished))
        finished: dict[int, Finished] = {}
        for index, share in enumerate(shares):
            for row, one in share.items():
                episode = row * len(shares) + index
                finished[episode] = replace(one, row=episode)
        needed = self.current.lag and len(finished) < self._config.rollout_batch_size
        return SampledSoFar(self.current.iteration, self.current.lag, finished), self._sampler.save_weights if needed else None

    def end(self) -> None:
        """Discard the current sampling when the run ends. Closing the sampler ends its requests."""
        if self.current is not None:
            self.current.early.forget()

    def _send_policy(self, iteration: int) -> None:
        began = time.perf_counter()
        with self._roles.policy.precision():
            self._sampler.take_weights()
        self._served_iteration = iteration
        self.transfer_seconds += time.perf_counter() - began

    def _sampling(self, chosen: Sequence[EncodedPrompt], sampled: SampledSoFar) -> Sampling:
        """The sampling of this process's share of the episodes of ``sampled.iteration``, without those that are finished."""
        index, count = self._runtime.process_index, self._runtime.num_processes
        episodes = Episodes.of(chosen, self._seed, sampled.iteration).share(index, count)
        finished = {row // count: one for row, one in sampled.finished.items() if row % count == index}
        early = EarlyScoring(self._rewards, self._roles.tokenizer, episodes)
        return Sampling(self._sampler, episodes, self._config.generation, early, replace(sampled, finished=finished), self._runtime.gather)
