"""Mathematics of RLHF on tensors. Depends only on torch. B sequences, R response tokens; a mask is True where a token counts."""
