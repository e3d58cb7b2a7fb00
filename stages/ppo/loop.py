"""The PPO stage: iterations of collect and update, with metrics, samples, checkpoints and a published policy."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial

import torch
from accelerate.utils import gather_object
from torch import nn

from stages.corpora.prompts import shuffled_forever
from stages.engines.opening import check_reachable, step_sampler
from stages.errors import ModelError, RecipeError, Stopped, TrainingError
from stages.kernels.matmul import measure_peak
from stages.metric_names import (
    COMPLETION_CUT_SHARE,
    CUT_SHARE,
    EPISODES_PER_SECOND,
    KL,
    LEARNING_RATE,
    RAISED_ALARMS,
    SCORE_MEAN,
    TOTAL_MEAN,
    source_of,
)
from stages.models.layers.compiled import NOT_WANTED
from stages.models.loaded import LoadedModel
from stages.models.passes.budget import PassBudget, PassTooLarge
from stages.models.sharding import grouped, shard
from stages.ppo.config import PPOStepConfig
from stages.ppo.data import EncodedPrompt, check_prompts, load_pretraining_rows, load_prompts
from stages.ppo.health import Health, alarm_metrics
from stages.ppo.offload import Offload
from stages.ppo.records.checkpoint import RunKeeper, RunState
from stages.ppo.records.history import Entry
from stages.ppo.records.logs import checkpoint_note, episodes_of, keep_episodes, log, samples_of
from stages.ppo.records.metrics import iteration_metrics, run_line, run_metrics
from stages.ppo.records.publishing import publish_best, publish_policy, publish_value
from stages.ppo.roles import load_roles
from stages.ppo.rollout.collecting import ScoringError, collect, recomputes_logprobs
from stages.ppo.rollout.episodes import Episodes
from stages.ppo.rollout.measuring import measuring_budget
from stages.ppo.rollout.rollout import Rollout, joined
from stages.ppo.rollout.sampling import ServedRollouts, check_overlap
from stages.ppo.update.optimizers import WeightAverage, learning_rate_factor, make_optimizer
from stages.ppo.update.updater import UpdateProgress, Updater, UpdateResult
from stages.process.gpus import measured_gpu_memory, raise_torch_peak
from stages.rewards.building import build_reward
from stages.rl.kl import AdaptiveKLController, FixedKLController
from stages.sampling.generation import episode_seed
from stages.sampling.sampler import SamplerLost
from stages.step import StepContext, StepResult
from stages.training.checkpoints import generator_states, set_generator_states, trainable
from stages.training.smaller_passes import read_limit, write_limit


def run(config: PPOStepConfig, context: StepContext) -> StepResult:
    """Align the policy and publish it with metrics of score, KL, entropy and length."""
    _refuse_idle_processes(config, context.runtime.num_processes)
    ppo = PPORun(config, context)
    ppo.resume()
    with ppo.sampling():
        ppo.iterate()
    result = ppo.publish()
    raise_torch_peak()
    return result


class PPORun:
    """The parts of a run, and its ``state``."""

    def __init__(self, config: PPOStepConfig, context: StepContext) -> None:
        runtime = context.runtime
        dtype = runtime.dtype(config.precision)
        self.config, self.context, self.runtime = config, context, runtime
        check_prompts(config, context)
        check_reachable(config.generation)
        check_overlap(config, runtime.device.type)
        self.matmul_peak = measure_peak(dtype, runtime.device)
        self.roles = roles = load_roles(config, context)
        runtime.say_model(f"{config.name}: policy", roles.policy.model, dtype)
        build = partial(
            build_reward,
            device=runtime.device,
            dtype=dtype,
            load=lambda model: roles.load_reward_model(model, dtype=dtype),
            cache_folder=context.cache_folder,
        )
        self.reward = build(config.reward, context.models, "reward")
        self.monitors = build(config.monitors, context.models, "monitors")
        judges = [module for module in (*self.reward.modules(), *self.monitors.modules()) if not roles.shares(module)]
        if runtime.shards:
            self._shard(judges)
        if roles.compiler is not None:
            roles.compiler.add(*judges)
        roles.offload = Offload([*roles.waiting(), *judges], runtime.device, enabled=config.offload)
        self.prompts = load_prompts(config, context, roles.policy.model, roles.tokenizer)
        self.pretraining_rows = load_pretraining_rows(config, roles.tokenizer, context.seed)
        parameters = {name: list(trainable(network).values()) for name, network in roles.networks().items()}
        self.optimizers = {name: make_optimizer(grouped(group), config.training) for name, group in parameters.items()}
        self.average = WeightAverage(roles.networks()["policy"], config.ema.decay) if config.ema.decay is not None else None
        self.updater = Updater(
            roles,
            self.optimizers,
            config,
            average=self.average,
            pretraining_rows=self.pretraining_rows,
            process_index=runtime.process_index,
            num_processes=runtime.num_processes,
        )
        self.measuring = measuring_budget(config, runtime.device)
        self.controller = (
            FixedKLController(config.kl.coef)
            if config.kl.target is None
            else AdaptiveKLController(config.kl.coef, target=config.kl.target, horizon=config.kl.horizon)
        )
        self.keeper = RunKeeper(
            context.checkpoint_folder / "ppo",
            runtime,
            roles.networks(),
            self.optimizers,
            self.average,
            keep_last=config.checkpoints.keep_last,
            keep_best=config.checkpoints.keep_best,
            seconds=config.checkpoints.seconds,
        )
        is_half, is_recomputed = dtype != torch.float32, recomputes_logprobs(roles, config) or config.generation.vllm is not None
        self.health = Health(config.health, num_episodes=config.rollout_batch_size, is_half=is_half, is_recomputed=is_recomputed)
        self.state = RunState(kl_coef=config.kl.coef)
        self._said_cuts: set[str] = set()
        self.served: ServedRollouts | None = None  # None: the local sampler

    def _shard(self, judges: Sequence[nn.Module]) -> None:
        """Shard the models of the rewards and monitors that have their own weights.

        A model that cannot be sharded stays complete on every process.
        """
        for module in judges:
            try:
                shard(module, add_up=True)
            except ModelError as error:
                name = type(module).__name__
                self.runtime.console.print(f"{self.config.name}: each process has a complete {name} for a reward: {error}")

    def resume(self) -> None:
        """Resume an interrupted run if there is one. Its logs are written again, so that they are complete."""
        if self.roles.are_sharded:
            for budget in (self.updater.budget, self.measuring):
                budget.lower_to(read_limit(self.context, budget.what))
        with self.roles.offload.awake(self.roles.value):  # optimizer moments are loaded to the device of the weights
            state = self.keeper.load()
        if state is None:
            return
        self.state = state
        self.controller.value = state.kl_coef
        self.updater.optimizer_steps = state.optimizer_steps
        self.updater.budget.resume(state.pass_tokens)
        self.updater.loss_scale.resume(state.loss_scale)
        if self.pretraining_rows is not None:
            self.pretraining_rows.draws = state.pretraining_draws
        for iteration, entry in enumerate(state.history.take_resumed()):
            log(self.context, iteration, entry)
            self.health.observe(entry["metrics"])
        inside = f", minibatch {len(state.progress.collected)} of the next" if state.rollout is not None else ""
        self.runtime.console.print(f"{self.context.name}: resuming after iteration {state.iteration}{inside}")

    @contextmanager
    def sampling(self) -> Iterator[None]:
        """Inside, the engine that the recipe names samples."""
        config, roles, dtype = self.config, self.roles, self.runtime.dtype(self.config.precision)
        opened = step_sampler(
            config.generation,
            LoadedModel(roles.policy.model, roles.tokenizer, self.context.models["policy"], dtype, merges_adapters=config.lora is None),
            self.context,
            trains="full" if config.lora is None else "adapter",
            policy=roles.policy,
        )
        with opened as roles.sampler:
            if not roles.sampler.is_local:
                self.served = ServedRollouts(config, roles, self.reward, self.monitors, self.runtime, self.context.seed)
            try:
                yield
            finally:
                if self.served is not None:
                    self.served.end()

    def iterate(self) -> None:
        """Collect, update and log, until all episodes are done or a stop is requested."""
        config, state = self.config, self.state
        done = state.iteration * config.prompts_per_iteration
        order = itertools.islice(shuffled_forever(self.prompts, self.context.seed), done, None)
        chosen, following = self._choose(order), self._choose(order)
        name = f"{self.context.name}: ppo"
        with self.runtime.stop.deferred(), self.runtime.progress(name, config.num_iterations, state.iteration) as bar:
            if self.served is not None and state.sampled is not None:
                said = self.served.resume(state.sampled, chosen if state.sampled.iteration == state.iteration else following)
                self.runtime.console.print(f"{self.context.name}: {said}")
            while state.iteration < config.num_iterations:
                self._set_learning_rates()
                if state.rollout is None:
                    state.rollout = self._collect(chosen)
                    self._safe_point()
                if config.overlap and state.iteration + 1 < config.num_iterations:
                    self._sample_ahead(following, state.rollout)
                metrics = self._log_iteration(state.rollout, self._update(state.rollout))
                bar.advance(1, score=metrics[SCORE_MEAN], kl=metrics[KL], episodes_per_s=metrics[EPISODES_PER_SECOND])
                if self.keeper.checkpoints.wants(metrics[TOTAL_MEAN]):
                    self._save(score=metrics[TOTAL_MEAN])
                self._safe_point()
                chosen, following = following, self._choose(order)

    def publish(self) -> StepResult:
        """Publish the models in the registry."""
        config, context, roles = self.config, self.context, self.roles
        context.compiled_layers.update(NOT_WANTED if roles.compiler is None else roles.compiler.facts())
        if self.average is not None:
            if config.ema.publish_last:
                publish_policy(config, context, roles, {}, f"{context.name}-last")
            self.average.copy_to(roles.networks()["policy"])
        metrics = {
            **run_metrics(
                self.state.history, episodes_per_iteration=config.rollout_batch_size, optimizer_steps=self.updater.optimizer_steps
            ),
            RAISED_ALARMS: self.health.summary(),
            **({"sampling": self.context.sampling} if self.context.sampling else {}),
        }
        self.runtime.console.print(f"{context.name}: {run_line(metrics)}")
        if config.publish_value and roles.value is not None:
            publish_value(config, context, roles)
        if config.checkpoints.keep_best:
            publish_best(config, context, roles, self.keeper)
        # Published last: this version marks the step as done.
        return StepResult(model=publish_policy(config, context, roles, metrics), metrics=metrics)

    # Parts of an iteration

    def _choose(self, order: Iterator[EncodedPrompt]) -> list[EncodedPrompt]:
        """The prompts of the next iteration's episodes."""
        asked = list(itertools.islice(order, self.config.prompts_per_iteration))
        return [prompt for prompt in asked for _ in range(self.config.samples_per_prompt)]

    def _set_learning_rates(self) -> None:
        training = self.config.training
        factor = learning_rate_factor(training, self.state.iteration, self.config.num_iterations)
        peaks = {"policy": training.learning_rate, "value": training.value_learning_rate or training.learning_rate}
        for name, optimizer in self.optimizers.items():
            for group in optimizer.param_groups:
                group["lr"] = peaks[name] * factor

    def _collect(self, chosen: Sequence[EncodedPrompt]) -> Rollout:
        """The rollout of the current iteration."""
        iteration, served = self.state.iteration, self.served
        # Weights do not change while a rollout is collected, so a single process may stop there at any time.
        may_end = self.runtime.stop.allowed() if self.runtime.num_processes == 1 else nullcontext()
        try:
            with may_end, self._saved_when_stopped():
                if served is not None and served.current is None:
                    served.begin(chosen, iteration)
                rollout = collect(
                    self.roles,
                    self.reward,
                    self.monitors,
                    Episodes.of(chosen, self.context.seed, iteration).share(self.runtime.process_index, self.runtime.num_processes),
                    self.config,
                    budget=self.measuring,
                    sampling=served.current if served is not None else None,
                )
                if self.runtime.num_processes > 1:
                    rollout = joined(gather_object([rollout]))
        except SamplerLost as error:
            raise self._sampler_lost(error, chosen) from error
        except PassTooLarge as error:
            raise self._smaller_next_time(error, self.measuring) from error
        except ScoringError as error:
            kept = keep_episodes(self.context, [{"prompt": prompt, "completion": text} for prompt, text in error.episodes])
            raise TrainingError(f"{self.context.name}: iteration {iteration}: {error}{kept}") from error
        if served is not None:
            served.current = None
            self._count_transfer(rollout)
        return rollout

    def _sample_ahead(self, following: Sequence[EncodedPrompt], rollout: Rollout) -> None:
        """Start to sample the next iteration's episodes. ``rollout``: that of the current iteration."""
        assert self.served is not None
        try:
            self.served.start_ahead(following, self.state.iteration)
        except SamplerLost as error:
            raise self._sampler_lost(error, following) from error
        self._count_transfer(rollout)

    def _count_transfer(self, rollout: Rollout) -> None:
        """Add the seconds of the last transfer of weights to the times of an iteration."""
        assert self.served is not None
        seconds, self.served.transfer_seconds = self.served.transfer_seconds, 0.0
        if seconds:
            rollout.seconds["transfer"] = rollout.seconds.get("transfer", 0.0) + seconds

    def _sampler_lost(self, error: SamplerLost, chosen: Sequence[EncodedPrompt]) -> TrainingError:
        """Save the run with the episodes that are finished; returns the exception to raise. All processes lose the sampler together."""
        texts = self.roles.tokenizer.batch_decode([one.response_ids for one in error.completed.values()], skip_special_tokens=True)
        own = range(self.runtime.process_index, len(chosen), self.runtime.num_processes)
        rows = [chosen[own[index]] for index in error.completed]
        kept = keep_episodes(self.context, [{"prompt": one.prompt, "completion": text} for one, text in zip(rows, texts, strict=True)])
        self._save()
        return TrainingError(f"{self.context.name}: iteration {self.state.iteration}: {error}{kept}. The same command continues from there")

    def _update(self, rollout: Rollout) -> UpdateResult:
        iteration = self.state.iteration
        started = time.perf_counter()
        try:
            with measured_gpu_memory(rollout.gpu_memory, "update"):
                result = self.updater.update(
                    rollout,
                    kl_coef=self.controller.value,
                    seed=episode_seed(self.context.seed, iteration, -1),
                    train_policy=iteration >= self.config.value_warmup_iterations,
                    progress=self.state.progress,
                    after_minibatch=self._safe_point,
                )
        except PassTooLarge as error:
            raise self._smaller_next_time(error, self.updater.budget) from error
        except TrainingError as error:
            kept = keep_episodes(self.context, episodes_of(rollout))
            raise TrainingError(f"{self.context.name}: iteration {iteration}: {error}{kept}") from error
        rollout.seconds["update"] = time.perf_counter() - started
        return result

    def _smaller_next_time(self, error: PassTooLarge, budget: PassBudget) -> PassTooLarge:
        """Halve the passes of ``budget`` from the next start on; returns the exception to raise. A pass over one episode stays as it is."""
        sequences, tokens = budget.current
        where = f"{self.context.name}: iteration {self.state.iteration}"
        if sequences <= 1:
            return PassTooLarge(f"{where}: {error}")
        move = write_limit(self.context, budget.what, tokens // 2)
        return PassTooLarge.of(f"{where}: {budget.what}", move, size=f"of {tokens} tokens")

    def _log_iteration(self, rollout: Rollout, result: UpdateResult) -> dict[str, float]:
        """Log the iteration, raise alarms and update the KL coefficient. This completes the iteration."""
        state, iteration = self.state, self.state.iteration
        metrics = iteration_metrics(rollout, result, self.config, kl_coef=self.controller.value, matmul_peak=self.matmul_peak)
        metrics[LEARNING_RATE] = self.optimizers["policy"].param_groups[0]["lr"]
        self._say_cuts(metrics)
        alarms = self.health.observe(metrics)
        metrics |= alarm_metrics(alarms)
        self.controller.update(metrics[KL], len(rollout.prompts))
        entry: Entry = {"metrics": metrics, "samples": samples_of(rollout, iteration, self.config.num_samples)}
        state.history.append(entry)
        log(self.context, iteration, entry)
        for alarm in self.health.begun:
            line = f"{self.context.name}: iteration {iteration}: {alarm.name}: {alarm.message}"
            self.runtime.console.print(line, style="yellow")
        for alarm in alarms:
            if alarm.name in self.config.health.stop_on:
                said = f"{self.context.name}: iteration {iteration}: stopped on {alarm.name} (health.stop_on): {alarm.message}"
                raise TrainingError(f"{said}; {checkpoint_note(self.context)}")
        state.iteration, state.kl_coef, state.rollout, state.progress = iteration + 1, self.controller.value, None, UpdateProgress()
        return metrics

    def _say_cuts(self, metrics: dict[str, float]) -> None:
        """Report once per reward source that texts are too long for it."""
        for name, share in metrics.items():
            if name.endswith(f"_{CUT_SHARE}") and share and name not in self._said_cuts:
                self._said_cuts.add(name)
                said = f"{self.context.name}: iteration {self.state.iteration}: {cut_message(name, share)}"
                self.runtime.console.print(said, style="yellow")

    # Checkpoints

    def _save(self, *, score: float | None = None) -> None:
        self.state.optimizer_steps = self.updater.optimizer_steps
        self.state.pass_tokens = self.updater.budget.settled
        self.state.loss_scale = self.updater.loss_scale.state
        if self.pretraining_rows is not None:
            self.state.pretraining_draws = self.pretraining_rows.draws
        self.state.sampled, save_sampler = self.served.so_far() if self.served is not None else (None, None)
        self.keeper.save(self.state, score=score, save_sampler=save_sampler)

    def _safe_point(self) -> None:
        """A point where the run can be interrupted and resumed: write a checkpoint if it is due, and stop if requested."""
        checkpoints, asked = self.keeper.checkpoints, self.runtime.stop
        due, stop = self.runtime.largest(float(self.runtime.is_main and checkpoints.is_due()), asked.number or 0)
        if due or stop:
            self._save()
        if stop:
            asked.ask(int(stop))
            asked.check()

    @contextmanager
    def _saved_when_stopped(self) -> Iterator[None]:
        """If a stop is requested inside, save the state from before, including random generator states."""
        generators = generator_states(self.runtime)
        try:
            yield
        except Stopped:
            set_generator_states(generators, self.runtime)
            self._save()
            raise


def _refuse_idle_processes(config: PPOStepConfig, num_processes: int) -> None:
    """Raise RecipeError if a process would have no episode in an iteration."""
    if config.rollout_batch_size < num_processes:
        raise RecipeError(
            f"{config.setting('rollout_batch_size')} is less than one episode for each of {num_processes} processes; raise it to "
            f"{num_processes} or more, or start fewer processes"
        )


def cut_message(name: str, share: float) -> str:
    """The message for the metric ``name``: the ``share`` of the texts, or of the completions alone, that a reward source had to cut."""
    is_completion = name.endswith(f"_{COMPLETION_CUT_SHARE}")
    source = source_of(name).removesuffix(f"_{COMPLETION_CUT_SHARE if is_completion else CUT_SHARE}")
    what = "completions alone" if is_completion else "texts"
    return f"{share:.1%} of the {what} are too long for {source}, so their beginning is cut ({name})"
