"""Data: tables from files, the Hub or the embedded world, and one module for each kind of row."""
