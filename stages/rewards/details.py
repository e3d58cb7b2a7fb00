"""What a reward source may read beside prompts and completions, and what it gives back. N completions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Spans = list[list[tuple[int, float]]]
"""Per completion a list of (character position, score)."""


@dataclass(frozen=True)
class Details:
    """What is known of N completions beside their texts. Every list has N entries.

    ``columns``: the data set's other columns by name. ``completion_ids``: the completions' token ids by the model that wrote them; None
    where no model of this run wrote them.
    """

    columns: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    completion_ids: Sequence[list[int]] | None = None

    def rows(self, places: Sequence[int]) -> Details:
        """The details of the completions at ``places``."""
        ids = self.completion_ids
        columns = {name: [values[place] for place in places] for name, values in self.columns.items()}
        return Details(columns, None if ids is None else [ids[place] for place in places])


NOTHING = Details()


def columns_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Rows of named values as named lists; a row that lacks a name has None there."""
    names: Iterator[str] = (name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in dict.fromkeys(names)}


@dataclass(frozen=True)
class Judgement:
    """What a source says of N completions.

    ``scores`` [N] fp32: NaN where the source does not apply. ``spans``: where in the texts the scores arise; None for a source that does
    not say. ``cut`` [N] bool: the source could not read the whole text. ``completion_cut`` [N] bool: even a part of the completion was
    lost. Both are None for a source that reads texts of any length. ``measured`` [N] by
    name: what else is known of each completion, such as tokens and cost.
    """

    scores: Tensor
    spans: Spans | None = None
    cut: Tensor | None = None
    completion_cut: Tensor | None = None
    measured: dict[str, Tensor] = field(default_factory=dict)

    def notes(self, name: str) -> dict[str, Tensor]:
        """What is measured beside the scores, [N] each, by the name of its metric in the room ``scoring``."""
        found = {"cut_share": self.cut, "completion_cut_share": self.completion_cut}
        cuts = {key: value.float() for key, value in found.items() if value is not None}
        return {f"scoring/{name}_{key}": value for key, value in {**cuts, **self.measured}.items()}


def applies(scores: Tensor) -> Tensor:
    """Where a source has a score [N] bool: a score of None is kept as NaN."""
    return ~torch.isnan(scores)
