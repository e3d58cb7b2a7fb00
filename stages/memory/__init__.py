"""Parts of a step's memory: sizes of models, lengths of texts, weights, gradients, activations. Does not import torch."""
