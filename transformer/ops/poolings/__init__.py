"""Poolings, one kind per file."""
