"""The gradients of a minibatch: forward and backward passes of policy and value network within a token budget.

A minibatch's loss is the mean over all its response tokens, on all processes. It does not depend on the microbatches:
every microbatch adds its sum divided by the number of tokens of the full minibatch. Losses are per token; N counted tokens of a microbatch.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
import torch.distributed as distributed
from torch import Tensor

from stages.errors import is_out_of_memory
from stages.kernels.token_budget import tokens_of
from stages.kernels.transfers import moved_together
from stages.models.adapters.folding import roles_together
from stages.models.layers.compiled import compiled_passes
from stages.models.passes.budget import PassBudget, refuse_alone
from stages.models.passes.packing import packed_attention
from stages.models.passes.responses import Policy, PolicyLoss, SequenceBatch, loss_and_values, repeated, sequence_values
from stages.models.sharding import reduce_gradients
from stages.ppo.config import PPOStepConfig
from stages.ppo.data import PretrainingRows
from stages.ppo.records.speed import MatmulCounter
from stages.ppo.roles import Roles
from stages.ppo.rollout.rollout import Rollout
from stages.ppo.update.loss_scale import LossScale
from stages.ppo.update.minibatch import Minibatch, Pass
from stages.ppo.update.targets import Targets
from stages.ppo.update.totals import Totals
from stages.rl.losses import policy_clipped, policy_terms, value_terms
from stages.sampling.casts import casted_parameters

logger = logging.getLogger(__name__)

ADVICE = (
    "Lower max_prompt_tokens or generation.max_new_tokens, set training.gradient_checkpointing: true, or use lora, a quantized policy "
    "(quantization: nf4) or a smaller one"
)


class Gradients:
    """Computes the gradients of minibatches, in passes that fit into memory."""

    def __init__(
        self,
        roles: Roles,
        optimizers: dict[str, torch.optim.Optimizer],
        config: PPOStepConfig,
        *,
        pretraining_rows: PretrainingRows | None = None,
        process_index: int = 0,
        num_processes: int = 1,
    ) -> None:
        self.roles, self.optimizers, self.config = roles, optimizers, config
        self.pretraining_rows = pretraining_rows
        self.process_index, self.num_processes = process_index, num_processes
        self.matmuls = MatmulCounter()
        device, size = roles.policy.device, config.microbatch_size
        self.budget = PassBudget("PPO update", device, size, rows=config.rows_per_pass, trains=True, advice=ADVICE)
        self.loss_scale = LossScale(roles.policy.autocast)
        self._is_joint = False  # whether the current passes are those of policy and value network together
        self._may_join = True  # False: memory ran out in such a pass over one episode

    def accumulate(self, part: Rollout, part_targets: Targets, *, train_policy: bool = True) -> Totals:
        """Add the minibatch's gradients, summed over processes, to the networks' (empty) gradient buffers; returns its sums, not yet read.

        All passes are repeated with empty buffers if memory runs out, with a smaller token budget, or if gradients overflow in fp16.
        """
        importance = part.importance(self.config.importance_cap)
        pad, device = self.roles.tokenizer.pad_token_id, self.roles.policy.device
        episodes = Minibatch(part, part_targets, pad_token_id=pad, device=device, importance=importance)
        texts = self._draw_pretraining_rows(len(episodes)) if train_policy else None
        kernel = self.roles.kernel("policy", "value")
        networks = self.roles.networks().values()
        while True:
            totals = self._passes_that_fit(episodes, texts, kernel, train_policy)
            if self.num_processes > 1:
                for network in networks:
                    reduce_gradients(network)
            if self.loss_scale.unscale(networks):
                break
            self._clear_gradients()
        if self.num_processes > 1:
            totals.reduce(device)
        if self.budget.measures:
            self.budget.settle(self._pending_moments() + self._casts(), agree=_smallest_of_all if self.roles.are_sharded else None)
        return totals

    def _passes_that_fit(self, episodes: Minibatch, texts: Tensor | None, kernel: str | None, train_policy: bool) -> Totals:
        """``_passes``, repeated with a smaller token budget if memory runs out."""
        while True:
            try:
                totals = self._passes(episodes, texts, kernel, train_policy)
            except Exception as error:
                self._retreat(error)
            else:
                self.budget.succeeded()
                return totals
            # After the except clause, because the error kept the tensors of the failed pass alive.
            self._clear_gradients()
            self.budget.release()

    def _clear_gradients(self) -> None:
        for network in self.roles.networks().values():
            network.zero_grad(set_to_none=True)

    def _retreat(self, error: Exception) -> None:
        """Reduce the token budget, or separate policy and value network if a joint pass had a single episode.

        Raises ``error`` if memory did not run out, MemoryExhausted if a pass cannot be smaller.
        """
        if self.roles.are_sharded:
            refuse_alone(error, self.budget.what, ADVICE)
        if self._is_joint and is_out_of_memory(error) and self.budget.current[0] == 1:
            logger.warning(
                "PPO update: memory ran out in a pass of policy and value network together; their passes are separate from now on"
            )
            self._may_join = False
            self.budget.retreats += 1
        else:
            self.budget.retreat(error)

    def _passes(self, episodes: Minibatch, texts: Tensor | None, kernel: str | None, train_policy: bool) -> Totals:
        """Run this process's forward and backward passes of a minibatch; returns the sums over its tokens, not yet read."""
        roles = self.roles
        totals = Totals({"tokens": float(episodes.num_tokens)})
        totals.add(states=float(episodes.num_states if roles.has_value else episodes.num_tokens))
        packed = kernel is not None
        joint = roles.joint_adapters if train_policy and self._joins(episodes, packed=packed) else None
        self._is_joint = joint is not None
        copies = 1 if joint is None else 2
        with roles.casts_kept(), compiled_passes():
            for rows, counts in self._microbatches(episodes, packed=packed, copies=copies):
                with self.budget.one_pass(len(rows), copies * tokens_of(rows, episodes.lengths, packed=packed)):
                    one = episodes.pick(rows, kernel=kernel)
                    if joint is None:
                        self._pass(one, episodes, counts, train_policy, totals)
                    else:
                        self._joint_pass(one, episodes, joint, totals)
            if texts is not None:
                self._pretraining_passes(texts, totals)
        return totals

    def _pass(self, one: Pass, episodes: Minibatch, counts: bool, train_policy: bool, totals: Totals) -> None:
        """Forward and backward pass of policy and values over some episodes. ``counts``: whether they add to gradients and sums."""
        config, roles = self.config, self.roles
        with packed_attention(one.batch.packing, *roles.decoders("policy", "value")):
            # With a shared value head, one backward pass goes through both, so the policy's loss is always needed.
            with torch.set_grad_enabled(train_policy or roles.value is None):
                policy = roles.policy.loss(one.batch, self._policy_term(one), num_tokens=one.num_tokens)
            self.matmuls.add(roles.policy.decoder, one.batch, output=roles.policy.output, backward=train_policy)
            losses = [policy.summed / float(episodes.num_tokens) * counts]
            values = policy.values
            if roles.value is not None:
                if train_policy:
                    self.loss_scale.backward(losses.pop())
                # Without its graph: int8 layers keep their inputs in it, also after the backward pass.
                policy, losses = replace(policy, summed=policy.summed.detach()), []
                values = sequence_values(roles.value, one.batch, roles.policy.precision())
                self.matmuls.add(roles.value.backbone, one.batch)
            errors = None
            if roles.has_value:
                assert values is not None
                errors = value_terms(values, one.rollout_values, one.returns, clip_range=config.clip.value)
                if not train_policy:
                    losses = []
                losses.append(config.value_coef * errors.sum() / float(episodes.num_states) * counts)
            self.loss_scale.backward(sum(losses[1:], losses[0]))
        if counts:
            self._sum_up(one, policy, values, errors, totals)

    def _joint_pass(self, one: Pass, episodes: Minibatch, adapters: tuple[Sequence[str], Sequence[str]], totals: Totals) -> None:
        """``_pass`` of policy and value network together, for adapters on one backbone. The gradients are the same."""
        roles = self.roles
        assert roles.value is not None
        batch = repeated(one.batch)
        with packed_attention(batch.packing, roles.policy.decoder), roles_together(*adapters):
            policy, values = loss_and_values(roles.policy, roles.value, batch, self._policy_term(one), num_tokens=one.num_tokens)
            self.matmuls.add(roles.policy.decoder, one.batch, output=roles.policy.output)
            self.matmuls.add(roles.value.backbone, one.batch)
            errors = value_terms(values, one.rollout_values, one.returns, clip_range=self.config.clip.value)
            of_values = self.config.value_coef * errors.sum() / float(episodes.num_states)
            self.loss_scale.backward(policy.summed / float(episodes.num_tokens) + of_values)
        self._sum_up(one, policy, values, errors, totals)

    def _policy_term(self, one: Pass) -> Callable[[Tensor, Tensor, slice], Tensor]:
        """The policy's loss per token of a pass, as a function of its log-probabilities and entropies."""

        def term(logprobs: Tensor, entropies: Tensor, rows: slice) -> Tensor:
            terms = self._weighted_terms(one, logprobs, rows)
            return terms - self.config.entropy_coef * entropies if self.config.entropy_coef else terms

        return term

    def _weighted_terms(self, one: Pass, logprobs: Tensor, rows: slice) -> Tensor:
        """PPO's clipped terms of the tokens ``rows`` of a pass, times their importance weights. ``logprobs``: those of ``rows``."""
        clip = self.config.clip
        terms = policy_terms(logprobs, one.rollout_logprobs[rows], one.advantages[rows], clip_range=clip.ratio, dual_clip=clip.dual)
        return terms if one.importance is None else terms * one.importance[rows]

    @torch.no_grad()
    def _sum_up(self, one: Pass, policy: PolicyLoss, values: Tensor | None, errors: Tensor | None, totals: Totals) -> None:
        """Add a pass's sums over tokens, from which the metrics are computed."""
        config = self.config
        log_ratio = policy.logprobs - one.rollout_logprobs
        ratio = log_ratio.exp()
        terms = self._weighted_terms(one, policy.logprobs, slice(None))
        clipped = policy_clipped(policy.logprobs, one.rollout_logprobs, one.advantages, clip_range=config.clip.ratio)
        totals.add(
            policy_loss=terms.sum(),
            entropy=policy.entropies.sum(),
            approx_kl=0.5 * (log_ratio**2).sum(),
            clipped=clipped.sum(),
            ratio=ratio.sum(),
            ratio_squared=(ratio**2).sum(),
        )
        totals.note((ratio - 1).abs().max())
        if values is None or errors is None:
            return
        if config.clip.value is not None:
            totals.add(value_clipped=((values - one.rollout_values).abs() > config.clip.value).sum())
        totals.add(
            value_loss=errors.sum(),
            error=((values - one.returns) ** 2).sum(),
            returns=one.returns.sum(),
            returns_squared=(one.returns**2).sum(),
            values=values.sum(),
        )

    def _joins(self, episodes: Minibatch, *, packed: bool) -> bool:
        """Whether passes of policy and value network together are fewer than separate ones.

        A joint pass needs the memory of twice the tokens. So with a full token budget, their number would be the same. A number of
        episodes in the recipe is a decision about memory, which a joint pass would double.
        """
        if self.roles.joint_adapters is None or not self._may_join:
            return False
        if self.roles.joins:
            return True
        if self.config.microbatch_size != "auto":
            return False
        joint, separate = (sum(1 for _ in self._microbatches(episodes, packed=packed, copies=copies)) for copies in (2, 1))
        return joint < 2 * separate

    def _microbatches(self, episodes: Minibatch, *, packed: bool, copies: int = 1) -> Iterator[tuple[list[int], bool]]:
        """This process's episodes in microbatches of similar length, the longest first, so that missing memory shows up immediately.

        With sharded weights, all processes must take part in every pass. Then every process gets the same number of microbatches, and the
        second value says whether a microbatch counts. ``copies``: how often a pass has each episode.
        """
        lengths = [copies * length for length in episodes.lengths]
        order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
        shares = [self.budget.groups(order[index :: self.num_processes], lengths, packed=packed) for index in range(self.num_processes)]
        own = shares[self.process_index]
        for number in range(max(map(len, shares)) if self.roles.are_sharded else len(own)):
            yield (own[number], True) if number < len(own) else (order[-1:], False)

    def _draw_pretraining_rows(self, num_episodes: int) -> Tensor | None:
        """The pretraining rows of PPO-ptx for a minibatch [rows, T]; None without a pretraining mix."""
        mix = self.config.pretraining_mix
        if mix is None:
            return None
        assert self.pretraining_rows is not None
        return self.pretraining_rows.draw(num_episodes * mix.examples_per_episode)

    def _pretraining_passes(self, rows: Tensor, totals: Totals) -> None:
        """PPO-ptx: add coef * gradient of the mean loss per pretraining token to the policy's gradients, and that loss to the sums."""
        mix = self.config.pretraining_mix
        assert mix is not None
        if mix.coef == 0:
            return
        width = rows.shape[1]
        count = rows.numel() - len(rows) if mix.normalization == "token" else len(rows)
        own, largest_share = rows[self.process_index :: self.num_processes], -(-len(rows) // self.num_processes)
        size = self.budget.rows_for(largest_share, width)
        for start in range(0, largest_share, size):  # the same number of passes on every process
            group = own[start : start + size]
            counts = len(group) > 0
            (batch,) = moved_together([group if counts else rows[:1]], self.roles.policy.device)
            with self.budget.one_pass(len(batch), batch.numel()):
                loss = pretraining_loss(self.roles.policy, batch, self.matmuls) / count * counts
                self.loss_scale.backward(mix.coef * loss)
            totals.add(pretraining_loss=loss)

    def _casts(self) -> int:
        """Bytes of the half-precision copies of weights that exist during all passes of an optimizer step (``casts_kept``)."""
        dtype = self.roles.policy.autocast
        if dtype is None or self.roles.are_sharded:
            return 0
        weights = {id(weight): weight for model in self.roles.models() for _, _, weight in casted_parameters(model)}
        return sum(dtype.itemsize * weight.numel() for weight in weights.values())

    def _pending_moments(self) -> int:
        """Bytes of the optimizer moments that do not exist before the first optimizer step."""
        waiting = [
            parameter
            for optimizer in self.optimizers.values()
            for group in optimizer.param_groups
            for parameter in group["params"]
            if not optimizer.state.get(parameter)
        ]
        eight_bits = self.config.training.optimizer.endswith("8bit")
        return sum((2 if eight_bits else 8) * parameter.numel() for parameter in waiting)


def _smallest_of_all(number: int) -> int:
    """The minimum over all processes."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    value = torch.tensor(number, device=device)
    distributed.all_reduce(value, op=distributed.ReduceOp.MIN)
    return int(value)


def pretraining_loss(policy: Policy, rows: Tensor, matmuls: MatmulCounter | None = None) -> Tensor:
    """Summed negative log-likelihood of the tokens of ``rows`` [B, T] at temperature 1. The first token of a row is not predicted."""
    num_rows, width = rows.shape
    columns = torch.arange(width - 1, device=rows.device).repeat(num_rows)
    owners = torch.arange(num_rows, device=rows.device).repeat_interleave(width - 1)
    batch = SequenceBatch(rows, torch.full((num_rows,), width, device=rows.device), owners, columns, rows[:, 1:].reshape(-1))
    if matmuls is not None:
        matmuls.add(policy.decoder, batch, output=policy.output)
    return policy.loss(batch, lambda logprobs, entropies, _: -logprobs, temperature=1.0).summed
