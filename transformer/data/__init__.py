"""From text to batches: tokenizers, local files and TFDS datasets, and the pipelines for training and evaluation."""
