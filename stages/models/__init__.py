"""Load, save and extend models: quantization, scalar heads, adapters, token likelihood, sharding."""
