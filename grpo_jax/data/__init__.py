"""Parallel text: read, split by group, tokenized, and served in a fixed order."""
