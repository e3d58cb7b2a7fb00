"""Recipes: YAML parsed into strict settings, with errors that name line, value and next move; presets of published settings."""
