"""Decisions that follow from the settings of a PPO step and are needed in several places."""

from __future__ import annotations

import pytest

LABELLED = {"model": "taste", "label": "positive", "name": "labelled"}
ASKED = {"model": "sft", "answers": [" yes", " no"], "question": "Good? {prompt} {completion}", "name": "asked"}
TWO = {"ensemble": [{"model": "one"}, {"model": "two"}], "name": "two"}


@pytest.mark.parametrize(
    ("fields", "expected", "asked"),
    [
        ({"value": None, "reward": [LABELLED, TWO]}, "reward[1].ensemble[1].model", ["reward[1].ensemble[0].model"]),
        ({"value": None, "reward": [LABELLED]}, "policy", []),  # a classifier or a question has no head for values
        ({"value": None, "reward": [ASKED]}, "policy", []),
        ({"value": "policy", "reward": [TWO]}, "policy", []),
        ({"value": {"ref": "own"}, "reward": [TWO]}, "value", []),
        ({"value": "shared", "reward": [TWO]}, None, []),
        ({"value": None, "reward": [TWO], "advantages": "rloo", "samples_per_prompt": 2}, None, []),
    ],
)
def test_value_network_starts_from_the_first_model_that_fits(ppo_config, fields, expected, asked) -> None:
    rejected: list[str] = []

    def fits(name: str) -> bool:
        if name.endswith("[0].model"):
            rejected.append(name)
        return not name.endswith("[0].model")

    assert ppo_config(**fields).value_input(fits) == expected
    assert rejected == asked


@pytest.mark.parametrize(("size", "rows"), [("auto", (16, 32)), (4, (4, 8))])
def test_passes_without_gradients_have_twice_the_rows(ppo_config, size, rows) -> None:
    config = ppo_config(microbatch_size=size)
    assert (config.rows_per_pass, config.measuring_rows) == rows
