"""The mathematics of RLHF on tensors; needs torch alone. B sequences, R response tokens; a mask is True where a token counts."""
