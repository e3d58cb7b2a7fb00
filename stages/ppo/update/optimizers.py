"""Optimization: TensorFlow 1's Adam, learning rates by iteration, and the moving average of weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from stages.models.sharding import is_sharded
from stages.ppo.config import PPOOptimizer
from stages.training.checkpoints import trainable
from stages.training.fused import fused_adamw_works

FOREACH_VALUES = 2**26
"""Maximum values of the tensors of one foreach operation (256 MiB in fp32)."""


class TensorFlowAdam(torch.optim.Optimizer):
    """Adam with epsilon outside the bias correction, as in TensorFlow 1 and the first RLHF code.

    p -= lr * sqrt(1 - b2^t) / (1 - b1^t) * m / (sqrt(v) + eps). PyTorch's effective epsilon is eps * sqrt(1 - b2^t), which is tiny at
    first, so its first steps are larger (https://huggingface.co/blog/the_n_implementation_details_of_rlhf_with_ppo).
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, list[nn.Parameter]]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]  # PyTorch returns the loss of a closure; there is none here
        """Update every parameter that has a gradient."""
        assert closure is None, "closures are not supported: compute gradients before the step"
        for group in self.param_groups:
            trained = [parameter for parameter in group["params"] if parameter.grad is not None]
            for parameter in trained:
                if not self.state[parameter]:
                    moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
                    self.state[parameter] = {"step": torch.tensor(0.0), **moments}  # the count is on the CPU, where it is read
            for parameters in together(trained):
                self._step_of(parameters, group)

    def _step_of(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        """The step of ``parameters``. The number of operations does not depend on the number of parameters."""
        beta1, beta2 = group["betas"]
        states = [self.state[parameter] for parameter in parameters]
        rates = []
        for state in states:
            state["step"] += 1
            count = float(state["step"])
            rates.append(-group["lr"] * math.sqrt(1 - beta2**count) / (1 - beta1**count))
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]  # all have one
        means, squares = ([state[name] for state in states] for name in ("exp_avg", "exp_avg_sq"))
        torch._foreach_lerp_(means, gradients, 1 - beta1)
        torch._foreach_mul_(squares, beta2)
        torch._foreach_addcmul_(squares, gradients, gradients, 1 - beta2)
        divisors = torch._foreach_sqrt(squares)
        torch._foreach_add_(divisors, group["eps"])
        torch._foreach_addcdiv_(parameters, means, divisors, rates)


def together(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    """``tensors`` in groups for foreach operations: of one device, dtype and kind, and of at most ``FOREACH_VALUES`` values.

    The limit is for the memory of intermediate results. A larger tensor is alone in its group.
    """
    groups: list[list[Tensor]] = []
    filling: dict[tuple[object, ...], tuple[list[Tensor], int]] = {}  # group that is being filled, and its number of values
    for tensor in tensors:
        key = (tensor.device, tensor.dtype, is_sharded(tensor))
        group, size = filling.get(key, ([], 0))
        if not group or size + tensor.numel() > FOREACH_VALUES:
            group, size = [], 0
            groups.append(group)
        group.append(tensor)
        filling[key] = group, size + tensor.numel()
    return groups


def make_optimizer(parameters: list[Tensor] | list[dict[str, list[nn.Parameter]]], settings: PPOOptimizer) -> torch.optim.Optimizer:
    """Adam over ``parameters`` with the given settings. Its learning rate is set before every iteration.

    AdamW is fused where PyTorch supports that for the parameters' devices and dtypes. Otherwise it uses foreach operations.
    """
    betas = (settings.adam_beta1, settings.adam_beta2)
    if settings.adam_style == "tensorflow":
        return TensorFlowAdam(parameters, lr=settings.learning_rate, betas=betas, eps=settings.adam_epsilon)
    if settings.optimizer != "adamw":
        import bitsandbytes

        kinds = {"adamw_8bit": "AdamW8bit", "paged_adamw": "PagedAdamW", "paged_adamw_8bit": "PagedAdamW8bit"}
        return getattr(bitsandbytes.optim, kinds[settings.optimizer])(
            parameters, lr=settings.learning_rate, betas=betas, eps=settings.adam_epsilon, weight_decay=settings.weight_decay
        )
    weights = [weight for item in parameters for weight in (item["params"] if isinstance(item, dict) else [item])]
    kernels = {"fused": True} if fused_adamw_works(weights) else {"foreach": True}
    return torch.optim.AdamW(
        parameters, lr=settings.learning_rate, betas=betas, eps=settings.adam_epsilon, weight_decay=settings.weight_decay, **kernels
    )


def learning_rate_factor(settings: PPOOptimizer, iteration: int, num_iterations: int) -> float:
    """Learning rate in ``iteration`` (from 0) relative to the peak: warmup, then a constant, linear or cosine schedule.

    With 10 warmup iterations from 0.1, the first iteration has 0.1 and the eleventh the peak (Ouyang et al. 2022, C.4). Linear without
    warmup is 1 - iteration / num_iterations (openai/lm-human-preferences).
    """
    warmup = settings.warmup_iterations
    if iteration < warmup:
        return settings.warmup_start_fraction + (1 - settings.warmup_start_fraction) * iteration / warmup
    done = (iteration - warmup) / max(1, num_iterations - warmup)
    final = settings.final_learning_rate_fraction
    if settings.schedule == "linear":
        return 1 - (1 - final) * done
    if settings.schedule == "cosine":
        return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * done))
    return 1.0


class WeightAverage:
    """Exponential moving average of trainable weights in fp32, because half precision would round small differences to nothing."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.weights = {name: parameter.detach().float().clone() for name, parameter in trainable(model).items()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """ema = decay * ema + (1 - decay) * weight (Ouyang et al. 2022, C.4: 0.992 after every optimizer step)."""
        parameters = trainable(model)
        names = {id(weight): name for name, weight in self.weights.items()}
        for weights in together(self.weights.values()):
            torch._foreach_lerp_(weights, [parameters[names[id(weight)]].float() for weight in weights], 1 - self.decay)

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        """Copy the averages into the model."""
        for name, parameter in trainable(model).items():
            parameter.copy_(self.weights[name])
