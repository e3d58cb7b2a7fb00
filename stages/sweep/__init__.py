"""A recipe run for every combination of chosen settings and seeds; what the runs have in common is made once."""
