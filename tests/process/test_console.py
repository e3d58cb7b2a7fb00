"""What a step shows in the terminal."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from stages.process.console import progress_bar


@pytest.mark.parametrize(("width", "has_bar"), [(60, False), (100, True)])
def test_numbers_of_a_progress_bar_are_not_cut(width: int, has_bar: bool) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=width, _environ={})
    with progress_bar(console, "a-recipe/a-long-step-name: reward model", 12345) as bar:
        bar.advance(678, loss=0.1234, reward=-1.5)
    written = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", console.file.getvalue()).splitlines()[-1]
    assert re.search(r" +678/12345 0:00:0\d (-:--:--|\d+:\d\d:\d\d) loss", written), written
    assert ("━" in written) == has_bar and len(written) <= width
