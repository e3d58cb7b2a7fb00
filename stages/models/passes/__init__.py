"""Passes through a model: their size, packed and right-padded rows, log-probabilities of responses, likelihood of texts."""
