"""Shared code of the training stages: one Trainer, batching, checkpoints, model selection."""
