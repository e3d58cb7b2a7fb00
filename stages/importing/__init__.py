"""Models that other libraries saved, brought into the registry."""
