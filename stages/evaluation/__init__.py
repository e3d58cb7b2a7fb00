"""Evaluation: candidates answer the same prompts, judges compare the answers; the outcome has win rates with intervals."""
