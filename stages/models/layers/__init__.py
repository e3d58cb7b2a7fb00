"""Layers of a loaded model that Tristage replaces: attention, lean and compiled layers, dropout, rotary embeddings."""
