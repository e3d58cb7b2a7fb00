"""Faster and leaner implementations of model computations, and token budgets of forward passes. Depends only on torch."""
