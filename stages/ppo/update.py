"""The update: several passes over a rollout in minibatches, each one optimizer step of policy and value network.

A minibatch's loss is a mean over all its response tokens, on all processes and however it is cut into microbatches: every microbatch
adds its sum divided by the tokens of the whole minibatch. Losses per token, N counted tokens of a microbatch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from stages.errors import TrainingError
from stages.kernels.passes import passes, rows_of_a_pass
from stages.models.responses import Policy, SequenceBatch, sequence_batch, sequence_values, with_closing
from stages.models.sharding import clip_gradients, is_cut, reduce_gradients
from stages.ppo.config import PPOStepConfig
from stages.ppo.data import PretrainingRows
from stages.ppo.optimizers import WeightAverage
from stages.ppo.roles import Roles
from stages.ppo.rollout import Rollout, Targets, targets, whole_targets
from stages.ppo.speed import MatmulCounter
from stages.rl.losses import policy_clipped, policy_terms, value_terms
from stages.training.checkpoints import trainable


@dataclass
class Totals:
    """Sums over tokens of one minibatch, from which its metrics are made; summed over processes before they are read.

    They are added up where the tensors lie, in double precision, and read in one go: a read makes the CPU wait for the GPU.
    """

    sums: dict[str, float] = field(default_factory=dict)
    _waiting: dict[str, Tensor] = field(default_factory=dict)
    _largest: Tensor | None = None

    def add(self, **values: Tensor | float) -> None:
        for name, value in values.items():
            if isinstance(value, Tensor):
                value = value.detach().double()
                self._waiting[name] = self._waiting[name] + value if name in self._waiting else value
            else:
                self.sums[name] = self.sums.get(name, 0.0) + float(value)

    def note(self, deviation: Tensor) -> None:
        """Keep the largest of the scalars given; one that is no number counts for nothing."""
        self._largest = deviation if self._largest is None else torch.fmax(self._largest, deviation)

    def read(self) -> float:
        """Bring the sums to the CPU; returns the largest scalar noted (0 where there is none)."""
        names = list(self._waiting)
        waiting = [*self._waiting.values(), *([] if self._largest is None else [self._largest.double()])]
        numbers: list[float] = torch.stack(waiting).tolist() if waiting else []
        largest = numbers.pop() if self._largest is not None else 0.0
        for name, number in zip(names, numbers, strict=True):
            self.sums[name] = self.sums.get(name, 0.0) + number
        self._waiting, self._largest = {}, None
        return max(0.0, largest)


@dataclass
class UpdateProgress:
    """How far the update of a rollout is: the metrics of the minibatches done, and the response tokens they had."""

    collected: list[dict[str, float]] = field(default_factory=list)
    tokens: int = 0


@dataclass
class UpdateResult:
    """Metrics of an iteration's updates (means over minibatches), and how many optimizer steps there were."""

    metrics: dict[str, float]
    optimizer_steps: int
    tokens: int  # response tokens trained on, all passes and processes
    operations: float = 0.0  # of this process's matrix products


class Updater:
    """Holds what stays from one iteration to the next: networks, optimizers, the moving average, pretraining rows."""

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
        self.roles, self.optimizers, self.config = roles, optimizers, config
        self.average, self.pretraining_rows = average, pretraining_rows
        self.process_index, self.num_processes = process_index, num_processes
        self.optimizer_steps = 0  # since the beginning of the run
        self.matmuls = MatmulCounter()

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
        """All passes over ``rollout``. Raises TrainingError where a loss or gradient is not finite; the weights are then as before it.

        ``progress`` is kept up to date, and where it says that minibatches were done (by a run that was cut off) those are passed over.
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
        whole = whole_targets(rollout, config, kl_coef=kl_coef, num_processes=self.num_processes)
        collected, position = progress.collected, 0
        generator = torch.Generator().manual_seed(seed)
        for _ in range(config.ppo_epochs):
            order = torch.randperm(len(rollout.prompts), generator=generator)
            for chosen in order.split(config.minibatch_size):
                position += 1
                if position <= len(collected):
                    continue
                part = rollout.rows(chosen)
                goal = targets(part, config, kl_coef=kl_coef) if config.whitening_scope == "minibatch" else whole.rows(chosen)
                collected.append(self.minibatch(part, goal, train_policy=train_policy))
                progress.tokens += int(part.response_mask.sum())
                if after_minibatch is not None:
                    after_minibatch()
            if config.target_update_kl is not None and collected[position - 1]["policy/approx_kl"] > config.target_update_kl:
                break
        if train_policy and config.ema_cadence == "iteration":
            self._update_average()
        metrics = {name: sum(item[name] for item in collected) / len(collected) for name in collected[0]}
        metrics["policy/ratio_first_deviation"] = collected[0]["policy/ratio_max_deviation"]
        metrics["policy/ratio_max_deviation"] = max(item["policy/ratio_max_deviation"] for item in collected)
        return UpdateResult(metrics, len(collected), progress.tokens, self.matmuls.take())

    def minibatch(self, part: Rollout, goal: Targets, *, train_policy: bool = True) -> dict[str, float]:
        """Gradients of one minibatch and one optimizer step; returns its metrics."""
        totals, largest = self.accumulate(part, goal, train_policy=train_policy)
        metrics = {**_policy_metrics(totals.sums, largest), **(_value_metrics(totals.sums) if self.roles.has_value else {})}
        if self.config.pretraining_mix is not None and train_policy:
            metrics["policy/pretraining_loss"] = self._add_pretraining_gradient(len(part.prompts))
        losses = {name: metrics[f"{name}/loss"] for name in ("policy", "value") if f"{name}/loss" in metrics}
        if not math.isfinite(sum(losses.values())):
            said = " and ".join(f"the {name} loss is {loss}" for name, loss in losses.items())
            raise TrainingError(f"{said}; lower training.learning_rate, or use precision: fp32")
        metrics |= self._step(train_policy)
        return metrics

    def accumulate(self, part: Rollout, goal: Targets, *, train_policy: bool = True) -> tuple[Totals, float]:
        """Add the minibatch's gradients to the networks' buffers (summed over processes); returns its sums and largest |ratio - 1|."""
        config, roles = self.config, self.roles
        count = float(part.response_mask.sum())
        num_states = count + float(part.closing_mask.sum())
        totals = Totals({"tokens": 0.0})
        for rows, counts in self._microbatches(part):
            mask, closing = part.response_mask[rows], part.closing_mask[rows]
            device = roles.policy.device
            flat = {
                "rollout_logprobs": part.rollout_logprobs[rows][mask].to(device),
                "rollout_values": torch.cat([part.values[rows][mask], part.closing_values[rows][closing]]).to(device),
                "advantages": goal.advantages[rows][mask].to(device),
                "returns": torch.cat([goal.returns[rows][mask], goal.closing_returns[rows][closing]]).to(device),
            }
            batch = sequence_batch(
                [part.prompt_ids[row] for row in rows], [part.response(row) for row in rows], roles.tokenizer.pad_token_id, device
            )
            num_tokens = len(batch.tokens)
            if closing.any():  # those positions come last, and count for the values alone
                batch = with_closing(batch, closing)

            def term(logprobs: Tensor, entropies: Tensor, rows: slice, flat: dict[str, Tensor] = flat) -> Tensor:
                terms = policy_terms(
                    logprobs,
                    flat["rollout_logprobs"][rows],
                    flat["advantages"][rows],
                    clip_range=config.clip_range,
                    dual_clip=config.dual_clip,
                )
                return terms - config.entropy_coef * entropies if config.entropy_coef else terms

            with torch.set_grad_enabled(train_policy or roles.value is None):
                policy = roles.policy.loss(batch, term, num_tokens=num_tokens)
            logprobs, values = policy.logprobs, policy.values
            self.matmuls.add(roles.policy.decoder, batch, output=roles.policy.output, backward=train_policy)
            policy_loss = policy.summed / count * counts
            if roles.value is not None:
                if train_policy:
                    policy_loss.backward()
                values = sequence_values(roles.value, batch, roles.policy.precision())
                self.matmuls.add(roles.value.backbone, batch)
            if not roles.has_value:
                policy_loss.backward()
                values = errors = torch.zeros(num_tokens, device=device)
            else:
                assert values is not None
                errors = value_terms(values, flat["rollout_values"], flat["returns"], clip_range=config.value_clip_range)
                value_loss = config.value_coef * errors.sum() / num_states * counts
                if roles.value is not None or not train_policy:
                    value_loss.backward()
                else:
                    (policy_loss + value_loss).backward()
            if not counts:
                continue
            with torch.no_grad():
                log_ratio = logprobs - flat["rollout_logprobs"]
                ratio = log_ratio.exp()
                terms = policy_terms(
                    logprobs, flat["rollout_logprobs"], flat["advantages"], clip_range=config.clip_range, dual_clip=config.dual_clip
                )
                clipped = policy_clipped(logprobs, flat["rollout_logprobs"], flat["advantages"], clip_range=config.clip_range)
                value_clip = config.value_clip_range
                moved = (values - flat["rollout_values"]).abs()
                totals.add(
                    tokens=len(terms),
                    states=len(errors),
                    policy_loss=terms.sum(),
                    value_loss=errors.sum(),
                    entropy=policy.entropies.sum(),
                    approx_kl=0.5 * (log_ratio**2).sum(),
                    clipped=clipped.sum(),
                    value_clipped=0.0 if value_clip is None else (moved > value_clip).sum(),
                    ratio=ratio.sum(),
                    ratio_squared=(ratio**2).sum(),
                    error=((values - flat["returns"]) ** 2).sum(),
                    returns=flat["returns"].sum(),
                    returns_squared=(flat["returns"] ** 2).sum(),
                    values=values.sum(),
                )
                totals.note((ratio - 1).abs().max())
        largest = totals.read()
        if self.num_processes > 1:
            largest = self._reduce(totals, largest)
        return totals, largest

    def _microbatches(self, part: Rollout) -> Iterator[tuple[list[int], bool]]:
        """This process's episodes in groups of like length, the longest first: what does not fit into memory shows at once.

        Every process gets as many groups, since a model that is cut over them needs all in every pass; the second says whether one counts.
        """
        lengths = [len(ids) + int(length) for ids, length in zip(part.prompt_ids, part.lengths, strict=True)]
        order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
        limits: dict[str, Any] = {"rows": self.config.microbatch_size, "device_type": self.roles.policy.device.type}
        shares = [passes(order[index :: self.num_processes], lengths, **limits) for index in range(self.num_processes)]
        own = shares[self.process_index]
        for number in range(max(map(len, shares))):
            yield (own[number], True) if number < len(own) else (order[-1:], False)

    def _reduce(self, totals: Totals, largest: float) -> float:
        """Sum gradients and totals over processes (the losses were divided by global counts); returns the global maximum."""
        import torch.distributed as distributed

        for network in self.roles.networks().values():
            reduce_gradients(network)
        # A process without an episode in this minibatch has no sums yet.
        names = sorted({*totals.sums, *SUMS})
        device = self.roles.policy.device
        sums = torch.tensor([totals.sums.get(name, 0.0) for name in names], dtype=torch.float64, device=device)
        distributed.all_reduce(sums)
        totals.sums = dict(zip(names, sums.tolist(), strict=True))
        most = torch.tensor(largest, device=device)
        distributed.all_reduce(most, op=distributed.ReduceOp.MAX)
        return float(most)

    def _add_pretraining_gradient(self, num_episodes: int) -> float:
        """PPO-ptx: add coef * gradient of the mean loss per pretraining token into the policy's buffers; returns that loss."""
        mix = self.config.pretraining_mix
        assert mix is not None and self.pretraining_rows is not None
        rows = self.pretraining_rows.draw(num_episodes * mix.examples_per_episode)
        if mix.coef == 0:
            return 0.0
        before = _gradients(self.roles.networks()["policy"]) if self.num_processes > 1 else None
        totals = Totals()
        count = rows.numel() - len(rows) if mix.normalization == "token" else len(rows)
        own, largest_share = rows[self.process_index :: self.num_processes], -(-len(rows) // self.num_processes)
        size = rows_of_a_pass(self.config.microbatch_size, rows.shape[1], device_type=self.roles.policy.device.type)
        for start in range(0, largest_share, size):  # as many passes on every process
            group = own[start : start + size]
            counts = len(group) > 0
            batch = (group if counts else rows[:1]).to(self.roles.policy.device)
            loss = pretraining_loss(self.roles.policy, batch, self.matmuls) / count * counts
            (mix.coef * loss).backward()
            totals.add(loss=loss)
        totals.read()
        total = totals.sums.get("loss", 0.0)
        if before is not None:
            total = self._reduce_pretraining(before, total)
        return total

    def _reduce_pretraining(self, before: dict[str, Tensor], total: float) -> float:
        import torch.distributed as distributed

        for name, parameter in trainable(self.roles.networks()["policy"]).items():
            if is_cut(parameter):
                continue  # FSDP has added up its gradients
            own = parameter.grad - before[name] if parameter.grad is not None else torch.zeros_like(parameter)
            distributed.all_reduce(own)
            parameter.grad = before[name] + own
        summed = torch.tensor(total, device=self.roles.policy.device)
        distributed.all_reduce(summed)
        return float(summed)

    def _step(self, train_policy: bool) -> dict[str, float]:
        """Clip, step and clear; returns the gradient norms before clipping. Raises TrainingError for a norm that is not finite."""
        norms = {}
        limit = self.config.training.max_grad_norm
        for name, network in self.roles.networks().items():
            parameters = [parameter for parameter in trainable(network).values() if parameter.grad is not None]
            norm = clip_gradients(parameters, limit) if parameters else 0.0
            if not math.isfinite(norm):
                raise TrainingError(f"the gradient norm of the {name} is {norm}; lower training.learning_rate, or use precision: fp32")
            norms[f"{name}/grad_norm"] = norm
        for name, optimizer in self.optimizers.items():
            if name == "value" or train_policy:
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.optimizer_steps += 1
        if train_policy and self.config.ema_cadence == "optimizer_step":
            self._update_average()
        return norms

    def _update_average(self) -> None:
        if self.average is not None:
            self.average.update(self.roles.networks()["policy"])


SUMS = (
    "tokens",
    "states",
    "policy_loss",
    "value_loss",
    "entropy",
    "approx_kl",
    "clipped",
    "value_clipped",
    "ratio",
    "ratio_squared",
    "error",
    "returns",
    "returns_squared",
    "values",
)


def _policy_metrics(sums: dict[str, float], largest: float) -> dict[str, float]:
    """Means over the minibatch's tokens."""
    mean = {name: value / max(sums["tokens"], 1.0) for name, value in sums.items()}
    return {
        "policy/loss": mean["policy_loss"],
        "policy/entropy": mean["entropy"],
        "policy/approx_kl": mean["approx_kl"],
        "policy/clip_fraction": mean["clipped"],
        "policy/ratio_mean": mean["ratio"],
        "policy/ratio_variance": max(0.0, mean["ratio_squared"] - mean["ratio"] ** 2),
        "policy/ratio_max_deviation": largest,
    }


def _value_metrics(sums: dict[str, float]) -> dict[str, float]:
    """Means over the minibatch's states."""
    mean = {name: value / max(sums["states"], 1.0) for name, value in sums.items()}
    variance = mean["returns_squared"] - mean["returns"] ** 2
    return {
        "value/loss": mean["value_loss"],
        "value/clip_fraction": mean["value_clipped"],
        "value/mean": mean["values"],
        "value/returns_mean": mean["returns"],
        "value/returns_variance": variance,
        # 1 - error / variance: 1 is perfect, 0 no better than the mean, below 0 worse.
        "value/explained_variance": 1 - mean["error"] / max(variance, 1e-8),
    }


def pretraining_loss(policy: Policy, rows: Tensor, matmuls: MatmulCounter | None = None) -> Tensor:
    """Summed negative log-likelihood of the tokens of ``rows`` [B, T], at temperature 1; the first token of a row is given."""
    number, width = rows.shape
    places = torch.arange(width - 1, device=rows.device).repeat(number)
    owners = torch.arange(number, device=rows.device).repeat_interleave(width - 1)
    batch = SequenceBatch(rows, torch.full((number,), width, device=rows.device), owners, places, rows[:, 1:].flatten())
    if matmuls is not None:
        matmuls.add(policy.decoder, batch, output=policy.output)
    return policy.loss(batch, lambda logprobs, entropies, _: -logprobs, temperature=1.0).summed


def _gradients(model: Any) -> dict[str, Tensor]:
    made = {}
    for name, parameter in trainable(model).items():
        made[name] = parameter.grad.clone() if parameter.grad is not None else torch.zeros_like(parameter)
    return made
