"""The reward model: from ranked completions to a scalar, how well it knows preferences, and new comparisons for the next one."""
