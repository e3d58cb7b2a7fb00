"""The update: several epochs over a rollout in minibatches, each with one optimizer step of policy and value network."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from stages.errors import MemoryExhausted, TrainingError, is_out_of_memory
from stages.metric_names import (
    APPROX_KL,
    LOG_RATIO_FIRST_RMS,
    POLICY_LOSS,
    PRETRAINING_LOSS,
    RATIO_FIRST_DEVIATION,
    RATIO_MAX_DEVIATION,
    VALUE_LOSS,
    grad_norm_name,
)
from stages.models.sharding import gradient_norm, scale_gradients
from stages.ppo.config import PPOStepConfig
from stages.ppo.data import PretrainingRows
from stages.ppo.roles import Roles
from stages.ppo.rollout.rollout import Rollout
from stages.ppo.update.gradients import Gradients
from stages.ppo.update.optimizers import WeightAverage
from stages.ppo.update.targets import Targets, all_targets, targets
from stages.ppo.update.totals import means, policy_metrics, value_metrics
from stages.training.checkpoints import trainable


@dataclass
class UpdateProgress:
    """Progress of a rollout's update: metrics of the finished minibatches, and their number of response tokens."""

    collected: list[dict[str, float]] = field(default_factory=list)
    tokens: int = 0


@dataclass
class UpdateResult:
    """Metrics of an iteration's updates (means over minibatches), and the number of optimizer steps."""

    metrics: dict[str, float]
    optimizer_steps: int
    tokens: int  # response tokens trained on, over all epochs and processes
    flops: tuple[float, float] = (0.0, 0.0)  # flops of this process's matrix products, and of those that checkpointing repeats
    retreats: int = 0  # number of times that this process ran out of memory and continued with smaller passes
    pass_tokens: int = 0  # tokens of this process's largest pass


class Updater(Gradients):
    """Epochs over rollouts, with one optimizer step per minibatch. It keeps the state between iterations."""

    def __init__(
        self,
        roles: Roles,
        optimizers: dict[str, torch.optim.Optimizer],
        config: PPOStepConfig,
        *,
        average: WeightAverage | None = None,
        pretraining_rows: PretrainingRows | None = None,
        process_index: int = 0,
        num_processes: int = 1,
    ) -> None:
        """``average``: the moving average of the policy's weights. Other arguments as in ``Gradients``."""
        super().__init__(
            roles, optimizers, config, pretraining_rows=pretraining_rows, process_index=process_index, num_processes=num_processes
        )
        self.average = average
        self.optimizer_steps = 0  # since the start of the run

    def update(
        self,
        rollout: Rollout,
        *,
        kl_coef: float,
        seed: int,
        train_policy: bool = True,
        progress: UpdateProgress | None = None,
        after_minibatch: Callable[[], None] | None = None,
    ) -> UpdateResult:
        """Run all epochs over ``rollout``. Raises TrainingError for a non-finite loss or gradient, before it can change the weights.

        ``progress`` is updated after each minibatch; minibatches that it already contains (after a resumption) are skipped.
        ``after_minibatch`` is called after each optimizer step.
        """
        with self.roles.offload.awake(self.roles.value):
            return self._update(rollout, kl_coef, seed, train_policy, UpdateProgress() if progress is None else progress, after_minibatch)

    def _update(
        self,
        rollout: Rollout,
        kl_coef: float,
        seed: int,
        train_policy: bool,
        progress: UpdateProgress,
        after_minibatch: Callable[[], None] | None,
    ) -> UpdateResult:
        config = self.config
        full_targets = all_targets(rollout, config, kl_coef=kl_coef, num_processes=self.num_processes)
        collected, position = progress.collected, 0
        generator = torch.Generator().manual_seed(seed)
        for _ in range(config.ppo_epochs):
            order = torch.randperm(len(rollout.prompts), generator=generator)
            for chosen in order.split(config.minibatch_size):
                position += 1
                if position <= len(collected):
                    continue
                part = rollout.rows(chosen)
                part_targets = targets(part, config, kl_coef=kl_coef) if config.whiten.scope == "minibatch" else full_targets.rows(chosen)
                collected.append(self.minibatch(part, part_targets, train_policy=train_policy))
                progress.tokens += sum(part.lengths.tolist())
                if after_minibatch is not None:
                    after_minibatch()
            if config.kl.update_limit is not None and collected[position - 1][APPROX_KL] > config.kl.update_limit:
                break
        if train_policy and config.ema.cadence == "iteration":
            self._update_average()
        metrics = means(collected)
        metrics[RATIO_FIRST_DEVIATION] = collected[0][RATIO_MAX_DEVIATION]
        metrics[LOG_RATIO_FIRST_RMS] = math.sqrt(2 * collected[0][APPROX_KL])
        metrics[RATIO_MAX_DEVIATION] = max(item[RATIO_MAX_DEVIATION] for item in collected)
        retreats, self.budget.retreats = self.budget.retreats, 0
        return UpdateResult(metrics, len(collected), progress.tokens, self.matmuls.take(), retreats, self.budget.largest)

    def minibatch(self, part: Rollout, part_targets: Targets, *, train_policy: bool = True) -> dict[str, float]:
        """Compute the gradients of one minibatch and make one optimizer step; returns its metrics. The device is read once."""
        totals = self.accumulate(part, part_targets, train_policy=train_policy)
        norms = {name: gradient_norm(list(trainable(network).values())) for name, network in self.roles.networks().items()}
        totals.add(**{grad_norm_name(name): norm for name, norm in norms.items()})
        largest = totals.read()
        sums = totals.sums
        metrics = {**policy_metrics(sums, largest), **(value_metrics(sums) if self.roles.has_value else {})}
        if self.config.pretraining_mix is not None and train_policy:
            metrics[PRETRAINING_LOSS] = sums.get("pretraining_loss", 0.0)
        metrics |= {grad_norm_name(name): sums[grad_norm_name(name)] for name in norms}
        _check_finite(metrics)
        self._step(norms, train_policy)
        return metrics

    def _step(self, norms: dict[str, Tensor], train_policy: bool) -> None:
        """Clip the gradients with these norms, make an optimizer step, and clear the gradients."""
        for name, network in self.roles.networks().items():
            scale_gradients(list(trainable(network).values()), norms[name], self.config.training.max_grad_norm)
        for name, optimizer in self.optimizers.items():
            if name == "value" or train_policy:
                self._optimizer_step(name, optimizer)
            optimizer.zero_grad(set_to_none=True)
        self.optimizer_steps += 1
        if train_policy and self.config.ema.cadence == "optimizer_step":
            self._update_average()

    def _optimizer_step(self, name: str, optimizer: torch.optim.Optimizer) -> None:
        """Make the optimizer step of one network. It cannot be repeated, because a part of the weights may have changed.

        Raises MemoryExhausted if memory runs out.
        """
        try:
            optimizer.step()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            moments = self._pending_moments() / 2**30
            raise MemoryExhausted(
                f"PPO update: memory ran out in the optimizer step of the {name}, whose moments take {moments:.1f} GiB more. "
                "Set training.optimizer: adamw_8bit or offload: true, or use lora or a smaller model"
            ) from error

    def _update_average(self) -> None:
        if self.average is not None:
            self.average.update(self.roles.networks()["policy"])


def _check_finite(metrics: dict[str, float]) -> None:
    """Raise TrainingError if a loss or gradient norm of a minibatch is not finite."""
    losses = {name: metrics[metric] for name, metric in (("policy", POLICY_LOSS), ("value", VALUE_LOSS)) if metric in metrics}
    advice = "lower training.learning_rate, or use precision: fp32"
    if not math.isfinite(sum(losses.values())):
        said = " and ".join(f"the {name} loss is {loss}" for name, loss in losses.items())
        raise TrainingError(f"{said}; {advice}")
    for name in ("policy", "value"):
        norm = metrics.get(grad_norm_name(name), 0.0)
        if not math.isfinite(norm):
            raise TrainingError(f"the gradient norm of the {name} is {norm}; {advice}")
