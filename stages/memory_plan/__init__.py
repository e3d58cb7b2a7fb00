"""Estimate the memory of each step of a recipe, and suggest changes if it is too much. Loads no model and does not import torch."""
