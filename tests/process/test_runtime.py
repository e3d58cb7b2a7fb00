"""Names of ``stages.process.runtime`` that scripts outside of this repository import."""

from __future__ import annotations

import pytest

from stages import step
from stages.process import runtime
from stages.registry import references


def test_names_that_moved_are_found_at_their_former_address() -> None:
    assert runtime.ResolvedModel is references.ResolvedModel
    assert (runtime.StepContext, runtime.StepResult) == (step.StepContext, step.StepResult)
    with pytest.raises(AttributeError, match="has no attribute 'Nothing'"):
        _ = runtime.Nothing
