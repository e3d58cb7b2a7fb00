"""The same functions as ``tokens/positions.py``, under the name by which the other rooms import them."""

from stages.tokens.positions import model_length, readable_length, row_length, tokenizer_length

__all__ = ["model_length", "readable_length", "row_length", "tokenizer_length"]
