"""The Python interface: recipes and single steps on models, data and functions that are in memory."""
