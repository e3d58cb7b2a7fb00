"""Import models saved by other libraries into the registry."""
