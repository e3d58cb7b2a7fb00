"""Pure tensor functions: torch and nothing else. B sequences, R response tokens; masks are True where a token counts."""
