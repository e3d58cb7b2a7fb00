"""Direct preference optimisation, the baseline for PPO."""
