"""Norms, one kind per file."""
