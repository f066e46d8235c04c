"""Worker programs: each runs one task in a process, a peer's in its own environment."""
