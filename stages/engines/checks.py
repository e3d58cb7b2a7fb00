"""What can be said of a recipe's engines before anything is loaded or asked; imports no torch."""

from __future__ import annotations

from pydantic import BaseModel

from stages.config import GenerationSettings
from stages.process.environment import secret


def generation_settings(config: BaseModel) -> list[GenerationSettings]:
    """Every block of generation settings in a step's config, at any depth."""
    found: list[GenerationSettings] = []
    for name in type(config).model_fields:
        values = getattr(config, name)
        for value in values if isinstance(values, list | tuple) else values.values() if isinstance(values, dict) else [values]:
            if isinstance(value, GenerationSettings):
                found.append(value)
            elif isinstance(value, BaseModel):
                found += generation_settings(value)
    return found


def check_installed(config: BaseModel) -> None:
    """Raise LaunchError or RecipeError where a step's config asks for a vLLM that this machine cannot start, or a key that is not set.

    Asks no server.
    """
    from stages.engines.vllm_start import find_installed

    for vllm in (settings.vllm for settings in generation_settings(config)):
        if vllm is not None and vllm.api_key_variable is not None:
            secret(vllm.api_key_variable)
        if vllm is not None and vllm.start is not None:
            find_installed(vllm.start)
