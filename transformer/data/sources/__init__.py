"""The kinds of sources, one class per kind; `data/registry.py` tries them in order."""
