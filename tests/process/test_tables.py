"""Tables in terminals of different widths."""

from __future__ import annotations

from io import StringIO

import pytest
from rich.console import Console
from rich.text import Text

from stages.process.tables import Table

COLUMNS = [f"measure{index}" for index in range(8)]
NUMBERS = [f"{index}.{index}{index}{index}" for index in range(8)]


def printed(table: Table, width: int) -> str:
    console = Console(file=StringIO(), width=width)
    console.print(table)
    assert isinstance(console.file, StringIO)
    return console.file.getvalue()


def numbers(title: str = "Peak memory") -> Table:
    table = Table("step", *COLUMNS, title=title, caption="in GiB")
    table.add_row("sft", *NUMBERS)
    return table


@pytest.mark.parametrize("width", [20, 60, 80])
def test_a_table_wider_than_the_terminal_is_printed_as_text_without_cut_values(width: int) -> None:
    text = " ".join(printed(numbers(), width).split())
    assert text == "Peak memory sft: " + "; ".join(f"{name} {value}" for name, value in zip(COLUMNS, NUMBERS, strict=True)) + " in GiB"


def test_a_table_that_fits_is_printed_as_a_table() -> None:
    lines = printed(numbers(), 120).splitlines()
    assert "┃ step ┃ measure0 ┃" in lines[2]
    assert "│ sft  │ 0.000    │" in lines[4]


def test_long_values_get_lines_of_their_own() -> None:
    table = Table("prompt", "first", "second")
    table.add_row("hi", "x" * 50, Text("[not markup]"))
    assert printed(table, 60).splitlines() == ["hi: ", f"  first {'x' * 50}", "  second [not markup]"]


def test_a_table_without_headings_has_a_line_for_each_row() -> None:
    table = Table(show_header=False)
    table.add_row("digest", "f" * 64)
    table.add_row("size", "3")
    assert "".join(printed(table, 60).split()) == f"digest:{'f' * 64}size:3"
