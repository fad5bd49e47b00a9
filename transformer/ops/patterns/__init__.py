"""Kinds of block patterns, one a file."""
