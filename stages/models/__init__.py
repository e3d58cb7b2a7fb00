"""Models and what stands on them: loading and quantization, scalar heads, adapters, the likelihood of tokens."""
