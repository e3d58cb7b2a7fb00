"""Data: tables from files, the Hub or the embedded world, and one module per row schema (text, demonstrations, comparisons, ...)."""
