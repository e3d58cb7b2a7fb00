"""Pure tensor functions: torch in, torch out, nothing else imported. B sequences, R response tokens; masks are True where a token counts."""
