"""The ledger on disk of immutable models, and what it stands on: digests of content, files that are there whole or not at all."""
