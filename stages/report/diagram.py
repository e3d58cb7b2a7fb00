"""A diagram of the steps: a box per step, and an arrow for each model that a step reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

WIDTH, HEIGHT, GAP_X, GAP_Y, PAD = 148, 52, 58, 22, 6  # of a box, between boxes, and around the drawing; in its units


@dataclass(frozen=True)
class Box:
    """A step with its position (top left corner) and the lines of text in its box. ``is_foreign``: a model from outside the chain."""

    name: str
    x: float
    y: float
    lines: tuple[str, ...]
    is_foreign: bool


@dataclass(frozen=True)
class Diagram:
    """Boxes and arrows (SVG paths) in a drawing of ``width`` by ``height``."""

    boxes: list[Box]
    arrows: list[str]
    width: float
    height: float


def draw_chain(lines: Mapping[str, Sequence[str]], reads: Mapping[str, Sequence[str]]) -> Diagram:
    """Draw steps from left to right by the number of steps before them. ``reads``: the names of the models that each step reads.

    A name that is not a step is a model from outside; it is drawn in the first column. An evaluation reads nearly all models. So arrows
    that follow from other arrows (an input of an input) are left out; the table next to the drawing lists all inputs.
    """
    steps = list(lines)
    foreign = [name for name in dict.fromkeys(name for names in reads.values() for name in names) if name not in lines]
    depth = {name: 0 for name in foreign}
    for step in steps:
        depth[step] = max((depth[name] + 1 for name in reads.get(step, ()) if name in depth), default=0)
    columns: dict[int, list[str]] = {}
    for name in [*foreign, *steps]:
        columns.setdefault(depth[name], []).append(name)
    tallest = max(map(len, columns.values()), default=1)
    corners = {}
    for column, names in columns.items():
        top = (tallest - len(names)) * (HEIGHT + GAP_Y) / 2
        for row, name in enumerate(names):
            corners[name] = (PAD + column * (WIDTH + GAP_X), PAD + top + row * (HEIGHT + GAP_Y))
    arrows = []
    for step in steps:
        for name in _direct(step, reads):
            (x, y), (to_x, to_y) = corners[name], corners[step]
            start, end = (x + WIDTH, y + HEIGHT / 2), (to_x, to_y + HEIGHT / 2)
            bend = max(24, (end[0] - start[0]) / 2)
            points = (start, (start[0] + bend, start[1]), (end[0] - bend, end[1]), end)
            first, *rest = (f"{x:.0f} {y:.0f}" for x, y in points)
            arrows.append(f"M{first} C{' '.join(rest)}")
    boxes = [Box(name, *corners[name], tuple(lines.get(name, ("from outside",))), name in foreign) for name in [*foreign, *steps]]
    width = 2 * PAD + max(columns, default=0) * (WIDTH + GAP_X) + WIDTH
    return Diagram(boxes, arrows, width, 2 * PAD + tallest * (HEIGHT + GAP_Y) - GAP_Y)


def _direct(step: str, reads: Mapping[str, Sequence[str]]) -> list[str]:
    """The inputs of a step, without those that it also reaches through another input."""
    own = list(dict.fromkeys(reads.get(step, ())))
    return [name for name in own if not any(name in _ancestors(other, reads) for other in own if other != name)]


def _ancestors(name: str, reads: Mapping[str, Sequence[str]]) -> set[str]:
    ancestors: set[str] = set()
    waiting = list(reads.get(name, ()))
    while waiting:
        other = waiting.pop()
        if other not in ancestors:
            ancestors.add(other)
            waiting += reads.get(other, ())
    return ancestors
