"""Tokenizers: encode continuations of a text, and analyse chat templates."""
