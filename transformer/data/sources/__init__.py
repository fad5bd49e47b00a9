"""The kinds of sources, one class each; `data/registry.py` tries them in order."""
