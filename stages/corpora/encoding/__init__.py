"""Rows as tokens: training rows of demonstrations, blocks of texts, and prompts shortened to fit."""
