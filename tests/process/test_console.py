"""What a step shows in the terminal."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from stages.process.console import in_progress, made_of_each, progress_bar, showing
from stages.process.runtime import Runtime
from stages.process.tables import Table


@pytest.mark.parametrize(("width", "has_bar"), [(60, False), (100, True)])
def test_numbers_of_a_progress_bar_are_not_cut(width: int, has_bar: bool) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=width, _environ={})
    with progress_bar(console, "a-recipe/a-long-step-name: reward model", 12345) as bar:
        bar.advance(678, loss=0.1234, reward=-1.5)
    written = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", console.file.getvalue()).splitlines()[-1]
    assert re.search(r" +678/12345 0:00:0\d (-:--:--|\d+:\d\d:\d\d) loss", written), written
    assert ("━" in written) == has_bar and len(written) <= width


def test_brackets_of_texts_are_no_styles(capsys: pytest.CaptureFixture[str]) -> None:
    """A run ended with an error of rich when SFT printed how a chat template ends a reply."""
    console = Runtime().console
    console.print("the template ends a reply with '[/INST]', the pad token is [pad]")
    table = Table("step", title="a [b]plan[/]")
    table.add_row("[red]sft[/]")
    console.print(table)
    console.print("[bold]sft[/] reused", markup=True)
    written = capsys.readouterr().out
    assert "with '[/INST]', the pad token is [pad]" in written
    assert "a plan" in written and "sft reused" in written and "[red]" not in written


class Clock:
    """Stands for the clock of the bars."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr("stages.process.console.time", made)
    return made


def a_log() -> Console:
    """The console of a run whose output goes to a file."""
    return Console(file=io.StringIO(), width=80, _environ={})


def test_a_log_file_gets_lines_whose_pauses_grow(clock: Clock) -> None:
    console = a_log()
    with progress_bar(console, "mine/sft: sft", 5000, done=1000) as bar:  # resumed after 1000 of them
        for minute in range(1, 31):
            clock.now = 60.0 * minute
            bar.advance(100, loss=0.5)
    # lines after 1, 3, 7, 15 and 25 minutes: pauses of 1, 2, 4, 8 and then 10 minutes
    assert console.file.getvalue().splitlines() == [
        "mine/sft: sft: 1,100 of 5,000 after 0:01:00, 0:39:00 left  loss 0.5",
        "mine/sft: sft: 1,300 of 5,000 after 0:03:00, 0:37:00 left  loss 0.5",
        "mine/sft: sft: 1,700 of 5,000 after 0:07:00, 0:33:00 left  loss 0.5",
        "mine/sft: sft: 2,500 of 5,000 after 0:15:00, 0:25:00 left  loss 0.5",
        "mine/sft: sft: 3,500 of 5,000 after 0:25:00, 0:15:00 left  loss 0.5",
    ]


@pytest.mark.parametrize("total", [3, None])
def test_short_work_shows_no_bar_and_long_work_shows_one(total: int | None, clock: Clock) -> None:
    for seconds, shows in ((0.5, False), (1.5, True)):
        console = Console(file=io.StringIO(), force_terminal=True, width=100, _environ={})
        with showing(console), in_progress("reading rows.jsonl", total) as done:
            for _ in range(3):
                clock.now += seconds
                done()
        assert ("reading rows.jsonl" in console.file.getvalue()) == shows


def test_long_work_writes_lines_to_a_log_file_and_none_inside_another_bar(clock: Clock) -> None:
    console = a_log()

    def work(what: str) -> None:
        with in_progress(what, 300) as done:
            for _ in range(3):
                clock.now += 50
                done(100)

    with showing(console):
        work("encoding")
        with progress_bar(console, "training", 10):
            work("measuring")
    work("after the run")
    # the bar begins after 50 s, when 100 are done; the next line is due 60 s later, after 150 s: 200 in 100 s
    assert console.file.getvalue() == "encoding: 300 of 300 after 0:01:40, 0:00:00 left\n"


def test_a_bar_ends_with_an_error_of_its_work(clock: Clock) -> None:
    console = a_log()

    def encode(row: str) -> None:
        clock.now += 70
        if row == "bad":
            raise ValueError("bad row")

    with showing(console), pytest.raises(ValueError, match="bad row"):
        made_of_each("encoding", encode, ["good", "good", "bad"])
    with showing(console), in_progress("reading", 2) as done:  # the bar of the failed work is gone, so this one is shown
        for _ in range(2):
            clock.now += 70
            done()
    assert console.file.getvalue().splitlines()[-1] == "reading: 2 of 2 after 0:01:10, 0:00:00 left"
