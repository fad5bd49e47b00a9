"""Import and export of pretrained models: Hugging Face folders as parameters of this package's models, and back."""
