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


def test_command_to_continue_is_the_typed_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("STAGES_COMMAND", raising=False)
    monkeypatch.setattr(sys, "argv", ["/x/bin/stages", "run", "my recipe.yaml", "seed=8"])
    assert environment.command_to_go_on() == "stages run 'my recipe.yaml' seed=8"
    monkeypatch.setenv("STAGES_COMMAND", "./launch.sh recipes/quickstart.yaml")
    assert environment.command_to_go_on() == "./launch.sh recipes/quickstart.yaml"
