"""What a PPO run records and publishes: metrics, logs, checkpoints and models."""
