"""Backends of attention, one a file."""
