"""Kinds of norms, one a file."""
