"""Pretrained models in and out: Hugging Face folders as parameters of this package's models, and back."""
