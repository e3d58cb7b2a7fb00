"""Which rows a process trains on, in which forward pass: the same optimizer steps whatever the number of processes and the microbatch.

An optimizer step takes ``batch_size`` rows in the order of a shuffle that the seed and the epoch decide; the last step of an epoch takes
what is left. Each process gets every n-th row of a step, and all have the same number of forward passes: a sharded model needs all
processes for each of them. A pass may so be without a row; it is then given one that does not count.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch.utils.data import DataLoader

SORTED_STEPS = 50  # rows of so many steps are sorted by length together


@dataclass(frozen=True)
class BatchPlan:
    """How rows become steps and forward passes."""

    num_rows: int
    batch_size: int  # rows per optimizer step, summed over processes
    microbatch_size: int  # most rows per forward pass and process
    seed: int = 0
    process_index: int = 0
    num_processes: int = 1
    lengths: Sequence[int] | None = None  # given: rows of like length share a step

    def steps(self, epoch: int) -> list[list[int]]:
        """The rows of every optimizer step of an epoch, on all processes together."""
        order = list(range(self.num_rows))
        Random(f"epoch {self.seed} {epoch}").shuffle(order)
        if self.lengths is not None:
            lengths, span = self.lengths, self.batch_size * SORTED_STEPS
            pieces = [sorted(order[at : at + span], key=lambda row: -lengths[row]) for at in range(0, len(order), span)]
            order = [row for piece in pieces for row in piece]
        return [order[at : at + self.batch_size] for at in range(0, len(order), self.batch_size)]

    def passes(self, rows: Sequence[int]) -> list[list[int]]:
        """This process's rows of one step, forward pass by forward pass; of like size, and as many on every process."""
        own = list(rows[self.process_index :: self.num_processes])
        number = self.num_passes(len(rows))
        edges = [len(own) * place // number for place in range(number + 1)]
        return [own[start:end] for start, end in zip(edges, edges[1:], strict=False)]

    def num_passes(self, num_rows: int) -> int:
        """Forward passes of a step of so many rows."""
        share = -(-num_rows // self.num_processes)
        return -(-share // self.microbatch_size)

    def __len__(self) -> int:
        """Forward passes of this process in an epoch."""
        whole, rest = divmod(self.num_rows, self.batch_size)
        return whole * self.num_passes(self.batch_size) + (self.num_passes(rest) if rest else 0)


def make_loader(dataset: Any, collate: Callable[[list[Any]], Any], blank: Callable[[Any], Any], plan: BatchPlan) -> DataLoader[Any]:
    """A loader of this process's forward passes. ``blank`` makes a batch one that does not count (for a pass without a row)."""
    from torch.utils.data import DataLoader

    sampler = _Passes(plan)

    def batch(rows: list[Any]) -> Any:
        return collate(rows) if rows else blank(collate([dataset[0]]))

    class Loader(DataLoader):
        def set_epoch(self, epoch: int) -> None:
            sampler.set_epoch(epoch)

    return Loader(dataset, batch_sampler=sampler, collate_fn=batch)


class _Passes:
    """Batch sampler over the forward passes of an epoch."""

    def __init__(self, plan: BatchPlan) -> None:
        self.plan, self.epoch = plan, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.plan)

    def __iter__(self) -> Iterator[list[int]]:
        for rows in self.plan.steps(self.epoch):
            yield from self.plan.passes(rows)
