"""Continuing a prompt with a trained decoder."""
