"""Sequence classifiers: the order of their classes, and the inputs that a family reads."""
