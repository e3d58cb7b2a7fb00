"""Homes that cannot be folders are refused in one message."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from stages.cli import app
from stages.errors import StorageError
from stages.process.storage import check_home, make_home


@pytest.mark.parametrize("home", ["file", "file/home", "dangling", "n" * 300 + "/home"])
def test_a_command_refuses_a_home_that_cannot_be_a_folder(tmp_path: Path, home: str) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    done = CliRunner().invoke(app, ["models", "list", "--home", str(tmp_path / home)])
    assert done.exit_code == 2
    message = " ".join(done.stderr.split())
    assert message.startswith("error: results cannot be stored in") and "Choose another --home" in message


def test_a_home_may_be_missing(tmp_path: Path) -> None:
    check_home(tmp_path / "new" / "home")
    make_home(tmp_path / "new" / "home")


def test_a_folder_that_the_system_refuses_is_one_message() -> None:
    with pytest.raises(StorageError, match="Choose another --home|choose another --home"):
        make_home(Path("/proc/stages-home"))
