"""The additional inputs of a reward source (``Details``), its result (``Judgement``), and the check of its scores. N completions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from stages.errors import TrainingError
from stages.metric_names import COMPLETION_CUT_SHARE, CUT_SHARE, scoring_name

Spans = list[list[tuple[int, float]]]
"""For each completion a list of (character position, score)."""


@dataclass(frozen=True)
class Details:
    """Information about N completions beyond their texts. Every list has N entries.

    ``columns``: the other columns of the data set, by name. ``completion_ids``: the token ids of the completions, by the tokenizer of the
    model that wrote them; None if no model of this run wrote them.
    """

    columns: Mapping[str, Sequence[object]] = field(default_factory=dict)
    completion_ids: Sequence[list[int]] | None = None

    def rows(self, indices: Sequence[int]) -> Details:
        """The details of the completions with these indices."""
        ids = self.completion_ids
        columns = {name: [values[index] for index in indices] for name, values in self.columns.items()}
        return Details(columns, None if ids is None else [ids[index] for index in indices])


NOTHING = Details()


def columns_of(rows: Sequence[Mapping[str, object]]) -> dict[str, list[object]]:
    """Convert rows (name -> value) to columns (name -> list). A row without a name gets None in that column."""
    names: Iterator[str] = (name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in dict.fromkeys(names)}


@dataclass(frozen=True)
class Judgement:
    """The result of a source for N completions.

    ``scores`` [N] fp32: NaN where the source does not apply. ``spans``: the positions in the texts that the scores belong to; None if the
    source has only one score per text. ``cut`` [N] bool: the text was too long and was cut. ``completion_cut`` [N] bool: a part of the
    completion was cut, too. Both are None for a source that reads texts of any length. ``measured``: further measurements [N] by name,
    such as tokens and cost. ``parts``: further values [N] by metric name: the scores of an ensemble's members and their variance.
    """

    scores: Tensor
    spans: Spans | None = None
    cut: Tensor | None = None
    completion_cut: Tensor | None = None
    measured: dict[str, Tensor] = field(default_factory=dict)
    parts: dict[str, Tensor] = field(default_factory=dict)

    def notes(self, name: str) -> dict[str, Tensor]:
        """The measurements other than the scores, [N] each, by metric name (``scoring/<name>_...``)."""
        flags = {CUT_SHARE: self.cut, COMPLETION_CUT_SHARE: self.completion_cut}
        cuts = {key: value.float() for key, value in flags.items() if value is not None}
        return {scoring_name(name, key): value for key, value in {**cuts, **self.measured}.items()}


def applies(scores: Tensor) -> Tensor:
    """Whether a source applies to each completion [N] bool, that is, whether its score is not NaN."""
    return ~torch.isnan(scores)


def checked(scores: Tensor, name: str, completions: Sequence[str]) -> Tensor:
    """Return ``scores`` as [N] fp32 on the CPU.

    Raises TrainingError if the shape is not [N] or a score is not finite; it names the source and the first bad completion.
    """
    scores = torch.as_tensor(scores, dtype=torch.float32).cpu()
    if scores.shape != (len(completions),):
        expected = f"expected one number per completion ({len(completions)})"
        raise TrainingError(f"reward {name!r} returned scores of shape {tuple(scores.shape)}; {expected}")
    bad = torch.nonzero(~torch.isfinite(scores)).flatten()
    if len(bad):
        row = int(bad[0])
        value, text = float(scores[row]), completions[row][:80]
        raise TrainingError(f"reward {name!r} returned {value} for the completion {text!r}; expected a finite number")
    return scores
