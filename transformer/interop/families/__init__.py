"""Families of pretrained models, one a file: their config and their tensors as ours, both ways."""
