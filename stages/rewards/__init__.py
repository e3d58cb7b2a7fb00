"""Reward sources: texts in, scores out. Token ids never cross, so a source may have any tokenizer, or none."""
