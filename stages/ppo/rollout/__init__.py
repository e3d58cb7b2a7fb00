"""A rollout: sample completions, measure them by forward passes, and score them."""
