"""The Python interface: run recipes and single steps on models, data and functions in memory."""
