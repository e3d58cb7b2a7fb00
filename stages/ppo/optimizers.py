"""Optimization: TensorFlow 1's Adam, learning rates by iteration, and the moving average of weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from stages.ppo.config import PPOOptimizer
from stages.training.checkpoints import trainable


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
        assert closure is None, "closures are not supported: compute gradients before the step"
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["step"] = torch.tensor(0.0)
                    state["exp_avg"] = torch.zeros_like(parameter)
                    state["exp_avg_sq"] = torch.zeros_like(parameter)
                state["step"] += 1
                count = float(state["step"])
                state["exp_avg"].lerp_(parameter.grad, 1 - beta1)
                state["exp_avg_sq"].mul_(beta2).addcmul_(parameter.grad, parameter.grad, value=1 - beta2)
                rate = group["lr"] * math.sqrt(1 - beta2**count) / (1 - beta1**count)
                parameter.addcdiv_(state["exp_avg"], state["exp_avg_sq"].sqrt().add_(group["eps"]), value=-rate)


def make_optimizer(parameters: list[Tensor] | list[dict[str, list[nn.Parameter]]], settings: PPOOptimizer) -> torch.optim.Optimizer:
    """Adam over ``parameters`` with the given settings. Its learning rate is set before every iteration."""
    betas = (settings.adam_beta1, settings.adam_beta2)
    if settings.adam_style == "tensorflow":
        return TensorFlowAdam(parameters, lr=settings.learning_rate, betas=betas, eps=settings.adam_epsilon)
    if settings.optimizer != "adamw":
        import bitsandbytes

        kinds = {"adamw_8bit": "AdamW8bit", "paged_adamw": "PagedAdamW", "paged_adamw_8bit": "PagedAdamW8bit"}
        return getattr(bitsandbytes.optim, kinds[settings.optimizer])(
            parameters, lr=settings.learning_rate, betas=betas, eps=settings.adam_epsilon, weight_decay=settings.weight_decay
        )
    return torch.optim.AdamW(
        parameters, lr=settings.learning_rate, betas=betas, eps=settings.adam_epsilon, weight_decay=settings.weight_decay, fused=True
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
        for name, parameter in trainable(model).items():
            self.weights[name].lerp_(parameter.float(), 1 - self.decay)

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        """Copy the averages into the model."""
        for name, parameter in trainable(model).items():
            parameter.copy_(self.weights[name])
