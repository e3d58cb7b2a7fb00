"""Models of the registry on the Hub: pushed with their card and lineage, and pulled into another registry as they were."""
