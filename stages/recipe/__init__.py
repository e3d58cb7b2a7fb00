"""Recipes: YAML parsed into strict settings, with errors that name the line and the value; presets of published settings."""
