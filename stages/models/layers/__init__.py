"""Layers of a loaded model that Tristage replaces or changes: attention, lean and compiled layers, dropout, rotary embeddings."""
