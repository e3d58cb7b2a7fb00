"""Data: tables read from files, the hub or the embedded world, and one module per schema (text, demonstrations, comparisons, ...)."""
