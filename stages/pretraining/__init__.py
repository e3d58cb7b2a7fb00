"""Pretraining: a language model from raw text."""
