"""Reward sources: they take texts and return scores. They exchange no token ids, so a source may have any tokenizer, or none."""
