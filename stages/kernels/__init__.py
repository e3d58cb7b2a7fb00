"""Fast and lean forms of what a model computes, and how many tokens a forward pass reads. Needs torch alone."""
