"""Tristage: a language model from raw to aligned in three chained stages (SFT, reward model, PPO), on today's transformers."""

__version__ = "0.1.0"
