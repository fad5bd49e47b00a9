"""Scores of a model over a whole split."""
