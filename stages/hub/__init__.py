"""The Hugging Face Hub: which commit a revision names, what a repository holds, and whether a model can be loaded. Never weights."""
