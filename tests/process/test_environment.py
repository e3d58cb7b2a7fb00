"""Launchers and the typed command, read from the environment."""

from __future__ import annotations

import sys

import pytest

from stages.process import environment

LAUNCHERS = ("WORLD_SIZE", "RANK", "PMI_SIZE", "PMI_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK")


@pytest.mark.parametrize(
    ("variables", "processes", "rank"),
    [
        ({}, 1, 0),
        ({"WORLD_SIZE": "4", "RANK": "3"}, 4, 3),
        ({"PMI_SIZE": "2", "PMI_RANK": "1"}, 2, 1),
        ({"OMPI_COMM_WORLD_SIZE": "8", "OMPI_COMM_WORLD_RANK": "5"}, 8, 5),
    ],
)
def test_every_launcher_is_understood(variables, processes, rank, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in LAUNCHERS:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert (environment.launched_processes(), environment.launched_rank()) == (processes, rank)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["/x/python", "/x/bin/accelerate", "launch", "--cpu", "-m", "stages"], (["accelerate", "launch"], ["--cpu", "-m", "stages"])),
        (["python", "-m", "accelerate.commands.launch", "--cpu", "a.py"], (["accelerate", "launch"], ["--cpu", "a.py"])),
        (["python", "-m", "stages.process.launching", "--cpu", "-m", "stages"], (["accelerate", "launch"], ["--cpu", "-m", "stages"])),
        (
            ["/x/python3", "/x/bin/torchrun", "--nproc_per_node", "2", "-m", "stages"],
            (["torchrun"], ["--nproc_per_node", "2", "-m", "stages"]),
        ),
        (["bash", "-c", "stages run x"], None),
    ],
)
def test_launcher_is_found_in_a_command_line(words, expected) -> None:
    assert environment._launcher_in(words) == expected


def test_command_to_continue_is_the_typed_command(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("STAGES_COMMAND", "TORCHELASTIC_RUN_ID", "ACCELERATE_DYNAMO_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "argv", ["/x/bin/stages", "run", "my recipe.yaml", "seed=8"])
    assert environment.continue_command() == "stages run 'my recipe.yaml' seed=8"
    monkeypatch.setattr(sys, "argv", ["my run.py", "--fast"])
    assert environment.continue_command() == "python 'my run.py' --fast"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setattr(
        environment, "launcher_command", lambda: (["accelerate", "launch"], ["--num_processes", "2", "-m", "stages", "run", "a b"])
    )
    assert environment.continue_command() == "accelerate launch --num_processes 2 -m stages run 'a b'"
    monkeypatch.setenv("STAGES_COMMAND", "./launch.sh recipes/quickstart.yaml")
    assert environment.continue_command() == "./launch.sh recipes/quickstart.yaml"
