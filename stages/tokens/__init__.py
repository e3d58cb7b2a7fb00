"""Tokenizers: texts that continue others, and what a chat template does with every turn."""
