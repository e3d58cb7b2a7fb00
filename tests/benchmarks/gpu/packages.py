"""Checks the packages of an environment before a GPU is used: those of pyproject.toml, and TRL 1.12 in its own folder.

It imports nothing of this project, because the project does not start without its packages.
"""

from __future__ import annotations

import platform
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

EXTRA = "quantize"  # without its packages, only the rows of quantized weights and 8-bit moments have no number
TRL = "trl==1.12.0"
CHECK_TRL = """
import sys
sys.path[:0] = {folders}
from importlib.metadata import version
import trl.experimental.ppo
print(version("trl"))
"""


@dataclass(frozen=True)
class Missing:
    """A requirement that is not met. ``installed``: the version that is there; None if there is none."""

    requirement: str
    installed: str | None

    def __str__(self) -> str:
        return f"{self.requirement} ({self.installed or 'not'} installed)"


def missing(project: Path) -> tuple[list[Missing], list[Missing]]:
    """The packages that ``project`` (a pyproject.toml) needs and this Python lacks, and those of its extra for quantized weights."""
    content = tomllib.loads(project.read_text(encoding="utf-8"))["project"]
    return _unmet(content["dependencies"]), _unmet(content["optional-dependencies"][EXTRA])


def _unmet(requirements: list[str]) -> list[Missing]:
    from packaging.requirements import Requirement

    unmet = []
    for text in requirements:
        needed = Requirement(text)
        if needed.marker is not None and not needed.marker.evaluate():
            continue
        try:
            installed = version(needed.name)
        except PackageNotFoundError:
            installed = None
        if installed is None or not needed.specifier.contains(installed, prereleases=True):
            unmet.append(Missing(text, installed))
    return unmet


def how_to_install(packages: list[Missing]) -> str:
    """The commands that install ``packages``, also on a machine without a network. torch is left out: its build must fit the driver."""
    names = " ".join(f"'{one.requirement}'" for one in packages if not one.requirement.startswith("torch"))
    python = ".".join(platform.python_version_tuple()[:2])
    return (
        f"  {sys.executable} -m pip install {names}\n"
        "Without a network here: on another machine download the packages, and those that they need, and bring the folder wheels/:\n"
        f"  python -m pip download --no-deps --only-binary=:all: --python-version {python} --platform manylinux_2_28_x86_64 "
        f"-d wheels {names}\n"
        f"  {sys.executable} -m pip install --no-index --no-deps --target site wheels/*.whl && export PYTHONPATH=$PWD/site"
    )


def problem_of_trl(python: Path, folder: str | None) -> str:
    """Why TRL 1.12's PPO cannot be imported by ``python`` from ``folder`` (None: from its own packages); empty if it can."""
    code = CHECK_TRL.format(folders=[] if folder is None else [folder])
    done = subprocess.run([str(python), "-W", "ignore", "-c", code], capture_output=True, text=True, check=False)
    if done.returncode:
        return f"its PPO cannot be imported: {(done.stderr.strip().splitlines() or ['?'])[-1][:200]}"
    installed = done.stdout.strip().splitlines()[-1]
    return "" if installed.startswith("1.12.") else f"it has TRL {installed}, not 1.12"
