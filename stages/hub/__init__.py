"""The Hugging Face Hub: resolve revisions to commits, list repository files, and check models without downloading weights."""
