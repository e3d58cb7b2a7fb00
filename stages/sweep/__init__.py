"""Run a recipe for every combination of chosen settings and seeds; steps that are equal in several runs are made once."""
