"""Tables for the terminal. If the terminal is too narrow for a table, each row becomes lines of text, so that no value is cut."""

from __future__ import annotations

import rich.table
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.text import Text

UNLIMITED = 100_000
SHORT = 40  # characters


class Table(rich.table.Table):
    """A table of ``rich`` whose rows are printed as text (``heading value; ...``) if their longest words do not fit side by side."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if self.__rich_measure__(console, options.update(max_width=UNLIMITED)).minimum <= options.max_width:
            yield from super().__rich_console__(console, options)
            return
        if self.title:
            yield _text(self.title, "table.title")
        for cells in zip(*(column.cells for column in self.columns), strict=True):
            yield from self._lines([_text(cell) for cell in cells])
        if self.caption:
            yield _text(self.caption, "table.caption")

    def _lines(self, cells: list[Text]) -> list[Text]:
        """One row: a line of its values if all are short, else a line for each value. The first cell names the row."""
        first, *others = cells
        if not self.show_header:
            return [Text.assemble(first, ": ", Text(" ").join(others))]
        headings = [_text(column.header) for column in self.columns[1:]]
        named = [Text.assemble(heading, " ", cell) for heading, cell in zip(headings, others, strict=True) if cell.plain]
        title = Text.assemble((first.plain, "bold"), ": " if named else "")
        if all(len(text) <= SHORT for text in named):
            return [Text.assemble(title, Text("; ").join(named))]
        return [title, *(Text.assemble("  ", text) for text in named)]


def _text(value: RenderableType, style: str = "") -> Text:
    return value if isinstance(value, Text) else Text.from_markup(str(value), style=style)
