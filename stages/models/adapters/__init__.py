"""Adapters: attach, activate, merge, load, save and serve them; stacks of adapters; several roles on one backbone."""
