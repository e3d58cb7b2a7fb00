"""Run a recipe's steps in order: reuse, resume or run each one, and record what its result was made from."""
