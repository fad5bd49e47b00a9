"""Kinds of poolings, one a file."""
