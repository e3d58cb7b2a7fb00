"""The update: targets, minibatches, losses and optimizer steps on one rollout."""
