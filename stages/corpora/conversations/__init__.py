"""Conversations: messages with roles and tools, and the published forms that are converted to them."""
