"""Choose held-out rows: the last ones, or all rows of some groups (users, annotators), so that no group is in both splits.

For cross-validation, groups are assigned to folds once, and each fold is held out once (Ouyang et al. 2022, E.2).
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Sequence

from stages.config import DataInput
from stages.corpora.rows import Row
from stages.errors import DataError

logger = logging.getLogger(__name__)


def hold_out(rows: Sequence[Row], data: DataInput, name: str) -> tuple[list[Row], list[Row]]:
    """Split one table into (training rows, held-out rows) in data order. Raises DataError if one side would be empty."""
    if data.split_by is None:
        held = max(1, round(len(rows) * data.validation_fraction))
        if len(rows) <= held:
            raise DataError(f"{name}: {len(rows)} row(s) are too few to hold any out; name a validation source or add data")
        return list(rows[:-held]), list(rows[-held:])
    column = data.split_by
    for row in rows:
        if row.get(column) is None:
            raise DataError(f"{row.location}: split_by: {column} needs that column in every row; the row has {', '.join(row)}")
    groups = shuffled_groups({str(row[column]) for row in rows})
    if data.folds is not None:
        if len(groups) < data.folds:
            raise DataError(
                f"{name}: {len(groups)} different {column} are too few for {data.folds} folds; lower folds to {len(groups)} or less"
            )
        chosen = set(groups[data.fold :: data.folds])
    else:
        chosen = set(groups[: max(1, round(len(groups) * data.validation_fraction))])
    train = [row for row in rows if str(row[column]) not in chosen]
    heldout = [row for row in rows if str(row[column]) in chosen]
    if not train:
        raise DataError(f"{name}: all rows have one {column} ({groups[0]!r}); expected at least two groups, so that one can be held out")
    return train, heldout


def say_shared(train: Iterable[tuple[str, str]], heldout: Iterable[tuple[str, str]]) -> None:
    """Warn if held-out rows are also training rows. ``train`` and ``heldout``: (content, location) of each row.

    The content is what the step reads, so other columns, and the names of the files, do not count. Both are read once, so they may be
    generators: a list of the contents would need as much memory as the data.
    """
    held = list(heldout)
    wanted = {content for content, _ in held}
    trained: dict[str, str] = {}
    for content, location in train:
        if content in wanted:
            trained.setdefault(content, location)
    shared = [(location, trained[content]) for content, location in held if content in trained]
    if shared:
        logger.warning(
            "%d of %d held-out rows are also training rows (the first: %s equals %s), so measurements on held-out rows are too good; "
            "remove duplicates, or change split, skip or limit of a source",
            len(shared),
            len(held),
            *shared[0],
        )


def shuffled_groups(names: set[str]) -> list[str]:
    """Order groups by a hash of their names. Adding or reordering rows does not move a group to another split."""
    return sorted(names, key=lambda name: hashlib.blake2b(name.encode(), digest_size=8).digest())
