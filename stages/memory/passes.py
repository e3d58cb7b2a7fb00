"""A pass through a model, and its memory as a polynomial of rows and columns.

R rows (sequences), C columns (tokens of a row).
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Literal

from stages.config import LoraSettings

Task = Literal["CAUSAL_LM", "FEATURE_EXTRACTION", "SEQ_CLS"]
"""Which class of a model a step loads: a language model, the transformer below a scalar head, or a classifier."""


@dataclass(frozen=True)
class Adapter:
    """The settings of a trained adapter that decide its size: those of LoraSettings that are not the default, as JSON."""

    content: str = "{}"

    @classmethod
    def of(cls, lora: LoraSettings | None) -> Adapter | None:
        """The adapter that a step trains; None if it trains all weights."""
        if lora is None:
            return None
        return cls(lora.model_dump_json(exclude_defaults=True, exclude={"alpha", "alpha_pattern", "use_rslora", "dropout"}))

    @property
    def settings(self) -> LoraSettings:
        """The settings with which ``models/adapters/attaching.py`` makes it."""
        return LoraSettings.model_validate_json(self.content)

    @property
    def is_everywhere(self) -> bool:
        """Whether it is on every linear layer, with the same rank and without copies of modules. It is the same for each ``Task``."""
        return not {"target_modules", "exclude_modules", "modules_to_save", "rank_pattern"} & self.settings.model_fields_set

    @property
    def may_differ_by_layer(self) -> bool:
        """Whether its settings may name layers by number. A name without digits is in every layer or in none."""
        lora = self.settings
        names = [*lora.modules_to_save, *lora.rank_pattern]
        for some in (lora.target_modules, lora.exclude_modules):
            names += [some] if isinstance(some, str) else some
        return any(re.search(r"\d|[^\w.-]", name) for name in names)


@dataclass(frozen=True)
class PassKind:
    """A pass through the layers of a transformer, without an output layer.

    ``config``: the transformers config as JSON. ``weights`` and ``compute``: bytes per weight, and per value of the compute dtype.
    ``adapter``: the adapter that is trained; None: all weights are trained. ``trains``: with a backward pass. ``masked``: rows have
    padding, so attention gets a mask. ``task``: the class that the adapter is added to, whose module names its settings use.
    ``stacks``: the unmerged adapters of each role on the same weights, lowest first (see ``planned_form``, or a folder). ``new_rows``: the
    last rows of the embedding that an adapter trains.
    """

    config: str
    vocabulary: int
    device: str  # cpu | cuda
    weights: int
    compute: int
    trains: bool
    checkpointing: bool = False
    adapter: Adapter | None = None
    quantization: str = "none"
    masked: bool = False
    task: Task = "CAUSAL_LM"
    stacks: tuple[tuple[str, ...], ...] = ()
    new_rows: int = 0

    @property
    def trained_rows(self) -> range:
        """The token ids of ``new_rows``."""
        return range(self.vocabulary - self.new_rows, self.vocabulary)


def planned_form(name: str, adapter: Adapter) -> str:
    """An adapter that a step will make, as JSON: a name for it, and its settings."""
    return json.dumps([name, adapter.content])


@dataclass(frozen=True)
class Polynomial:
    """Bytes as a function of layers, rows and columns: fixed + tokens * (R C) + pairs * (R C^2), each (of the model, of every layer)."""

    fixed: tuple[float, float]
    tokens: tuple[float, float]
    pairs: tuple[float, float]

    def at(self, layers: int, rows: float, columns: float) -> float:
        """The bytes of a pass; never negative."""
        sizes = (1.0, rows * columns, rows * columns**2)
        terms = zip((self.fixed, self.tokens, self.pairs), sizes, strict=True)
        return max(0.0, sum((of_model + layers * of_layer) * size for (of_model, of_layer), size in terms))


@dataclass(frozen=True)
class PassMemory:
    """The memory of a pass besides weights and gradients. ``kept``: at the end of the forward pass. ``peak``: the maximum."""

    kept: Polynomial
    peak: Polynomial
