"""Scale the loss of fp16 passes, so that small gradients do not become 0.

The smallest number of fp16 is 6e-8, and a gradient of one token is smaller in a large minibatch. The factor is a power of two, so it
changes no other gradient. bf16 has the range of fp32 and needs no factor.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence

import torch
from torch import nn

from stages.models.sharding import gradient_norm
from stages.training.checkpoints import trainable

logger = logging.getLogger(__name__)

FIRST = 2.0**16
LEAST = 1.0  # gradients that overflow without a factor are an error of the training
STEPS_TO_GROW = 200  # steps without an overflow before the factor doubles again


class LossScale:
    """Multiplies the loss by a factor, and divides the gradients by it. If they overflow, the passes are repeated with half the factor.

    ``is_used``: whether passes compute in fp16.
    """

    def __init__(self, autocast: torch.dtype | None) -> None:
        self.is_used = autocast == torch.float16
        self.factor = FIRST if self.is_used else 1.0
        self._steps = 0  # since the factor changed

    def backward(self, loss: torch.Tensor) -> None:
        """The backward pass of ``loss``, times the factor."""
        (loss if self.factor == 1.0 else loss * self.factor).backward()

    @torch.no_grad()
    def unscale(self, networks: Iterable[nn.Module]) -> bool:
        """Divide the gradients of ``networks`` by the factor. If one has overflowed, halve the factor instead, and return False.

        With the smallest factor, gradients that have overflowed are left as they are. Call it on every process, with the gradients of all
        processes. In fp16 the device is read once.
        """
        if not self.is_used:
            return True
        parameters = [list(trainable(network).values()) for network in networks]
        norms = torch.stack([gradient_norm(own).double() for own in parameters])
        if not bool(torch.isfinite(norms).all()):
            self._steps = 0
            if self.factor == LEAST:
                return True
            self.factor /= 2
            logger.info("PPO update: gradients overflowed in fp16; the passes are repeated with a loss scale of %g", self.factor)
            return False
        gradients = [parameter.grad for own in parameters for parameter in own if parameter.grad is not None]
        for gradient in gradients:
            gradient /= self.factor
        self._steps += 1
        if self._steps >= STEPS_TO_GROW and self.factor < FIRST:
            self.factor, self._steps = 2 * self.factor, 0
        return True

    @property
    def state(self) -> tuple[float, int] | None:
        """The factor and the steps since it changed, for a checkpoint; None if there is no factor."""
        return (self.factor, self._steps) if self.is_used else None

    def resume(self, state: Sequence[float] | None) -> None:
        """Continue with the ``state`` of a checkpoint, so that a resumed run has the same passes."""
        if self.is_used and state is not None:
            self.factor, self._steps = float(state[0]), int(state[1])
