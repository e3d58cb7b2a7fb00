"""Judges besides reward sources: a language model behind an endpoint, and judgements of people in a file."""
