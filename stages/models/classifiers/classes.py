"""The classes of a sequence classifier that is trained further: their order in the checkpoint's head and in the new labels."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from stages.errors import some_of
from stages.sampling.support import plain_model

if TYPE_CHECKING:
    from stages.model_types import TransformersModel

logger = logging.getLogger(__name__)
UNNAMED = re.compile(r"LABEL_\d+")
"""The names that transformers gives to classes without a name."""


def order_classes(model: TransformersModel, classes: Sequence[str] | None, labels: Sequence[str], ref: str) -> None:
    """Put the outputs of the head of ``model`` (loaded from ``ref``) into the order of ``labels``, if ``classes`` are the same names.

    ``classes``: the names in the checkpoint by index; None if it has no head. Names are compared without regard to case. Logs a warning if
    the names or their number differ, because then only the user knows whether the classes correspond.
    """
    if classes is None or [*classes] == [*labels]:
        return
    if len(classes) != len(labels):
        logger.warning(
            "%s has %d classes (%s) and labels has %d: its head is replaced by a new one",
            ref,
            len(classes),
            some_of(classes, 6),
            len(labels),
        )
        return
    index = {name.casefold(): number for number, name in enumerate(classes)}
    if index.keys() == {label.casefold() for label in labels}:
        _reorder(_last_layer(plain_model(model), len(labels)), [index[label.casefold()] for label in labels])
    elif not all(UNNAMED.fullmatch(name) for name in classes):
        logger.warning(
            "the classes %s of %s are now called %s, in this order; change the order of labels if it is wrong",
            some_of(classes, 6),
            ref,
            some_of(labels, 6),
        )


def _last_layer(model: nn.Module, size: int) -> nn.Module:
    """The layer that computes the logits: the last linear layer with ``size`` outputs."""
    return [module for module in model.modules() if isinstance(module, nn.Linear) and module.out_features == size][-1]


@torch.no_grad()
def _reorder(layer: nn.Module, order: Sequence[int]) -> None:
    """Change the order of the outputs of a linear layer: output i becomes the earlier output ``order[i]``."""
    for parameter in layer.parameters():
        parameter.copy_(parameter[list(order)].clone())
