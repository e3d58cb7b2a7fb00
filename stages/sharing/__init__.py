"""Share registry models on the Hub: push a version with its card and lineage, and pull it unchanged into another registry."""
