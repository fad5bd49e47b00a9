"""Kinds of positions, one a file."""
