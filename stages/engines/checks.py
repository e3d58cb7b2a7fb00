"""Checks of a recipe's engines before a model is loaded or a server is asked. Imports no torch."""

from __future__ import annotations

from pydantic import BaseModel

from stages.config import GenerationSettings
from stages.engines.vllm_start import find_installed
from stages.process.environment import secret


def generation_settings(config: BaseModel) -> list[GenerationSettings]:
    """All generation settings in a step's config, at any depth."""
    settings: list[GenerationSettings] = []
    for name in type(config).model_fields:
        values = getattr(config, name)
        for value in values if isinstance(values, list | tuple) else values.values() if isinstance(values, dict) else [values]:
            if isinstance(value, GenerationSettings):
                settings.append(value)
            elif isinstance(value, BaseModel):
                settings += generation_settings(value)
    return settings


def check_installed(config: BaseModel) -> None:
    """Check the vLLM settings of a step's config without a request to a server.

    Raises LaunchError if this machine cannot start the vLLM that the config asks for. Raises RecipeError if the environment variable of an
    API key is not set.
    """
    for vllm in (settings.vllm for settings in generation_settings(config)):
        if vllm is not None and vllm.api_key_variable is not None:
            secret(vllm.api_key_variable)
        if vllm is not None and vllm.start is not None:
            find_installed(vllm.start)
