"""The table of details is correct: its code and tests exist, and every test marked for a detail is in its row."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from stages.conformance import DETAILS, conformance_table

REPOSITORY = Path(__file__).resolve().parents[2]
CHECKLIST = REPOSITORY.parent / "shared" / "design" / "instructgpt.md"


def definitions(path: Path) -> set[str]:
    """Functions, classes and constants at the top of a file."""
    names = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.add(node.target.id)
    return names


def marked() -> dict[str, set[str]]:
    """Test (file::name, below tests/) -> the ids it is marked for."""
    ids_by_test: dict[str, set[str]] = {}
    for path in sorted((REPOSITORY / "tests").rglob("test_*.py")):
        for node in ast.parse(path.read_text()).body:
            if not isinstance(node, ast.FunctionDef) or not node.name.startswith("test"):
                continue
            ids = {
                argument.value
                for decorator in node.decorator_list
                if isinstance(decorator, ast.Call) and ast.unparse(decorator.func) == "pytest.mark.detail"
                for argument in decorator.args
                if isinstance(argument, ast.Constant)
            }
            ids_by_test[f"{path.relative_to(REPOSITORY / 'tests').as_posix()}::{node.name}"] = ids
    return ids_by_test


def test_every_detail_has_code_and_tests_that_exist() -> None:
    tests = marked()
    assert len({detail.id for detail in DETAILS}) == len(DETAILS)
    for detail in DETAILS:
        assert detail.code and detail.tests, detail.id
        for reference in detail.code:
            file, _, name = reference.partition(":")
            path = REPOSITORY / "stages" / file
            assert path.is_file() and name in definitions(path), f"{detail.id}: no {reference}"
        for test in detail.tests:
            assert test in tests, f"{detail.id}: no test {test}"
            assert detail.id in tests[test], f"{test} is not marked for {detail.id}"


def test_every_marked_test_is_in_the_table() -> None:
    table = {detail.id: set(detail.tests) for detail in DETAILS}
    for test, ids in marked().items():
        for id in ids:
            assert test in table.get(id, set()), f"{test} is marked for {id}, and the table does not name it there"


def test_every_detail_of_the_checklist_with_a_test_is_in_the_table() -> None:
    if not CHECKLIST.is_file():
        pytest.skip("needs ../shared/design/instructgpt.md (the checklist that the details are taken from)")
    rows = [line for line in CHECKLIST.read_text().splitlines() if re.match(r"\| [GSRP]\d+ ", line) and not line.endswith("| - |")]
    wanted = {line.split()[1] for line in rows}
    assert len(wanted) > 60 and wanted - {detail.id for detail in DETAILS} == set()


def test_the_command_prints_every_id() -> None:
    done = subprocess.run([sys.executable, "-m", "stages", "conformance"], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    for detail in DETAILS:
        assert re.search(rf"\b{detail.id}\b", done.stdout), detail.id
    assert "rl/gae.py:gae" in done.stdout


@pytest.mark.parametrize("width", [140, 400])
def test_the_table_breaks_no_identifier(width: int) -> None:
    console = Console(width=width)
    with console.capture() as capture:
        console.print(conformance_table())
    words = set(capture.get().split())
    assert not {name for detail in DETAILS for name in (*detail.code, *detail.tests)} - words
