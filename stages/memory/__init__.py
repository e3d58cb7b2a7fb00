"""What the memory of a step is made of: sizes of models, lengths of texts, weights, gradients, activations. Imports no torch."""
