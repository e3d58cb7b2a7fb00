"""How much memory a recipe will need, step by step, and what to change where that is more than there is. Loads no model and no torch."""
