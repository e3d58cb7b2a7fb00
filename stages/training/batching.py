"""Assign rows to processes and forward passes so that optimizer steps do not depend on the number of processes or the microbatch size.

An optimizer step takes ``batch_size`` rows in an order shuffled by seed and epoch; the last step of an epoch takes the remaining rows. Each
process gets every n-th row of a step. If lengths are known, the rows are sorted by length first, so that passes need little padding.
All processes run the same number of forward passes, because a sharded model needs all processes for each pass. A pass without a row gets a
blank row with no effect on the loss.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING, Protocol, TypeVar, cast

from torch.utils.data import DataLoader

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch.utils.data import Dataset


Example = TypeVar("Example")
Example_co = TypeVar("Example_co", covariant=True)
Batch = TypeVar("Batch")
SORTED_STEPS = 50  # number of steps whose rows are sorted by length together


class Rows(Protocol[Example_co]):
    """Rows by index: a PyTorch data set, or one of the library datasets."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Example_co: ...
    def __iter__(self) -> Iterator[Example_co]: ...


@dataclass(frozen=True)
class BatchPlan:
    """How rows are divided into steps and forward passes."""

    num_rows: int
    batch_size: int  # rows per optimizer step, summed over processes
    microbatch_size: int  # maximum rows per forward pass and process
    seed: int = 0
    process_index: int = 0
    num_processes: int = 1
    lengths: Sequence[int] | None = None  # of the rows, in tokens; if given, rows of similar length share a pass
    groups_steps: bool = False  # whether rows of similar length also share a step

    def steps(self, epoch: int) -> list[list[int]]:
        """The rows of each optimizer step of an epoch, over all processes."""
        order = list(range(self.num_rows))
        Random(f"epoch {self.seed} {epoch}").shuffle(order)
        if self.lengths is not None and self.groups_steps:
            lengths, span = self.lengths, self.batch_size * SORTED_STEPS
            pieces = [sorted(order[at : at + span], key=lambda row: -lengths[row]) for at in range(0, len(order), span)]
            order = [row for piece in pieces for row in piece]
        return [order[at : at + self.batch_size] for at in range(0, len(order), self.batch_size)]

    def microbatches(self, rows: Sequence[int]) -> list[list[int]]:
        """This process's rows of one step, split into forward passes of similar size. Every process has the same number of passes."""
        lengths = self.lengths
        ordered = rows if lengths is None else sorted(rows, key=lambda row: -lengths[row])
        own = list(ordered[self.process_index :: self.num_processes])
        num_microbatches = self.num_microbatches(len(rows))
        edges = [len(own) * index // num_microbatches for index in range(num_microbatches + 1)]
        return [own[start:end] for start, end in zip(edges, edges[1:], strict=False)]

    def num_microbatches(self, num_rows: int) -> int:
        """Number of forward passes of a step with ``num_rows`` rows."""
        share = -(-num_rows // self.num_processes)
        return -(-share // self.microbatch_size)

    def __len__(self) -> int:
        """Number of this process's forward passes in an epoch."""
        full_steps, rest = divmod(self.num_rows, self.batch_size)
        return full_steps * self.num_microbatches(self.batch_size) + (self.num_microbatches(rest) if rest else 0)


def make_loader(
    dataset: Rows[Example], collate: Callable[[list[Example]], Batch], blank: Callable[[Batch], Batch], plan: BatchPlan
) -> DataLoader[Example]:
    """A loader of this process's forward passes. ``blank`` makes a batch have no effect on the loss, for passes without a row."""
    sampler = _Microbatches(plan)

    def batch(rows: list[Example]) -> Batch:
        return collate(rows) if rows else blank(collate([dataset[0]]))

    class Loader(DataLoader):
        def set_epoch(self, epoch: int) -> None:
            sampler.set_epoch(epoch)

    return Loader(cast("Dataset[Example]", dataset), batch_sampler=sampler, collate_fn=batch)


class _Microbatches:
    """Batch sampler over the forward passes of an epoch."""

    def __init__(self, plan: BatchPlan) -> None:
        self.plan, self.epoch = plan, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.plan)

    def __iter__(self) -> Iterator[list[int]]:
        for rows in self.plan.steps(self.epoch):
            yield from self.plan.microbatches(rows)
