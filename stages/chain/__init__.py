"""A recipe's steps in order: each is reused, resumed or run, and what it was made from is kept."""
