"""launch.sh makes its environments once. A fake Python records what would be installed."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
FAKE_PYTHON = """#!/usr/bin/env bash
case "$*" in
*"-m venv"*) mkdir -p "${@: -1}/bin"; cp "$0" "${@: -1}/bin/python"; echo "venv ${@: -1}" >>"$INSTALLS"; sleep 0.2 ;;
*"-m pip"*install*) echo "pip ${@: -1}" >>"$INSTALLS" ;;
*--version*) echo "Python 3.12.0" ;;
esac
"""


class Launcher:
    """Runs launch.sh with a fake Python, and reads what it installed."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.installs = folder, folder / "installs.txt"
        for name, text in (("python", FAKE_PYTHON), ("uv", "#!/bin/sh\nexit 1\n"), ("nvidia-smi", "#!/bin/sh\nexit 1\n")):
            (folder / name).write_text(text)
            (folder / name).chmod(0o755)
        self.environment = {
            "PATH": f"{folder}:{os.environ['PATH']}",
            "STAGES_PYTHON": str(folder / "python"),
            "STAGES_VENV": str(folder / "venv"),
            "INSTALLS": str(self.installs),
        }

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        command = ["bash", str(REPOSITORY / "launch.sh"), *arguments]
        return subprocess.Popen(command, env=self.environment, text=True, stderr=subprocess.PIPE, stdout=subprocess.PIPE)

    def installed(self) -> list[str]:
        return [line.replace(str(self.folder), "") for line in self.installs.read_text().splitlines()]


@pytest.fixture
def launcher(tmp_path: Path) -> Launcher:
    return Launcher(tmp_path)


def test_the_environments_are_made_once_by_two_first_starts(launcher: Launcher) -> None:
    both = [launcher.start("--with-vllm"), launcher.start("--with-vllm")]
    assert [process.wait(60) for process in both] == [0, 0]
    installed = launcher.installed()
    assert [line for line in installed if line.startswith("venv")] == ["venv /venv", "venv /venv-vllm"]
    assert len([line for line in installed if line.startswith("pip vllm")]) == 1
    assert launcher.start("--with-vllm").wait(60) == 0
    assert launcher.installed() == installed


def test_an_environment_with_an_old_stamp_is_brought_up_to_date(launcher: Launcher) -> None:
    assert launcher.start("--with-vllm").wait(60) == 0
    before = launcher.installed()
    (launcher.folder / "venv" / ".tristage-installed").write_text("an older version\n")
    assert launcher.start("--with-vllm").wait(60) == 0
    assert launcher.installed()[len(before) :] == before[: before.index("venv /venv-vllm")]


def test_a_machine_without_a_usable_python_gets_one_message(launcher: Launcher) -> None:
    for name in ("python", "python3", "python3.11", "python3.12", "python3.13"):
        (launcher.folder / name).write_text("#!/bin/sh\nexit 1\n")
        (launcher.folder / name).chmod(0o755)
    process = launcher.start("--with-vllm")
    assert process.wait(60) == 2
    assert process.communicate()[1].startswith("launch.sh: no Python 3.11 to 3.13")
    assert not launcher.installs.exists()
