"""The evaluation: candidates answer the same prompts, judges compare the answers; the outcome says who is better, and how surely."""
