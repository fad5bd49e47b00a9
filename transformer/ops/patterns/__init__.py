"""Block patterns, one kind per file."""
