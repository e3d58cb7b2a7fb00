"""The reward model stage: train a scalar model on ranked completions, measure its accuracy, and collect new comparisons."""
