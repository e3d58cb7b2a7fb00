"""Show the memory plan: a table of the steps, and advice below it."""

from __future__ import annotations

from collections.abc import Sequence

from stages.memory.estimate import Machine
from stages.memory_plan.advice import PROCESS, StepMemory, gib
from stages.process.tables import Table


def memory_table(steps: Sequence[StepMemory], machine: Machine) -> Table:
    """Table of every step's estimate with its parts."""
    columns = ("weights", "adapters", "gradients", "optimizer", "KV cache", "activations", "logits")
    table = Table("step", *columns, "total", "of the machine", title="Peak memory per process (GiB)")
    table.title_justify = "left"
    for step in steps:
        if step.memory is None:
            table.add_row(step.name, *("?" for _ in columns), "?", step.note)
            continue
        memory = step.memory
        parts = (
            memory.weights + memory.awake,
            memory.adapters,
            memory.gradients,
            memory.optimizer,
            memory.kv_cache,
            memory.activations,
            memory.logits,
        )
        total = memory.total + PROCESS[machine.kind]
        share = f"{total / machine.bytes:.0%}" if total <= machine.bytes else f"[red]{total / machine.bytes:.0%}: does not fit[/]"
        table.add_row(step.name, *(gib(part) for part in parts), f"[bold]{gib(total)}[/]", share)
    table.caption_justify = "left"
    table.caption = f"{machine.name}: {gib(machine.bytes)} GiB; total includes {gib(PROCESS[machine.kind])} GiB for the process itself"
    if machine.kind == "cpu":
        table.caption += ", and freed blocks that the allocator keeps"
    return table


def advice_lines(steps: Sequence[StepMemory]) -> list[str]:
    """Advice for each step that does not fit; and what the estimates leave out or take from constants, with the steps."""
    lines = []
    for step in steps:
        if step.advice:
            lines.append(f"{step.name} would fit ({step.note.removeprefix('with these settings ')} GiB) with: {' '.join(step.advice)}")
        elif step.memory is not None and step.note:
            lines.append(f"{step.name}: {step.note}")
    for message in dict.fromkeys(message for step in steps for message in step.uncounted):
        names = [step.name for step in steps if message in step.uncounted]
        lines.append(f"{', '.join(names)}: {message}")
    return lines
