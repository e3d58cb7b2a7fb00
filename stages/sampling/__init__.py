"""Sampling completions from a language model. Each completion has its own random stream and the log-probability of every token."""
