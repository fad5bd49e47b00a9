"""Linen modules: thin holders of parameters over ops."""
