"""Judges beyond reward sources: a language model behind an endpoint, and people whose judgements are in a file."""
