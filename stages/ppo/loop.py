"""The PPO stage: iterations of collect and update, with metrics, samples, checkpoints and a published policy."""

from __future__ import annotations

import itertools
import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch

from stages.checkpoints import generator_states, set_generator_states
from stages.errors import DataError, Stopped, TrainingError
from stages.generation import episode_seed
from stages.numerics.comparing import repeated_ngrams
from stages.numerics.kl import AdaptiveKLController, FixedKLController
from stages.ppo.checkpoint import RunKeeper, RunState
from stages.ppo.config import PPOStepConfig
from stages.ppo.health import Alarm, Health, alarm_metrics
from stages.ppo.offload import Offload
from stages.ppo.optimizers import WeightAverage, learning_rate_factor, make_optimizer, trainable
from stages.ppo.roles import Roles, load_roles
from stages.ppo.rollout import Rollout, ScoringError, collect
from stages.ppo.speed import peak_of, speed_metrics
from stages.ppo.update import UpdateProgress, Updater, UpdateResult
from stages.rewards.config import reward_model_inputs

if TYPE_CHECKING:
    from stages.corpora.messages import Prompt
    from stages.registry import ModelRecord
    from stages.runtime import StepContext, StepResult


def run(config: PPOStepConfig, context: StepContext) -> StepResult:
    """Align the policy; publish it, with how score, KL, entropy and length went."""
    from stages.rewards.source import build_reward
    from stages.runtime import StepResult

    runtime = context.runtime
    roles = load_roles(config, context)
    dtype = runtime.dtype(config.precision)
    sources: dict[str, Any] = {
        "device": runtime.device, "dtype": dtype, "load": lambda model: roles.load_reward_model(model, dtype=dtype)
    }  # fmt: skip
    reward = build_reward(config.reward, context.models, "reward", **sources)
    monitors = build_reward(config.monitors, context.models, "monitors", **sources)
    judges = [module for module in (*reward.modules(), *monitors.modules()) if not roles.shares(module)]
    roles.offload = Offload([*roles.waiting(), *judges], runtime.device, enabled=config.offload)
    prompts = _load_prompts(config, context, roles)
    parameters = {name: [parameter for _, parameter in trainable(network)] for name, network in roles.networks().items()}
    optimizers = {name: make_optimizer(group, config.training) for name, group in parameters.items()}
    average = WeightAverage(roles.networks()["policy"], config.ema_decay) if config.ema_decay is not None else None
    updater = Updater(
        roles,
        optimizers,
        config,
        average=average,
        pretraining_rows=_pretraining_rows(config, context, roles),
        process_index=runtime.process_index,
        num_processes=runtime.num_processes,
    )
    controller = (
        FixedKLController(config.kl_coef)
        if config.kl_target is None
        else AdaptiveKLController(config.kl_coef, target=config.kl_target, horizon=config.kl_horizon)
    )
    keeper = RunKeeper(
        context.checkpoint_folder / "ppo", runtime, roles.networks(), optimizers, average,
        keep_last=config.keep_last, keep_best=config.keep_best, seconds=config.checkpoint_seconds,
    )  # fmt: skip
    with roles.offload.awake(roles.value):  # an optimizer's moments go where its weights are
        state = _resume(context, keeper, updater) or RunState(kl_coef=config.kl_coef)
    controller.value = state.kl_coef
    peak = peak_of(runtime.device, dtype)
    health = Health(config.health)
    for entry in state.history:
        health.observe(entry["metrics"])

    def note_counts() -> None:
        state.optimizer_steps = updater.optimizer_steps
        state.pretraining_draws = getattr(updater.pretraining_rows, "step", 0)

    def safe_point() -> None:
        """A place where the run may be cut off and go on: write a checkpoint where it is time, and end where that was asked for."""
        due, stop = runtime.largest(float(runtime.is_main and keeper.checkpoints.is_due()), runtime.stop.number or 0)
        if due or stop:
            note_counts()
            keeper.save(state)
        if stop:
            runtime.stop.ask(int(stop))
            runtime.stop.check()

    order = itertools.islice(_shuffled(prompts, context.seed), state.iteration * config.rollout_batch_size, None)
    with runtime.stop.deferred(), runtime.progress(f"{context.name}: ppo", config.num_iterations) as bar:
        bar.advance(state.iteration)
        for iteration in range(state.iteration, config.num_iterations):
            _set_learning_rates(config, optimizers, iteration)
            chosen = list(itertools.islice(order, config.rollout_batch_size))
            if state.rollout is None:
                try:
                    # Nothing that trains changes while a rollout is collected: alone, a process may end there at once.
                    with runtime.stop.allowed() if runtime.num_processes == 1 else nullcontext(), _saved_when_stopped(keeper, state):
                        state.rollout = collect(
                            roles,
                            reward,
                            monitors,
                            [prompt for prompt, _ in chosen],
                            [ids for _, ids in chosen],
                            [episode_seed(context.seed, iteration, row) for row in range(len(chosen))],
                            config,
                            process_index=runtime.process_index,
                            num_processes=runtime.num_processes,
                        )
                except ScoringError as error:
                    kept = _keep_batch(context, [{"prompt": prompt, "completion": text} for prompt, text in error.episodes])
                    raise TrainingError(f"{context.name}: iteration {iteration}: {error}{kept}") from error
                safe_point()
            rollout = state.rollout
            started = time.perf_counter()
            try:
                result = updater.update(
                    rollout,
                    kl_coef=controller.value,
                    seed=episode_seed(context.seed, iteration, -1),
                    train_policy=iteration >= config.value_warmup_iterations,
                    progress=state.progress,
                    after_minibatch=safe_point,
                )
            except TrainingError as error:
                kept = _keep_batch(context, _episodes(rollout))
                raise TrainingError(f"{context.name}: iteration {iteration}: {error}{kept}") from error
            rollout.seconds["update"] = time.perf_counter() - started
            metrics = iteration_metrics(rollout, result, config, kl_coef=controller.value, matmul_peak=peak)
            metrics["policy/learning_rate"] = optimizers["policy"].param_groups[0]["lr"]
            alarms = health.observe(metrics)
            metrics |= alarm_metrics(alarms)
            controller.update(metrics["policy/kl"], len(rollout.prompts))
            samples = [
                {"iteration": iteration, "prompt": rollout.prompts[row], "completion": rollout.completions[row],
                 "score": float(rollout.scores[row])}
                for row in range(min(config.num_samples, len(rollout.prompts)))
            ]  # fmt: skip
            state.history.append({"metrics": metrics, "samples": samples})
            _log(context, iteration, state.history[-1])
            _raise_alarms(config, context, iteration, health, alarms)
            bar.advance(
                1, score=metrics["rewards/score_mean"], kl=metrics["policy/kl"], episodes_per_s=metrics["time/episodes_per_second"]
            )
            state.iteration, state.kl_coef, state.rollout, state.progress = iteration + 1, controller.value, None, UpdateProgress()
            if keeper.checkpoints.wants(metrics["rewards/total_mean"]):
                note_counts()
                keeper.save(state, score=metrics["rewards/total_mean"])
            safe_point()
    history = state.history
    if average is not None:
        if config.publish_last:
            _publish_policy(config, context, roles, {}, f"{context.name}-last")
        average.copy_to(roles.networks()["policy"])
    summary = {**_summary(history, config, updater), "alarms": health.summary()}
    _report(context, summary)
    if config.publish_value and roles.value is not None:
        _publish_value(config, context, roles)
    if config.keep_best:
        _publish_best(config, context, roles, keeper)
    # Last: with this version published the step counts as done.
    record = _publish_policy(config, context, roles, summary)
    return StepResult(model=record, metrics=summary)


# Prompts and pretraining rows


def _load_prompts(config: PPOStepConfig, context: StepContext, roles: Roles) -> list[tuple[Prompt, list[int]]]:
    """Prompts with their token ids, without those too long to be answered (cutting one would ask something else)."""
    from stages.corpora.curation import Curator
    from stages.corpora.fitting import fit_prompt
    from stages.corpora.prompts import load_prompts
    from stages.corpora.templates import count_tokens, encode_prompt

    positions = getattr(roles.policy.model.config.get_text_config(), "max_position_embeddings", None) or 1_000_000
    longest = config.max_prompt_tokens or positions - config.generation.max_new_tokens
    curator = Curator(config.curation, count_tokens(roles.tokenizer))
    prompts = load_prompts(config.data, prompt_words=config.prompt_words, curator=curator)
    if config.prompt_fit is not None:
        prompts = [fit_prompt(prompt, config.prompt_fit, roles.tokenizer) for prompt in prompts]
    encoded = [(prompt, encode_prompt(roles.tokenizer, prompt)) for prompt in prompts]
    if curator.left_out:
        reasons = ", ".join(f"{reason} {number}" for reason, number in sorted(curator.left_out.items()))
        context.runtime.console.print(f"{context.name}: curation left out {sum(curator.left_out.values())} prompts ({reasons})")
    kept = [(prompt, ids) for prompt, ids in encoded if 0 < len(ids) <= longest]
    if not kept:
        raise DataError(
            f"none of {len(encoded)} prompts has at most {longest} tokens (max_prompt_tokens, or the model's {positions} positions less "
            f"generation.max_new_tokens={config.generation.max_new_tokens})"
        )
    if len(kept) < len(encoded):
        left_out = len(encoded) - len(kept)
        context.runtime.console.print(f"{context.name}: left out {left_out} of {len(encoded)} prompts ({longest} tokens at most)")
    return kept


def _shuffled(prompts: list[tuple[Prompt, list[int]]], seed: int) -> Any:
    from stages.corpora.prompts import shuffled_forever

    return shuffled_forever(prompts, seed)


def _pretraining_rows(config: PPOStepConfig, context: StepContext, roles: Roles) -> Callable[[int], torch.Tensor] | None:
    """A function that gives the next so many rows of the pretraining mix; its place follows from the optimizer steps made."""
    mix = config.pretraining_mix
    if mix is None:
        return None
    from stages.corpora.files import read_rows, text_of
    from stages.corpora.packing import encode_documents, pack_blocks

    tokens = encode_documents(roles.tokenizer, [text_of(row, "text") for row in read_rows(mix.data)])
    blocks = pack_blocks(tokens, mix.block_size)

    def draw(number: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(episode_seed(context.seed, -2, draw.step))  # type: ignore[attr-defined]
        draw.step += 1  # type: ignore[attr-defined]
        return blocks[torch.randint(len(blocks), (number,), generator=generator)]

    draw.step = 0  # type: ignore[attr-defined]
    return draw


# Around an iteration


def _set_learning_rates(config: PPOStepConfig, optimizers: dict[str, torch.optim.Optimizer], iteration: int) -> None:
    factor = learning_rate_factor(config.training, iteration, config.num_iterations)
    peaks = {"policy": config.training.learning_rate, "value": config.training.value_learning_rate or config.training.learning_rate}
    for name, optimizer in optimizers.items():
        for group in optimizer.param_groups:
            group["lr"] = peaks[name] * factor


def iteration_metrics(
    rollout: Rollout, result: UpdateResult, config: PPOStepConfig, *, kl_coef: float, matmul_peak: float = math.inf
) -> dict[str, float]:
    """What an iteration is known by. KL is summed over tokens and averaged over episodes, in nats; ``matmul_peak`` in operations/s."""
    sequence_kl = rollout.kl.sum(dim=1)
    lengths = rollout.lengths.float()
    return {
        "rewards/score_mean": float(rollout.scores.mean()),
        "rewards/score_std": float(rollout.scores.std(correction=0)),
        **{f"rewards/{name}": float(part.mean()) for name, part in rollout.parts.items()},
        **{f"monitors/{name}": float(part.mean()) for name, part in rollout.monitors.items()},
        "rewards/total_mean": float((rollout.scores - kl_coef * sequence_kl).mean()),
        "policy/kl": float(sequence_kl.mean()),
        "policy/kl_standard_error": float(sequence_kl.std(correction=0)) / math.sqrt(len(sequence_kl)),
        "policy/kl_coef": kl_coef,
        **result.metrics,
        "responses/length_mean": float(lengths.mean()),
        "responses/length_max": float(lengths.max()),
        "responses/stopped_share": float(rollout.stopped.float().mean()),
        "responses/repetition": repeated_ngrams([rollout.response(row) for row in range(len(rollout.prompts))], 4),
        "responses/distinct_share": len(set(rollout.completions)) / len(rollout.completions),
        "policy/sampling_gap": rollout.sampling_gap,
        **speed_metrics(
            rollout.seconds, episodes=len(rollout.prompts), response_tokens=int(lengths.sum()), trained_tokens=result.tokens,
            operations=result.operations, peak=matmul_peak,
        ),
    }


def _raise_alarms(config: PPOStepConfig, context: StepContext, iteration: int, health: Health, alarms: list[Alarm]) -> None:
    """Say what has begun to go wrong. Raises TrainingError for an alarm that ends the run."""
    for alarm in health.begun:
        context.runtime.console.print(f"{context.name}: iteration {iteration}: {alarm.name}: {alarm.message}", style="yellow", markup=False)
    for alarm in alarms:
        if alarm.name in config.health.stop_on:
            kept = f"the last checkpoint is kept in {context.checkpoint_folder / 'ppo'}"
            raise TrainingError(f"{context.name}: iteration {iteration}: stopped on {alarm.name} (health.stop_on): {alarm.message}; {kept}")


def _log(context: StepContext, iteration: int, entry: dict[str, Any]) -> None:
    context.log(iteration, entry["metrics"])
    if context.runtime.is_main:
        with (context.folder / "samples.jsonl").open("a", encoding="utf-8") as file:
            for sample in entry["samples"]:
                file.write(json.dumps(sample, ensure_ascii=False) + "\n")


def _resume(context: StepContext, keeper: RunKeeper, updater: Updater) -> RunState | None:
    """The state of a run that was cut off; its logs are written again, so that metrics.jsonl is whole."""
    state = keeper.load()
    if state is None:
        return None
    updater.optimizer_steps = state.optimizer_steps
    if updater.pretraining_rows is not None:
        updater.pretraining_rows.step = state.pretraining_draws  # type: ignore[attr-defined]
    for iteration, entry in enumerate(state.history):
        _log(context, iteration, entry)
    inside = f", minibatch {len(state.progress.collected)} of the next" if state.rollout is not None else ""
    context.runtime.console.print(f"{context.name}: resuming after iteration {state.iteration}{inside}")
    return state


@contextmanager
def _saved_when_stopped(keeper: RunKeeper, state: RunState) -> Iterator[None]:
    """Where an end is asked for inside: keep the run as it was before, random streams included."""
    generators = generator_states(keeper.runtime)
    try:
        yield
    except Stopped:
        set_generator_states(generators, keeper.runtime)
        keeper.save(state)
        raise


def _episodes(rollout: Rollout) -> list[dict[str, Any]]:
    return [
        {
            "prompt": rollout.prompts[row],
            "completion": rollout.completions[row],
            "score": float(rollout.scores[row]),
            **{name: float(part[row]) for name, part in rollout.parts.items()},
            "kl": float(rollout.kl[row].sum()),
            "tokens": rollout.response(row),
        }
        for row in range(len(rollout.prompts))
    ]


def _keep_batch(context: StepContext, episodes: list[dict[str, Any]]) -> str:
    """Write the offending episodes beside the metrics; returns the end of the message. Each process writes what it met."""
    index = context.runtime.process_index
    path = context.folder / ("failed_rollout.jsonl" if index == 0 else f"failed_rollout-{index}.jsonl")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for episode in episodes:
            file.write(json.dumps(episode, ensure_ascii=False) + "\n")
    return f". Its episodes are in {path}; the last checkpoint is kept in {context.checkpoint_folder / 'ppo'}"


def _summary(history: list[dict[str, Any]], config: PPOStepConfig, updater: Updater) -> dict[str, Any]:
    """First and last tenth of the run, side by side."""
    tenth = max(1, len(history) // 10)
    summary: dict[str, Any] = {"iterations": len(history), "episodes": len(history) * config.rollout_batch_size}
    summary["optimizer_steps"] = updater.optimizer_steps
    shown = ["rewards/score_mean", "policy/kl", "policy/entropy", "responses/length_mean", "responses/stopped_share"]
    shown += [name for name in history[-1]["metrics"] if name.startswith("monitors/")]
    for name in shown:
        values = [entry["metrics"][name] for entry in history]
        short = name.rpartition("/")[2]
        summary[f"{short}_first"], summary[f"{short}_last"] = sum(values[:tenth]) / tenth, sum(values[-tenth:]) / tenth
    summary["value_explained_variance"] = history[-1]["metrics"]["value/explained_variance"]
    summary["episodes_per_second"] = sum(entry["metrics"]["time/episodes_per_second"] for entry in history) / len(history)
    return summary


def _report(context: StepContext, summary: dict[str, Any]) -> None:
    context.runtime.console.print(
        f"{context.name}: score {summary['score_mean_first']:.3f} -> {summary['score_mean_last']:.3f}, "
        f"KL {summary['kl_last']:.2f} nats, entropy {summary['entropy_first']:.2f} -> {summary['entropy_last']:.2f}, "
        f"length {summary['length_mean_first']:.1f} -> {summary['length_mean_last']:.1f}, {summary['episodes_per_second']:.1f} episodes/s"
        + (f"; alarms: {', '.join(alarm['name'] for alarm in summary['alarms'])}" if summary["alarms"] else "")
    )


def _publish_policy(
    config: PPOStepConfig, context: StepContext, roles: Roles, metrics: dict[str, Any], name: str | None = None
) -> ModelRecord:
    return context.publish(
        roles.save_policy,
        role="language_model",
        metrics=metrics,
        base=context.models["policy"] if config.lora is not None else None,
        name=name,
    )


def _publish_best(config: PPOStepConfig, context: StepContext, roles: Roles, keeper: RunKeeper) -> None:
    """The policy of the iteration with the highest mean reward (score less KL penalty), as ``<name>-best``; the last one stays in place."""
    best = keeper.checkpoints.best()
    if best is None:
        context.runtime.console.print(f"{context.name}: no whole checkpoint of a best iteration is left; none is published")
        return
    last = {name: parameter.detach().clone() for name, parameter in trainable(roles.networks()["policy"])}
    keeper.load_weights(best)
    if keeper.average is not None:
        keeper.average.copy_to(roles.networks()["policy"])
    context.publish(
        roles.save_policy,
        role="language_model",
        metrics={"total_mean": best.score, "iteration": json.loads((best.path / "state.json").read_text(encoding="utf-8"))["iteration"]},
        base=context.models["policy"] if config.lora is not None else None,
        name=f"{context.name}-best",
    )
    with torch.no_grad():
        for name, parameter in trainable(roles.networks()["policy"]):
            parameter.copy_(last[name])


def _publish_value(config: PPOStepConfig, context: StepContext, roles: Roles) -> None:
    value = roles.value
    assert value is not None
    places = [place for place in ("value", *reward_model_inputs(config.reward, "reward")) if place in context.models]
    base = context.models[places[0]] if places else context.models["policy"]
    context.publish(
        lambda folder: value.save(folder, roles.tokenizer),
        role="value_model",
        metrics={},
        base=base if config.lora is not None else None,
        name=f"{context.name}-value",
    )
