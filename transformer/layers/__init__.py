"""Linen modules: parameters, and calls of the pure functions in `ops`."""
