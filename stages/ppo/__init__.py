"""PPO on completions, with a frozen reference, a value network and any list of reward sources."""
