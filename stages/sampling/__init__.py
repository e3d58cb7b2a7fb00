"""Completions from a language model, each from a random stream of its own, with the log-probability of every token."""
