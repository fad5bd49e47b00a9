"""Families of pretrained models, one per file: the conversion of their config and tensors, in both directions."""
