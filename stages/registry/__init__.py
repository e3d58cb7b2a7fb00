"""The on-disk registry of immutable models, with content digests and atomic file writes."""
